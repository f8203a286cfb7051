"""Promise: a run that is killed at any moment and resumed ends as one that never was, bit for bit."""

import os
import random
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from conftest import SMALL, SMALL_ARGS, assert_one_line, differences, finish, run_folders, scalars, start, wait_for
from filelock import FileLock

import nfpo_continuous_action as nfpo

TASKS = [
    f"{name}-{version}"
    for name in (
        "Ant HalfCheetah Hopper Humanoid HumanoidStandup InvertedDoublePendulum InvertedPendulum Pusher Reacher Swimmer"
        " Walker2d"
    ).split()
    for version in ("v4", "v5")
    if (name, version) != ("Pusher", "v4")  # Gymnasium cannot make it on MuJoCo 3 and later
]


def readable(envs_state: dict) -> dict:
    """What environments' saved state holds, the simulator's numbers instead of its bytes, which hold timers too."""
    simulators = []
    for packed, *rest in envs_state["_extra_state"]:
        data = mujoco.MjData.__new__(mujoco.MjData)
        data.__setstate__(zlib.decompress(packed.numpy().tobytes()))
        names = "time qpos qvel act ctrl qacc_warmstart xpos xipos cinert cvel cfrc_ext qfrc_actuator".split()
        simulators.append([*(torch.tensor(getattr(data, name)) for name in names), *rest])
    return {**envs_state, "_extra_state": simulators}


def make(env_id: str, seed: int = 5, **flags) -> nfpo.Environments:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is out of date
        return nfpo.make_envs(nfpo.Args(env_id=env_id, **flags), 2, seed)


def play(envs: nfpo.Environments, actions: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """Everything the steps return and what the policy sees next, and the number of episodes that ended."""
    seen, ends = [], 0
    for action in actions:
        seen += [*envs.step(action), envs.obs]
        ends += seen[-3].sum().item()
    return seen, ends


@pytest.mark.parametrize("env_id", TASKS)
def test_state_restores(env_id, tmp_path):
    """A state taken in mid-episode continues bit for bit in new environments, through ends and resets."""
    envs, copy = make(env_id), make(env_id, seed=99)
    # Hard actions that change at every step, as a fresh policy's do, and a restore in mid-episode, in mid-motion.
    low, high = torch.from_numpy(envs.low), torch.from_numpy(envs.high)
    actions = low + (high - low) * torch.rand(100, 2, len(low), generator=torch.Generator().manual_seed(3))
    play(envs, actions[:7])
    for env in envs.envs.envs:  # a time limit 30 steps ahead, so that tasks without a fall end an episode too
        env.set_wrapper_attr("_elapsed_steps", env.spec.max_episode_steps - 30)
    torch.save(envs.state_dict(), tmp_path / "state.pt")
    expected, ends = play(envs, actions[7:])
    play(copy, actions[:3])  # whatever it did before must not show
    copy.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    restored, _ = play(copy, actions[7:])
    assert ends > 0, "no episode ended, so the reset was not tested"
    assert differences(restored, expected) == []
    assert differences(readable(copy.state_dict()), readable(envs.state_dict())) == []


RUN = {**SMALL_ARGS, "env_id": "Hopper-v4", "num_steps": 64, "checkpoint_interval": 2}
FLAGS = "--env-id Hopper-v4 --num-envs 2 --num-steps 64 --num-minibatches 2 --update-epochs 1".split()
FLAGS += "--no-compile --checkpoint-interval 2".split()


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Checkpoints equal to the last bit, scalars equal, each point once."""
    ours, theirs = nfpo.load_checkpoint(run_dir), nfpo.load_checkpoint(expected)
    for checkpoint in (ours, theirs):
        del checkpoint["args"], checkpoint["run_dir"]
        checkpoint["envs"] = readable(checkpoint["envs"])
    assert differences(ours, theirs) == []
    points = scalars(run_dir)
    for name, values in scalars(expected).items():
        if name != "charts/SPS":
            assert points[name] == values, name


def break_in(iteration: int, monkeypatch, args: nfpo.Args) -> Path:
    """Train until an iteration is computed and logged, but not saved, as a kill may hit it."""

    class Killed(Exception):
        pass

    def update(*inputs):
        updates.append(1)
        if len(updates) == iteration:
            raise Killed
        return ppo_update(*inputs)

    ppo_update, updates = nfpo.ppo_update, []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(nfpo, "ppo_update", update)
        nfpo.train(args)
    (run_dir,) = Path(args.runs_dir).iterdir()
    return run_dir


@pytest.fixture(scope="module")
def never_killed(train_small) -> Path:
    """A run of 16 iterations that nobody killed."""
    return train_small(**{**RUN, "total_timesteps": 128 * 16})


def kill(folder: Path, *flags, delay: float) -> Path:
    """Start a run and kill it -9 some moment after it wrote a checkpoint; returns its folder."""
    process = start(*flags, "--total-timesteps", 128 * 16, cwd=folder)
    files = [folder / "runs" / path.name / "checkpoint.pt" for path in run_folders(folder)]
    written = {file: file.stat().st_mtime_ns for file in files}
    wait_for(lambda: any(written.get(x) != x.stat().st_mtime_ns for x in folder.glob("runs/*/checkpoint.pt")), process)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    ended = finish(process)
    assert ended.status == -signal.SIGKILL, f"it was over before the kill: {ended}"
    return run_folders(folder)[0]


def test_killed_and_resumed(never_killed, cli):
    """Killed twice with -9, at random moments, and resumed, a run equals one never killed."""
    random.seed(os.getpid())
    delays = random.uniform(0, 0.3), random.uniform(0, 0.3)
    print("killed after", delays)
    run_dir = kill(cli.folder, *FLAGS, delay=delays[0])
    kill(cli.folder, "--resume", run_dir, delay=delays[1])
    assert 0 < nfpo.load_checkpoint(run_dir)["global_step"] < 128 * 16
    ended = cli("--resume", run_dir)
    assert ended.status == 0 and "new ones have started" not in ended.out, ended
    assert run_folders(cli.folder) == [run_dir]
    assert_same_run(run_dir, never_killed)


def test_lost_iterations_are_logged_once(monkeypatch, tmp_path, train_small):
    """What was logged after the checkpoint and is computed again is in TensorBoard's view once."""
    length = {**RUN, "total_timesteps": 128 * 5}
    run_dir = break_in(5, monkeypatch, nfpo.Args(runs_dir=str(tmp_path), **{**length, "checkpoint_interval": 3}))
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 128 * 4
    (run_dir / "checkpoint.pt").unlink()
    shutil.copy(train_small(**{**length, "keep_interval": 2}) / "checkpoint-256.pt", run_dir / "checkpoint.pt")
    time.sleep(1)  # TensorBoard reads event files in the order of the second they were made in
    nfpo.train(nfpo.Args(resume=str(run_dir), **length))
    steps = [step for step, _ in scalars(run_dir, purge=False)["losses/value_loss"]]
    assert len(steps) == 4 + 3 and len(set(steps)) == 5
    assert_same_run(run_dir, train_small(**length))


def test_trained_longer(cli, train_small):
    """A run whose learning rate is not annealed may be continued beyond its end, and equals one that was longer."""
    short = train_small(**{**RUN, "total_timesteps": 128 * 2, "anneal_lr": False})
    assert cli("--resume", short, "--total-timesteps", 128 * 5).status == 0
    assert_same_run(short, train_small(**{**RUN, "total_timesteps": 128 * 5, "anneal_lr": False}))
    assert cli("--resume", short).status == 0  # and a run that is over has nothing to do
    assert nfpo.load_checkpoint(short)["args"].total_timesteps == 128 * 5


def test_flags_override_the_runs_own(cli, hopper_copy):
    """What is given beside --resume counts, what is not is the run's own."""
    ended = cli("--resume", hopper_copy, "--total-timesteps", 256, "--learning-rate", 0.001, "--no-anneal-lr")
    assert ended.status == 0, ended
    args = nfpo.load_checkpoint(hopper_copy)["args"]
    assert (args.learning_rate, args.num_steps, args.env_id) == (0.001, 32, "Hopper-v4")
    rates = [value for _, value in scalars(hopper_copy)["charts/learning_rate"]]
    assert rates == pytest.approx([3e-4, 1.5e-4, 1e-3, 1e-3])


def test_another_number_of_environments(cli, hopper_copy):
    """Their episodes start again, which is said."""
    ended = cli("--resume", hopper_copy, "--total-timesteps", 512, "--num-envs", 4)
    assert ended.status == 0 and ended.out.count("new ones have started") == 1, ended
    assert nfpo.load_checkpoint(hopper_copy)["global_step"] == 512


def test_kept_checkpoints(cli, tmp_path, train_small):
    """Every second iteration's checkpoint stays, can be played and continued, and is that of a run of that length."""
    flags = [*FLAGS, "--no-anneal-lr", "--checkpoint-interval", 3]
    assert cli(*flags, "--total-timesteps", 128 * 5, "--keep-interval", 2).status == 0
    (run_dir,) = run_folders(tmp_path)
    assert {file.name for file in run_dir.glob("*.pt")} == {"checkpoint.pt", "checkpoint-256.pt", "checkpoint-512.pt"}
    assert not list(run_dir.glob("*.tmp"))
    kept, last = nfpo.load_checkpoint(run_dir / "checkpoint-256.pt"), nfpo.load_checkpoint(run_dir)
    expected = nfpo.load_checkpoint(train_small(**{**RUN, "total_timesteps": 128 * 2, "anneal_lr": False}))
    assert kept["global_step"] == 256
    for part in ("agent", "optimizer", "random"):
        assert differences(kept[part], expected[part]) == [], part
    assert differences(readable(kept["envs"]), readable(expected["envs"])) == []
    assert cli("--evaluate", run_dir / "checkpoint-256.pt", "--eval-episodes", 1).status == 0
    assert cli("--resume", run_dir / "checkpoint-256.pt").status == 0
    again = nfpo.load_checkpoint(run_dir)
    for part in ("agent", "optimizer", "random"):
        assert differences(again[part], last[part]) == [], part


@pytest.mark.parametrize(
    "flags",
    [
        ["--env-id", "Pendulum-v1"],
        ["--env-id", "tests.envs:CommandedHopper-v0"],  # keeps more than the simulator's state
        ["--env-id", "tests.envs:WrappedHopper-v0"],  # so does its wrapper
        ["--env-id", "Hopper-v4", "--async-envs"],
    ],
    ids=lambda flags: flags[-1],
)
def test_other_environments_restart_their_episodes(flags, cli):
    """What cannot be restored within an episode starts it again and says so once, and goes on with the rest."""
    assert cli(*SMALL, *flags).status == 0
    (run_dir,) = run_folders(cli.folder)
    ended = cli("--resume", run_dir, "--total-timesteps", 256)
    assert ended.status == 0 and ended.out.count("new ones have started") == 1 and flags[1] in ended.out
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 256


def test_new_episodes_are_others(cli, monkeypatch):
    """Where episodes start again, they are not those that the run began with."""
    assert cli(*SMALL, "--env-id", "Pendulum-v1").status == 0
    (run_dir,) = run_folders(cli.folder)
    first = []
    collect = nfpo.collect_rollout
    monkeypatch.setattr(nfpo, "collect_rollout", lambda *inputs: (first.append(inputs[1].obs), collect(*inputs))[1])
    assert cli(*SMALL, "--env-id", "Pendulum-v1", "--runs-dir", "again").status == 0
    assert cli("--resume", run_dir, "--total-timesteps", 256).status == 0
    assert not torch.equal(first[0], first[2])


def test_second_process_is_refused(cli, hopper_copy):
    """While one process trains a run, another gets one line and changes nothing."""
    before = {file.name: file.read_bytes() for file in hopper_copy.iterdir() if file.name != ".lock"}
    with FileLock(hopper_copy / ".lock"):
        assert_one_line(cli("--resume", hopper_copy, "--total-timesteps", 256), hopper_copy, "lock")
        assert {file.name: file.read_bytes() for file in hopper_copy.iterdir() if file.name != ".lock"} == before
    assert cli("--resume", hopper_copy, "--total-timesteps", 256).status == 0


def test_a_training_run_is_locked(monkeypatch, tmp_path):
    """And it is the training that holds the lock, from its first iteration on."""
    locked = []

    def update(*inputs):
        (run_dir,) = tmp_path.iterdir()
        with pytest.raises(TimeoutError):
            FileLock(run_dir / ".lock").acquire(timeout=0)
        locked.append(run_dir)
        return ppo_update(*inputs)

    ppo_update = nfpo.ppo_update
    monkeypatch.setattr(nfpo, "ppo_update", update)
    nfpo.train(nfpo.Args(env_id="tests.envs:Target-v0", runs_dir=str(tmp_path), **SMALL_ARGS))
    assert len(locked) == 2


def test_checkpoint_is_plain(hopper_run):
    """A checkpoint holds tensors and plain values only, and everything that training needs."""
    checkpoint = torch.load(hopper_run / "checkpoint.pt", weights_only=True)
    assert checkpoint.keys() == {"args", "global_step", "returns", "agent", "optimizer", "envs", "random"}
    assert nfpo.Args(**checkpoint["args"]).env_id == "Hopper-v4"
    assert checkpoint["agent"].keys() >= {"obs_stats.mean", "obs_stats.var", "obs_stats.count", "return_stats.var"}
    assert checkpoint["envs"].keys() >= {"obs", "discounted_return", "episode", "broken_episodes", "_extra_state"}


def test_checkpoints_are_no_larger_than_what_they_hold(hopper_run):
    """Parameters are views of one vector, which must not be written with each of them."""
    checkpoint = torch.load(hopper_run / "checkpoint.pt", weights_only=True)
    numbers = sum(tensor.numel() for tensor in checkpoint["agent"].values())
    assert (hopper_run / "checkpoint.pt").stat().st_size < 4 * 4 * numbers + 2 * 60_000


def test_write_is_atomic(hopper_copy, monkeypatch):
    """A write that breaks in the middle leaves the old checkpoint in place, whole."""
    file = hopper_copy / "checkpoint.pt"
    before = file.read_bytes()

    def break_in_the_middle(checkpoint, target):
        Path(target).write_bytes(before[: len(before) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", break_in_the_middle)
    with pytest.raises(OSError, match="disk full"):
        nfpo.save_checkpoint(file, {"global_step": 1})
    assert file.read_bytes() == before
    assert nfpo.load_checkpoint(hopper_copy)["global_step"] == 128


def test_statistics_and_noise_continue(hopper_run):
    """What load_checkpoint puts into an agent is all that the policy needs: parameters and statistics."""
    envs = make("Hopper-v4")
    agent = nfpo.Agent(nfpo.load_checkpoint(hopper_run)["args"], nfpo.FlowPolicy, envs)
    checkpoint = nfpo.load_checkpoint(hopper_run, agent)
    assert differences(dict(agent.state_dict()), dict(checkpoint["agent"])) == []
    assert agent.obs_stats.count.item() == pytest.approx(128, abs=0.1) and np.all(agent.obs_stats.var.numpy() > 0)
