"""Promise: a run that is killed and resumed ends as one that never was, bit for bit; and it may be spread anew."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_playground_jax as nfpo
from playground.conftest import ROOT, SCRIPT, SMALL, small_args

FLAGS = [*SMALL, "--env-id", "tests.playground.envs:Diary", "--total-timesteps", 32 * 400, "--checkpoint-interval", 7]


def start(*flags, cwd, xla_flags="--xla_backend_optimization_level=0", **variables):
    """Start the script as a user does."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, **variables}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=variables, **pipes)


def finish(process, status=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == status, out[-3000:]
    return out


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").glob("[!.]*")
    return found


def saved(run_dir) -> list[np.ndarray]:
    """Every array of a run's last checkpoint."""
    args = nfpo.from_json(nfpo.load_checkpoint(run_dir)["args"])
    learner = nfpo.make_learner(args, nfpo.FlowPolicy, nfpo.make_envs(args))
    state = nfpo.restore(run_dir, "state", *nfpo.describe_state(learner, nfpo.make_mesh(small_args())))
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def scalars(run_dir: Path) -> dict:
    """Every scalar in all event files of a run: {name: sorted [(step, value)]}."""
    points = {}
    for file in run_dir.glob("events.out.tfevents.*"):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
        for name in events.Tags()["scalars"]:
            points.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(values) for name, values in points.items()}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("never_killed")
    finish(start(*FLAGS, cwd=folder))
    return run_folder(folder)


def wait_for(condition, process):
    deadline = time.time() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_is_the_same_run(number, never_killed, tmp_path):
    """Networks, optimizer, statistics, simulator and random state are equal to the last bit; scalars appear once."""
    process = start(*FLAGS, cwd=tmp_path)

    def has_checkpoints():
        found = list((tmp_path / "runs").glob("*/checkpoint/[0-9]*"))
        return any(int(path.name) > 20 for path in found if path.name.isdigit())

    wait_for(has_checkpoints, process)
    process.send_signal(number)
    out = finish(process, -9 if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGTERM:
        assert "Stopped by SIGTERM and saved" in out and "--resume" in out
    run_dir = run_folder(tmp_path)
    assert nfpo.load_checkpoint(run_dir)["iteration"] < 400, "it was done before it was killed"
    finish(start("--resume", run_dir, cwd=tmp_path))
    ours, theirs = saved(run_dir), saved(never_killed)
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a, b)
    ours, theirs = scalars(run_dir), scalars(never_killed)
    assert len(theirs["losses/value_loss"]) == 400
    for name in theirs:
        assert name == "charts/SPS" or ours[name] == theirs[name], name
    finish(start("--evaluate", run_dir, "--eval-episodes", "1", cwd=tmp_path))


def test_killed_before_the_first_checkpoint(tmp_path):
    """A run folder with nothing but its arguments is resumed from the start."""
    process = start(*FLAGS, cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "runs").glob("[!.]*/args.json")), process)
    process.kill()
    process.communicate()
    run_dir = run_folder(tmp_path)
    assert not list(run_dir.glob("checkpoint/[0-9]*"))
    (run_dir / "checkpoint").mkdir(exist_ok=True)  # as it is from the start of the first iteration on
    finish(start("--resume", run_dir, cwd=tmp_path))
    assert nfpo.load_checkpoint(run_dir)["iteration"] == 400


def test_killed_while_writing_the_first_checkpoint(cli, lane_run, tmp_path):
    """What orbax had not finished is no checkpoint, although its name starts with a number: the run starts again."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    for path in (run_dir / "checkpoint").iterdir():
        path.rename(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))
    (run_dir / "checkpoint" / "2.orbax-checkpoint-tmp" / "_CHECKPOINT_METADATA").unlink()
    status, _, err = cli("--resume", run_dir)
    assert status == 0, err
    for a, b in zip(saved(run_dir), saved(lane_run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_extended_is_the_same_run(cli, lane_run, tmp_path):
    """A run of 2 iterations that is resumed up to 4 ends as one of 4, bit for bit, and knows that it is one."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    status, _, err = cli("--resume", run_dir, "--total-timesteps", 128)
    assert status == 0, err
    expected = nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=128))["run_dir"]
    assert nfpo.load_checkpoint(run_dir)["iteration"] == 4
    for a, b in zip(saved(run_dir), saved(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert nfpo.parse_args(["--resume", str(run_dir)]).total_timesteps == 128
    ours, theirs = (json.loads(Path(path, "args.json").read_text()) for path in (run_dir, expected))
    assert {**ours, "runs_dir": ""} == {**theirs, "runs_dir": ""}


def test_kept_checkpoints(cli, tmp_path):
    """--keep-interval saves and keeps checkpoints beside the newest, whatever interval is asked for later, and each can
    be evaluated."""
    args = small_args(runs_dir=str(tmp_path), total_timesteps=7 * 32, checkpoint_interval=100, keep_interval=3)
    run_dir = nfpo.train(args)["run_dir"]
    assert nfpo.saved_iterations(run_dir) == [3, 6, 7]
    assert cli("--resume", run_dir, "--total-timesteps", 11 * 32, "--keep-interval", 5)[0] == 0
    assert nfpo.saved_iterations(run_dir) == [3, 6, 10, 11]
    kept = f"{run_dir}/checkpoint/3"
    assert nfpo.load_checkpoint(kept)["global_step"] == 3 * 32
    status, out, err = cli("--evaluate", kept)
    assert status == 0 and "return" in out and not err, err
    assert nfpo.evaluate(kept) != nfpo.evaluate(run_dir)
    status, _, err = cli("--evaluate", f"{run_dir}/checkpoint/4")
    assert status == 2 and "checkpoint/4, which holds no checkpoint" in err


@pytest.mark.parametrize("impl, num_devices, warns", [("warp", 2, True), ("warp", 1, False), ("jax", 2, False)])
def test_warp_is_not_spread(impl, num_devices, warns, tmp_path, monkeypatch, capsys):
    """Whoever asks for several devices is told that MuJoCo Warp does not share the environments among them."""
    monkeypatch.setattr(nfpo, "choose_impl", lambda *_: impl)
    nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=32, num_devices=num_devices))
    assert ("each device simulates all environments" in capsys.readouterr().out) == warns


PARALLEL = {"num_envs": 8, "num_steps": 16, "total_timesteps": 256, "checkpoint_interval": 1}
PARALLEL_FLAGS = "--num-envs 8 --num-steps 16 --total-timesteps 256 --checkpoint-interval 1".split()


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_device")
    return Path(nfpo.train(small_args(runs_dir=str(folder), **PARALLEL))["run_dir"])


def assert_close(run_dir, expected) -> None:
    ours, theirs = saved(run_dir), saved(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_two_devices_are_as_one(one_device, tmp_path):
    """Two virtual devices give one device's result up to rounding, each holds half of the environments, and its
    state may be read by one."""
    assert jax.device_count() == 2
    args = small_args(runs_dir=str(tmp_path), num_devices=2, **PARALLEL)
    run_dir = nfpo.train(args)["run_dir"]
    assert_close(run_dir, one_device)
    learner, mesh = nfpo.make_learner(args, nfpo.FlowPolicy, nfpo.make_envs(args)), nfpo.make_mesh(args)
    state = nfpo.restore(run_dir, "state", *nfpo.describe_state(learner, mesh))
    assert {x.data.shape for x in state.env_state.data.addressable_shards} == {(4, 3)}
    assert {x.device for x in state.env_state.data.addressable_shards} == set(jax.devices())
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state.params))


def test_two_devices_share_the_work():
    """The compiled iteration computes half of the environments and half of each minibatch on each of two devices."""
    flops = []
    for num_devices in (1, 2):
        args = small_args(num_devices=num_devices, num_envs=64, hidden_dim=64, critic_hidden_dims=(64, 64))
        learner, mesh = nfpo.make_learner(args, nfpo.FlowPolicy, nfpo.make_envs(args)), nfpo.make_mesh(args)
        flops.append(nfpo.compile_iteration(learner, mesh).cost_analysis()["flops"])
    assert flops[1] < 0.6 * flops[0]


def run_two_processes(folder: Path, *flags) -> list[str]:
    """What two processes that find each other through jax.distributed print."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [*SMALL, *flags, *PARALLEL_FLAGS, "--distributed", "--coordinator", f"localhost:{port}"]
    processes = [start(*flags, "--num-processes", 2, "--process-id", rank, cwd=folder) for rank in range(2)]
    return [finish(process) for process in processes]


def test_two_processes_are_as_one(one_device, tmp_path):
    """Two processes give one process's result up to rounding."""
    outs = run_two_processes(tmp_path, "--env-id", "tests.playground.envs:Lane")
    assert "Last" in outs[0] and "Last" not in outs[1]
    assert_close(run_folder(tmp_path), one_device)


def test_two_processes_with_physics(tmp_path):
    """The second process can read the simulator's model, which Playground puts on the first one's device."""
    run_two_processes(tmp_path, "--env-id", "CartpoleBalance", "--impl", "jax")
    assert nfpo.load_checkpoint(run_folder(tmp_path))["iteration"] == 2
