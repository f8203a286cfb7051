"""Promise: a run that was ended goes on, with its episodes started anew and everything else where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_isaacgym as nfpo

from .conftest import SCRIPT, SMALL, assert_one_line, environment, run, small_args


def scalars(run_dir):
    """{name: [(step, value)]} as TensorBoard shows them."""
    events = EventAccumulator(str(run_dir)).Reload()
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_killed_and_resumed(tmp_path):
    """Killed from outside, continued with `--resume`: every iteration is logged once, and the optimizer went on."""
    steps = 48 * 100
    command = f"--env-id cartpole {SMALL} --total-timesteps {steps} --checkpoint-interval 7 --normalize-obs".split()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, "--exp-name", "a name"],
        cwd=str(tmp_path),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.time() + 120
    while not list(tmp_path.glob("runs/*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    out = process.communicate()[0].decode()
    (run_dir,) = (tmp_path / "runs").iterdir()
    before = nfpo.load_checkpoint(run_dir)
    assert 48 <= before["global_step"] < steps, out
    ended = run("--resume", f"runs/{run_dir.name}", cwd=tmp_path, split=False)
    assert ended.status == 0 and "new ones start" in ended.out, ended
    assert f"--evaluate 'runs/{run_dir.name}'" in ended.out  # a shell takes the name with its space for one
    after = nfpo.load_checkpoint(run_dir)
    assert (
        after["global_step"] == steps and after["optimizer"]["state"][0]["step"] == 100 * 4
    )  # 2 epochs, 2 minibatches
    assert after["agent"]["obs_stats.count"].item() == pytest.approx(8 * 6 * 100, abs=1e-3)
    points = scalars(run_dir)
    assert [step for step, _ in points["losses/policy_loss"]] == [48 * i for i in range(1, 101)]
    assert {"episode/rew_alive", "charts/episodic_return", "charts/broken_episodes", "flow/log_det"} <= set(points)


def test_resumed_is_the_checkpoint(tmp_path, monkeypatch):
    """Before its first update, a resumed run has exactly what was saved, the task's curriculum included."""
    args = small_args(runs_dir=str(tmp_path), total_timesteps=48 * 4, normalize_obs=True, desired_kl=1e-9)
    run_dir = nfpo.train(args)["run_dir"]
    state = torch.load(str(Path(run_dir) / "checkpoint.pt"), weights_only=True)
    state["curriculum"]["command_ranges"] = {"lin_vel_x": [-2.0, 3.0]}
    nfpo.save_checkpoint(Path(run_dir) / "checkpoint.pt", state)
    seen = {}

    def look(agent, envs, act, args):
        seen.update(agent=agent.state_dict(), ranges=envs.env.command_ranges, counter=envs.env.common_step_counter)
        raise KeyboardInterrupt

    def update(agent, optimizer, *_):
        seen["optimizer"] = optimizer.state_dict()
        raise KeyboardInterrupt

    resumed = small_args(runs_dir=str(tmp_path), total_timesteps=480, normalize_obs=True, resume=run_dir, desired_kl=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nfpo, "collect_rollout", look)
        nfpo.train(resumed)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nfpo, "ppo_update", update)
        nfpo.train(resumed)
    assert seen["ranges"] == {"lin_vel_x": [-2.0, 3.0]} and seen["counter"] > 24
    assert all(torch.equal(seen["agent"][name], value) for name, value in state["agent"].items())
    assert seen["optimizer"]["param_groups"][0]["lr"] == state["optimizer"]["param_groups"][0]["lr"] < 1e-3
    for name, value in state["optimizer"]["state"][0].items():
        assert torch.equal(seen["optimizer"]["state"][0][name], value)


def test_flags_override_the_runs_own(tmp_path, cli):
    """Beside --resume, a flag that is given counts, all others are the run's; a shape that no longer fits is named."""
    assert cli(f"--env-id pointmass {SMALL} --total-timesteps 96 --ent-coef 0.1").status == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert cli(f"--resume {run_dir} --total-timesteps 192 --learning-rate 0.002").status == 0
    state = nfpo.load_checkpoint(run_dir)
    args = state["args"]
    assert (state["global_step"], args.learning_rate, args.ent_coef, args.hidden_dim) == (192, 0.002, 0.1, 8)
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.002
    assert nfpo.train(nfpo.dataclasses.replace(args, resume=str(run_dir)))["global_step"] == 192  # nothing left to do
    for flags in ("--hidden-dim 9", "--env-id cartpole"):
        for command in ("--resume", "--evaluate"):
            assert_one_line(cli(f"{command} {run_dir} {flags}"), run_dir, "size mismatch")
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 192


def test_kept_checkpoints(tmp_path, cli):
    """`--keep-interval` keeps checkpoints beside the newest, to evaluate and to resume."""
    flags = "--total-timesteps 240 --checkpoint-interval 100 --keep-interval 2"
    assert cli(f"--env-id pointmass {SMALL} {flags}").status == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    names = {path.name for path in run_dir.glob("checkpoint*")}
    assert names == {"checkpoint.pt", "checkpoint-96.pt", "checkpoint-192.pt"}
    files = [run_dir / name for name in ("checkpoint-96.pt", "checkpoint-192.pt", "checkpoint.pt")]
    assert [nfpo.load_checkpoint(file)["global_step"] for file in files] == [96, 192, 240]
    returns = [nfpo.evaluate(file, eval_episodes=3) for file in files]
    assert returns[0] != returns[1] != returns[2]


def test_a_checkpoint_is_whole(tmp_path, monkeypatch):
    """Whatever interrupts the writing of a checkpoint, the last one is there."""
    run_dir = nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=48))["run_dir"]

    def interrupted(checkpoint, path):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", interrupted)
        nfpo.train(small_args(total_timesteps=96, resume=run_dir))
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 48


def test_one_process_per_run(tmp_path, cli):
    """The second process that resumes a run is refused, and neither log nor checkpoint is touched."""
    run_dir = Path(nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=48))["run_dir"])
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    with FileLock(str(run_dir / ".lock")):
        assert_one_line(cli(f"--resume {run_dir} --total-timesteps 96"), run_dir, "another process")
        assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    assert cli(f"--resume {run_dir} --total-timesteps 96").status == 0


DRIVER = """
import sys
sys.path.insert(0, {root!r})
import nfpo_isaacgym as nfpo
import torch, torch.distributed as dist
right = nfpo.ppo_update

def update_and_compare(agent, optimizer, args, rollout, gradient_fn):
    metrics = right(agent, optimizer, args, rollout, gradient_fn)
    everyone = [None, None]
    numbers = optimizer.param_groups[0]["lr"], metrics["losses/approx_kl"]
    dist.all_gather_object(everyone, (agent.state_dict(), numbers, rollout[0]))
    (first, numbers, obs), (second, other_numbers, other_obs) = everyone
    assert numbers == other_numbers and not torch.equal(obs, other_obs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = len(first) and 2 * 48 * (1 + len(seen))
    seen.append(1)
    assert abs(first["obs_stats.count"].item() - rows) < 1e-3
    return metrics

seen, nfpo.ppo_update = [], update_and_compare
small = dict(num_envs=8, num_steps=6, num_minibatches=2, update_epochs=2, hidden_dim=8, compile=False, device="cpu")
nfpo.train(nfpo.Args(env_id="cartpole", normalize_obs=True, desired_kl=0.01, total_timesteps=3 * 2 * 48, **small))
assert len(seen) == 3
"""


def test_two_processes_train_as_one(tmp_path):
    """torchrun: equal parameters, statistics and learning rates in both after every iteration, different episodes; the
    run goes on with one process as well."""
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(SCRIPT.parent)))
    torchrun = ("-m torch.distributed.run --nproc_per_node=2 --master_port", str(20000 + os.getpid() % 10000))
    ended = run(*torchrun, "driver.py", cwd=tmp_path)
    assert ended.status == 0, ended
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 3 * 2 * 48
    assert [step for step, _ in scalars(run_dir)["losses/policy_loss"]] == [96, 192, 288]
    metrics = nfpo.train(small_args(total_timesteps=384, resume=str(run_dir), normalize_obs=True))
    assert metrics["global_step"] == 384
