"""Promise: a run that was ended goes on, with its episodes started anew and everything else where it was; several
processes train as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_isaacgym as nfpo

from .conftest import SCRIPT, SMALL, TWIN, environment, run, small_args

DRIVER = Path(__file__).parent / "distributed_driver.py"


def scalars(run_dir):
    """{name: [(step, value)]} of all event files together, nothing purged."""
    points = {}
    for file in sorted(Path(run_dir).glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), purge_orphaned_data=False).Reload()
        for name in events.Tags()["scalars"]:
            points.setdefault(name, []).extend((event.step, event.value) for event in events.Scalars(name))
    return {name: sorted(values) for name, values in points.items()}


@pytest.mark.parametrize("number, script", [(signal.SIGTERM, SCRIPT), (signal.SIGKILL, SCRIPT), (signal.SIGKILL, TWIN)])
def test_ended_and_resumed(number, script, tmp_path):
    """Ended from outside, continued with `--resume`: every iteration is logged once, and the optimizer went on."""
    flags = SMALL.replace("--hidden-dim 8", "") if script == TWIN else SMALL
    steps = 48 * 300
    command = f"--env-id cartpole {flags} --total-timesteps {steps} --checkpoint-interval 7 --normalize-obs".split()
    process = subprocess.Popen(
        [sys.executable, str(script), *command],
        cwd=str(tmp_path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    out = process.communicate()[0].decode()
    (run_dir,) = (tmp_path / "runs").iterdir()
    before = nfpo.load_checkpoint(run_dir)
    assert 1 <= before["iteration"] < 300, out
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM and f"--resume runs/{run_dir.name}" in out

    ended = run(script, f"--resume runs/{run_dir.name}", cwd=tmp_path)
    assert ended.status == 0 and "episodes start anew" in ended.out, ended
    after = nfpo.load_checkpoint(run_dir)
    assert after["iteration"] == 300 and after["global_step"] == steps
    assert after["optimizer"]["state"][0]["step"] == 300 * 4  # 2 epochs of 2 minibatches
    counts = [x["processes"][0]["collector"]["stats"][0]["count"].item() for x in (before, after)]
    resets = 2 if counts[1] > 0 else 0  # each session observes its reset as well
    assert counts[1] == pytest.approx(8 * (6 * 300 + resets), abs=1)
    points = scalars(run_dir)
    assert [step for step, _ in points["losses/policy_loss"]] == [48 * i for i in range(1, 301)]
    assert "episode/rew_alive" in points and "charts/episodic_return" in points
    ended = run(script, f"--evaluate runs/{run_dir.name} --eval-episodes 0 --export-jit policy.pt", cwd=tmp_path)
    assert ended.status == 0 and (tmp_path / "policy.pt").exists(), ended


def test_resumed_weights_are_the_checkpoint(tmp_path, monkeypatch):
    """Before its first update, a resumed run has exactly what was saved."""
    args = small_args(runs_dir=str(tmp_path), total_timesteps=48 * 4, normalize_obs=True)
    run_dir = nfpo.train(args)["run_dir"]
    saved, seen = nfpo.load_checkpoint(run_dir), {}

    def look(collector, sample, critic, num_steps):
        seen.update(critic=critic.state_dict(), stats=collector.stats(), random=torch.get_rng_state())
        seen.update(envs=collector.envs.state_dict())
        raise KeyboardInterrupt

    raw = torch.load(str(Path(run_dir) / "checkpoint.pt"), weights_only=True)
    raw["processes"][0]["collector"]["envs"]["command_ranges"] = {"lin_vel_x": [-2.0, 3.0]}
    nfpo.save_checkpoint(Path(run_dir) / "checkpoint.pt", raw)
    monkeypatch.setattr(nfpo, "collect_rollout", look)
    with pytest.raises(KeyboardInterrupt):
        nfpo.train(nfpo.parse_args(["--resume", run_dir, "--total-timesteps", "480"]))
    assert all(torch.equal(seen["critic"][name], value) for name, value in saved["critic"].items())
    count = saved["processes"][0]["collector"]["stats"][0]["count"].item()
    assert seen["stats"][0]["count"].item() == pytest.approx(count + 8)  # the new first observations
    assert seen["envs"]["command_ranges"] == {"lin_vel_x": [-2.0, 3.0]}  # what a curriculum had reached


def test_a_run_can_be_trained_longer(tmp_path, monkeypatch):
    """A run of 2 iterations that is resumed for 4 ends as one that was started for 4 and interrupted after 2."""
    flags = {"normalize_obs": True, "checkpoint_interval": 1}
    started = nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=2 * 48, **flags))["run_dir"]
    right, rollouts = nfpo.collect_rollout, []

    def interrupt(*args):
        rollouts.append(1)
        if len(rollouts) == 3:
            raise KeyboardInterrupt
        return right(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nfpo, "collect_rollout", interrupt)
        nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=4 * 48, **flags))
    (interrupted,) = [path for path in tmp_path.iterdir() if str(path) != started]
    nfpo.train(nfpo.parse_args(["--resume", str(interrupted)]))
    nfpo.train(nfpo.parse_args(["--resume", started, "--total-timesteps", str(4 * 48)]))

    longer, whole = nfpo.load_checkpoint(started), nfpo.load_checkpoint(interrupted)
    for name in ("iteration", "global_step", "recent_returns"):
        assert longer[name] == whole[name]
    assert longer["args"] == {**whole["args"], "resume": started}
    for part in ("policy", "critic"):
        assert all(torch.equal(longer[part][name], value) for name, value in whole[part].items())
    assert [step for step, _ in scalars(started)["losses/policy_loss"]] == [48, 96, 144, 192]
    assert json.loads((Path(started) / "args.json").read_text())["total_timesteps"] == 192
    assert not (Path(started) / "args.tmp").exists()
    again = nfpo.train(nfpo.parse_args(["--resume", started]))  # the new number is the run's own
    assert again["global_step"] == 192


def test_kept_checkpoints(tmp_path, cli):
    """`--keep-interval` keeps checkpoints beside the newest, to evaluate and export, and may differ when resuming."""
    flags = "--total-timesteps 240 --checkpoint-interval 100 --keep-interval 2"
    assert cli(f"--env-id pointmass {SMALL} {flags}").status == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    names = lambda: {path.name for path in run_dir.glob("checkpoint*")}  # noqa: E731
    assert names() == {"checkpoint.pt", "checkpoint-96.pt", "checkpoint-192.pt"}
    files = [run_dir / name for name in ("checkpoint-96.pt", "checkpoint-192.pt", "checkpoint.pt")]
    states = [nfpo.load_checkpoint(file) for file in files]
    assert [state["global_step"] for state in states] == [96, 192, 240]
    returns = [nfpo.evaluate(file, eval_episodes=3, device="cpu") for file in files]
    assert returns[0] != returns[1] != returns[2]
    assert cli(f"--evaluate {files[0]} --eval-episodes 0 --export-jit policy.pt").status == 0
    policy = nfpo.make_policy(nfpo.FlowPolicy, 6, 2, nfpo.Args(**states[0]["args"]))
    policy.load_state_dict(states[0]["policy"])
    obs = torch.ones(1, 6)
    expected = policy.sample(obs, temperature=0.0)[0]
    assert torch.allclose(torch.jit.load(str(tmp_path / "policy.pt"))(obs), expected, atol=1e-6)
    assert cli(f"--resume {run_dir} --total-timesteps 480 --keep-interval 5").status == 0
    assert names() == {"checkpoint.pt", "checkpoint-96.pt", "checkpoint-192.pt", "checkpoint-480.pt"}


@pytest.mark.parametrize("env_id", ["cartpole", "isaacgymenvs:Cartpole"])
def test_configuration_of_the_task(env_id, tmp_path, monkeypatch):
    """The run's folder has the configuration that the task was made with, the script's changes included."""
    monkeypatch.setattr(nfpo, "check_isaacgymenvs", lambda *_: None)
    args = small_args(env_id=env_id, runs_dir=str(tmp_path), total_timesteps=48, randomize=False)
    found = json.loads((Path(nfpo.train(args)["run_dir"]) / "env_cfg.json").read_text())
    if env_id == "cartpole":
        assert found["control"] == {"action_scale": 0.25} and found["env"] == {"num_envs": 8}
        assert found["init_state"] == {"default_joint_angles": {"pole": 0.0}}
        assert found["noise"] == {"add_noise": False} and found["domain_rand"]["push_interval"] == 250.0
    else:
        assert found["env"] == {"numEnvs": 8, "clipActions": 1.0} and found["sim"] == {"gravity": [0.0, -9.81]}


def test_configurations_of_any_kind_are_written():
    """No value in a configuration costs anybody the run at its start."""
    values = {"integer": np.int64(3), "scalar": torch.tensor(2.0), "range": range(2), "path": Path("a")}
    found = json.loads(json.dumps(values, default=nfpo.plain))
    assert found == {"integer": 3, "scalar": 2.0, "range": [0, 1], "path": "a"}


def test_two_processes_train_as_one(tmp_path):
    """torchrun: equal parameters and statistics in both after every iteration, different episodes."""
    torchrun = ("-m torch.distributed.run --nproc_per_node=2 --master_port", str(20000 + os.getpid() % 10000))
    ended = run(*torchrun, DRIVER, cwd=tmp_path)
    assert ended.status == 0 and ended.out.count("iterations agree") == 2, ended
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint = nfpo.load_checkpoint(run_dir)
    assert checkpoint["global_step"] == 3 * 2 * 48 and len(checkpoint["processes"]) == 2
    assert len(scalars(run_dir)["losses/policy_loss"]) == 3
    ended = run(f"--resume {run_dir}", cwd=tmp_path)
    assert ended.status == 2 and "2 processes" in ended.err

    # And longer: both processes take the new number, one of them writes it down.
    ended = run(*torchrun, SCRIPT, f"--resume {run_dir} --total-timesteps 480", cwd=tmp_path)
    assert ended.status == 0, ended
    checkpoint = nfpo.load_checkpoint(run_dir)
    assert checkpoint["global_step"] == 5 * 2 * 48 == checkpoint["args"]["total_timesteps"]
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 480
    ended = run(*torchrun, SCRIPT, f"--resume {run_dir} --total-timesteps 479", cwd=tmp_path)
    assert ended.status != 0 and "--total-timesteps is 479, allowed is at least the 480 steps" in ended.err


def test_tracking_offline(tmp_path, monkeypatch):
    """`--track` writes a Weights & Biases run without an account."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ended = run(f"--env-id cartpole {SMALL} --total-timesteps 96 --track", cwd=tmp_path)
    assert ended.status == 0, ended
    assert list(tmp_path.glob("runs/*/wandb/offline-run-*"))
