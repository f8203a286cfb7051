"""Promise: a run that was ended goes on, with its episodes started anew and everything else where it was; several
processes train as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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

    text = (Path(run_dir) / "args.json").read_text()
    (Path(run_dir) / "args.json").write_text(text.replace('"total_timesteps": 192', '"total_timesteps": 480'))
    raw = torch.load(str(Path(run_dir) / "checkpoint.pt"), weights_only=True)
    raw["args"]["total_timesteps"] = 480
    raw["processes"][0]["collector"]["envs"]["command_ranges"] = {"lin_vel_x": [-2.0, 3.0]}
    nfpo.save_checkpoint(Path(run_dir) / "checkpoint.pt", raw)
    monkeypatch.setattr(nfpo, "collect_rollout", look)
    with pytest.raises(KeyboardInterrupt):
        nfpo.train(nfpo.parse_args(["--resume", run_dir]))
    assert all(torch.equal(seen["critic"][name], value) for name, value in saved["critic"].items())
    count = saved["processes"][0]["collector"]["stats"][0]["count"].item()
    assert seen["stats"][0]["count"].item() == pytest.approx(count + 8)  # the new first observations
    assert seen["envs"]["command_ranges"] == {"lin_vel_x": [-2.0, 3.0]}  # what a curriculum had reached


def test_two_processes_train_as_one(tmp_path):
    """torchrun: equal parameters and statistics in both after every iteration, different episodes."""
    ended = run(
        "-m torch.distributed.run --nproc_per_node=2 --master_port",
        str(20000 + os.getpid() % 10000),
        DRIVER,
        cwd=tmp_path,
    )
    assert ended.status == 0 and ended.out.count("iterations agree") == 2, ended
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint = nfpo.load_checkpoint(run_dir)
    assert checkpoint["global_step"] == 3 * 2 * 48 and len(checkpoint["processes"]) == 2
    assert len(scalars(run_dir)["losses/policy_loss"]) == 3
    ended = run(f"--resume {run_dir}", cwd=tmp_path)
    assert ended.status == 2 and "2 processes" in ended.err


def test_tracking_offline(tmp_path, monkeypatch):
    """`--track` writes a Weights & Biases run without an account."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ended = run(f"--env-id cartpole {SMALL} --total-timesteps 96 --track", cwd=tmp_path)
    assert ended.status == 0, ended
    assert list(tmp_path.glob("runs/*/wandb/offline-run-*"))
