"""Promise: a run that is killed and resumed ends as one that never was, bit for bit."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import nfpo_playground_jax as nfpo
from playground.conftest import FLAGS, finish, run_folder, saved, scalars, small_args, start, steps_in, wait_for

LONG = [*FLAGS, "--env-id", "tests.playground.envs:Diary", "--total-timesteps", 32 * 120, "--checkpoint-interval", 7]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("never_killed")
    finish(start(*LONG, cwd=folder))
    return run_folder(folder)


def test_killed_and_resumed_is_the_same_run(never_killed, tmp_path):
    """Networks, optimizer, statistics, simulator and random state are equal to the last bit; scalars appear once."""
    process = start(*LONG, cwd=tmp_path)

    def has_checkpoints():
        found = list((tmp_path / "runs").glob("*/checkpoint/[0-9]*"))
        return any(int(path.name) > 20 * 32 for path in found if path.name.isdigit())

    wait_for(has_checkpoints, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process, -9)
    run_dir = run_folder(tmp_path)
    assert nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy)["global_step"] < 120 * 32, "it was done before it was killed"
    finish(start("--resume", run_dir, cwd=tmp_path))
    flags = {"env_id": "tests.playground.envs:Diary", "total_timesteps": 32 * 120, "checkpoint_interval": 7}
    ours, theirs = saved(run_dir, **flags), saved(never_killed, **flags)
    assert len(theirs) > 40
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    ours, theirs = scalars(run_dir), scalars(never_killed)
    assert [step for step, _ in theirs["losses/value_loss"]] == list(range(32, 121 * 32, 32))
    for name in theirs:
        assert name == "charts/SPS" or ours[name] == theirs[name], name
    assert steps_in(run_dir / "checkpoint") == [120 * 32]


def test_extended_is_the_same_run(cli, lane_run, tmp_path):
    """A run of 2 iterations that is resumed up to 4 ends as one of 4, bit for bit, and knows that it is one."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    status, _, err = cli("--resume", run_dir, "--total-timesteps", 128)
    assert status == 0, err
    expected = nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=128))["run_dir"]
    for a, b in zip(saved(run_dir), saved(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    ours, theirs = (nfpo.load_checkpoint(path, nfpo.FlowPolicy) for path in (run_dir, expected))
    assert ours["args"] | {"runs_dir": "", "resume": ""} == theirs["args"] | {"runs_dir": "", "resume": ""}
    assert ours["returns"] == theirs["returns"]


def test_flags_override_those_of_the_run(cli, lane_run, tmp_path):
    """A resumed run may get another learning rate; what no longer fits is one line."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    status, out, err = cli("--resume", run_dir, "--total-timesteps", 96, "--learning-rate", 0.1, "--gamma", 0.5)
    assert status == 0, err
    args = nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy)["args"]
    assert (args["learning_rate"], args["gamma"], args["hidden_dim"]) == (0.1, 0.5, 8)
    for flags in (["--hidden-dim", 16], ["--num-flow-layers", 3], ["--num-envs", 8]):
        status, _, err = cli("--resume", run_dir, "--total-timesteps", 640, *flags)
        assert status == 2 and len(err.strip().splitlines()) == 1 and str(run_dir) in err and "fits" in err, err


def test_a_second_process_is_refused(cli, lane_run, tmp_path):
    """While one process writes to a run, another gets one line, and the run stays as it is."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    before = sorted(run_dir.rglob("*"))
    with FileLock(run_dir / ".lock-0"):
        status, _, err = cli("--resume", run_dir, "--total-timesteps", 96)
    assert status == 2 and len(err.strip().splitlines()) == 1 and ".lock" in err, err
    assert sorted(run_dir.rglob("*")) == before
    assert cli("--resume", run_dir, "--total-timesteps", 96)[0] == 0


def test_what_orbax_had_not_finished_is_no_checkpoint(cli, lane_run, tmp_path):
    """A checkpoint half written is not read, although its name starts with a number; alone it is a line."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    (run_dir / "checkpoint" / "96.orbax-checkpoint-tmp-5").mkdir()
    assert nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy)["global_step"] == 64
    (run_dir / "checkpoint" / "64").rename(run_dir / "checkpoint" / "64.orbax-checkpoint-tmp-3")
    status, _, err = cli("--resume", run_dir)
    assert status == 2 and len(err.strip().splitlines()) == 1 and "holds no whole checkpoint" in err, err


def test_kept_checkpoints(cli, tmp_path):
    """--keep-interval keeps checkpoints beside the newest, whatever interval is asked for later, and each is played."""
    args = small_args(runs_dir=str(tmp_path), total_timesteps=7 * 32, checkpoint_interval=100, keep_interval=3)
    run_dir = Path(nfpo.train(args)["run_dir"])
    assert steps_in(run_dir / "kept") == [3 * 32, 6 * 32] and steps_in(run_dir / "checkpoint") == [7 * 32]
    assert cli("--resume", run_dir, "--total-timesteps", 11 * 32, "--keep-interval", 5)[0] == 0
    assert steps_in(run_dir / "kept") == [3 * 32, 6 * 32, 10 * 32]
    kept = run_dir / "kept" / "96"
    assert nfpo.load_checkpoint(kept, nfpo.FlowPolicy)["global_step"] == 3 * 32
    assert nfpo.evaluate(kept) != nfpo.evaluate(run_dir)
    status, _, err = cli("--evaluate", run_dir / "kept" / "128")
    assert status == 2 and "kept/128" in err


def test_learning_rate_is_annealed_over_the_whole_run(tmp_path):
    """--anneal-lr takes the first iteration's full rate down by equal steps."""
    run_dir = nfpo.train(small_args(runs_dir=str(tmp_path), total_timesteps=128, anneal_lr=True))["run_dir"]
    rates = [rate for _, rate in scalars(Path(run_dir))["charts/learning_rate"]]
    assert rates == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])
