"""Promise: a run that is killed at any moment and resumed ends as one that never was, bit for bit."""

import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL, differences, finish, run, run_folders, scalars, start, wait_for

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


def build(env_id: str, async_envs: bool = False, num_envs: int = 2) -> gym.vector.VectorEnv:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is out of date
        return nfpo.make_envs(nfpo.Args(env_id=env_id, num_envs=num_envs, async_envs=async_envs))


def play(envs: gym.vector.VectorEnv, actions: np.ndarray) -> tuple[list[np.ndarray], int]:
    """Everything the steps return, final observations too, and the number of episodes that ended."""
    seen, ends = [], 0
    for action in actions:
        obs, reward, terminated, truncated, infos = envs.step(action)
        seen += [obs.copy(), reward.copy(), terminated.copy(), truncated.copy()]
        for i in (terminated | truncated).nonzero()[0]:
            seen.append(infos["final_obs"][i].copy())
            ends += 1
    return seen, ends


def restored_matches(env_id: str, async_envs: bool, path: Path) -> None:
    envs, copy = build(env_id, async_envs), build(env_id, async_envs)
    try:
        # Hard actions that change at every step, as a fresh policy's do, and a restore in mid-episode, in mid-motion.
        rng = np.random.default_rng(3)
        space = envs.single_action_space
        actions = rng.uniform(space.low, space.high, (187, 2, *space.shape)).astype(np.float32)
        envs.reset(seed=5)
        play(envs, actions[:7])
        if not async_envs:  # a time limit 30 steps ahead, so that tasks without a fall end an episode too
            for env in envs.envs:
                env.set_wrapper_attr("_elapsed_steps", env.spec.max_episode_steps - 30)
        torch.save(list(envs.call("get_state")), path)
        expected, ends = play(envs, actions[7:])

        copy.reset(seed=99)
        play(copy, actions[:3])  # whatever it did before must not show
        copy.call("set_state", torch.load(path, weights_only=True))
        restored, _ = play(copy, actions[7:])
        assert ends > 0, "no episode ended, so the reset was not tested"
        assert len(restored) == len(expected)
        for i, (a, b) in enumerate(zip(restored, expected)):
            assert a.dtype == b.dtype and np.array_equal(a, b), f"differs in entry {i} of {len(expected)}"
    finally:
        envs.close()
        copy.close()


@pytest.mark.parametrize("env_id", TASKS)
def test_state_restores(env_id, tmp_path):
    """A state taken in mid-episode continues bit for bit in a new environment, through ends and resets."""
    restored_matches(env_id, False, tmp_path / "state.pt")


def test_state_restores_in_worker_processes(tmp_path):
    """The same holds where each environment lives in a worker process."""
    restored_matches("Hopper-v4", True, tmp_path / "state.pt")


RUN = "--env-id Hopper-v4 --num-steps 128 --num-minibatches 4 --update-epochs 1 --checkpoint-interval 2".split()
EAGER = [*RUN, "--total-timesteps", 128 * 16, "--no-compile"]
ASYNC = [*RUN, "--total-timesteps", 256 * 12, "--no-compile", "--num-envs", 2, "--async-envs"]
COMPILED = [*RUN, "--total-timesteps", 128 * 16, "--num-flow-layers", 2]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """Run folders of runs that nobody killed, by their flags."""
    done = {}

    def get(flags: list) -> Path:
        key = " ".join(map(str, flags))
        if key not in done:
            folder = tmp_path_factory.mktemp("never_killed")
            ended = run(*flags, cwd=folder)
            assert ended.status == 0, ended.err
            done[key] = run_folders(folder)[0]
        return done[key]

    return get


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Checkpoints equal to the last bit (all but the folder's own traces), scalars equal, each point once."""
    ours, theirs = nfpo.load_checkpoint(run_dir), nfpo.load_checkpoint(expected)
    for checkpoint in (ours, theirs):
        del checkpoint["args"], checkpoint["event_files"]
    assert differences(ours, theirs) == []
    for name, points in scalars(expected).items():
        if name != "charts/SPS":
            assert scalars(run_dir)[name] == points, name
    losses = scalars(run_dir)["losses/value_loss"]
    assert len(losses) == len({step for step, _ in losses})  # episodes may share a step, iterations cannot


def kill(folder: Path, *flags, delay: float, before_checkpoint: bool = False) -> Path:
    """Start a run and kill it -9 some moment after it has a checkpoint (or arguments); returns its folder."""
    process = start(*flags, cwd=folder)
    name = "args.json" if before_checkpoint else "checkpoint.pt"
    if "--resume" in flags:
        written = (Path(flags[1]) / name).stat().st_mtime_ns
        wait_for(lambda: (Path(flags[1]) / name).stat().st_mtime_ns != written, process)
    else:
        wait_for(lambda: list(folder.glob(f"runs/*/{name}")), process)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    ended = finish(process)
    assert ended.status == -signal.SIGKILL, f"it was over before the kill: {ended}"
    return run_folders(folder)[0]


def test_killed_and_resumed(never_killed, tmp_path):
    """Killed twice with -9, at random moments, and resumed, a run equals one never killed."""
    expected = never_killed(EAGER)
    rng = random.Random(os.getpid())
    delays = rng.uniform(0, 0.3), rng.uniform(0, 0.3)
    print("killed after", delays)
    run_dir = kill(tmp_path, *EAGER, delay=delays[0])
    kill(tmp_path, "--resume", run_dir, delay=delays[1])
    assert 0 < nfpo.load_checkpoint(run_dir)["iteration"] < 16
    ended = run("--resume", run_dir, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert run_folders(tmp_path) == [run_dir]
    assert_same_run(run_dir, expected)


def test_killed_before_first_checkpoint(never_killed, tmp_path):
    """A run killed before its first checkpoint starts anew, in its folder and with its arguments."""
    run_dir = kill(tmp_path, *EAGER, delay=0, before_checkpoint=True)
    assert not (run_dir / "checkpoint.pt").exists()
    assert run("--resume", run_dir, cwd=tmp_path).status == 0
    assert run_folders(tmp_path) == [run_dir]
    assert_same_run(run_dir, never_killed(EAGER))


def test_killed_while_compiled(never_killed, tmp_path):
    """Compiled runs resume bit for bit too."""
    run_dir = kill(tmp_path, *COMPILED, delay=0)
    ended = run("--resume", run_dir, cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert_same_run(run_dir, never_killed(COMPILED))


@pytest.mark.parametrize("number, flags", [(signal.SIGTERM, EAGER), (signal.SIGINT, ASYNC)], ids=["term", "int_async"])
def test_stop_signal_saves(number, flags, never_killed, tmp_path):
    """SIGTERM and Ctrl-C, which reaches worker processes too, save, exit with 128 + signal, and lose no iteration."""
    process = start(*flags, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    os.killpg(process.pid, number)
    ended = finish(process)
    run_dir = run_folders(tmp_path)[0]
    assert ended.status == 128 + number, ended
    assert "Traceback" not in ended.err and f"--resume {run_dir.relative_to(tmp_path)}" in ended.out
    saved = nfpo.load_checkpoint(run_dir)
    assert saved["global_step"] == max(step for step, _ in scalars(run_dir)["losses/value_loss"])
    if flags is ASYNC:  # and one kill -9, so that worker processes are restored after that as well
        kill(tmp_path, "--resume", run_dir, delay=0.1)
    assert run("--resume", run_dir, cwd=tmp_path).status == 0
    assert_same_run(run_dir, never_killed(flags))


def test_trained_longer(cli, tmp_path):
    """A run whose learning rate is not annealed may be continued beyond its end, and equals one that was longer."""
    flags = [*RUN, "--no-compile", "--no-anneal-lr"]
    assert cli(*flags, "--total-timesteps", 128 * 5).status == 0
    assert cli(*flags, "--total-timesteps", 128 * 2, "--runs-dir", "short/runs").status == 0
    (expected,), (run_dir,) = run_folders(tmp_path), run_folders(tmp_path / "short")
    assert cli("--resume", run_dir, "--total-timesteps", 128 * 3).status == 0
    kept = nfpo.load_checkpoint(run_dir)
    ended = cli("--resume", run_dir, "--total-timesteps", 128 * 2)
    assert ended.status == 2 and "is 256, allowed is at least the 384 steps" in ended.err, ended.err
    # Killed between the new length and its first checkpoint, it still goes on to that length.
    assert cli("--resume", run_dir, "--total-timesteps", 128 * 5).status == 0
    nfpo.save_checkpoint(run_dir / "checkpoint.pt", kept)
    assert cli("--resume", run_dir).status == 0
    assert_same_run(run_dir, expected)


def test_longer_training_of_an_annealed_run(cli, hopper_copy):
    """The learning rates of a longer run would have been others from the start."""
    ended = cli("--resume", hopper_copy, "--total-timesteps", 256)
    assert ended.status == 2 and "its learning rate is annealed" in ended.err and ended.err.count("\n") == 1, ended.err


def test_kept_checkpoints(cli, tmp_path):
    """Every second iteration's checkpoint stays, can be played, and is the one that a run of that length ends with."""
    flags = [*RUN, "--no-compile", "--no-anneal-lr", "--checkpoint-interval", 3]
    assert cli(*flags, "--total-timesteps", 128 * 5, "--keep-interval", 2).status == 0
    (run_dir,) = run_folders(tmp_path)
    assert {file.name for file in run_dir.glob("*.pt")} == {"checkpoint.pt", "checkpoint-256.pt", "checkpoint-512.pt"}
    assert cli(*flags, "--total-timesteps", 128 * 2, "--runs-dir", "short/runs").status == 0
    kept = nfpo.load_checkpoint(run_dir / "checkpoint-256.pt")
    expected = nfpo.load_checkpoint(run_folders(tmp_path / "short")[0])
    assert differences(kept["policy"], expected["policy"]) == [] and kept["global_step"] == 256
    assert cli("--evaluate", run_dir / "checkpoint-256.pt", "--eval-episodes", 1).status == 0


@pytest.fixture
def hopper_copy(hopper_run, tmp_path) -> Path:
    """A finished run that a test may change."""
    copy = tmp_path / "runs" / hopper_run.name
    copy.mkdir(parents=True)
    for file in hopper_run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.mark.parametrize(
    "flags, saved",
    [
        (["--learning-rate", "0.1"], "0.0003"),
        (["--env-id", "Walker2d-v4"], "Hopper-v4"),
        (["--scale-fn", "clip"], "tanh"),
        (["--no-anneal-lr"], "True"),
    ],
)
def test_contradicting_flag(flags, saved, cli, hopper_copy):
    """A flag beside --resume that contradicts the run is an error that names it and the run's own value."""
    ended = cli("--resume", hopper_copy, *flags)
    assert ended.status == 2
    flag = flags[0].replace("--no-", "--")
    assert f"{flag} is" in ended.err and saved in ended.err and ended.err.count("\n") == 1, ended.err


def test_repeated_flag(cli, hopper_copy):
    """A flag beside --resume that says what the run says is no error."""
    assert cli("--resume", hopper_copy, "--num-steps", 64, "--env-id", "Hopper-v4").status == 0


def test_events_go_back_to_the_checkpoint(cli, hopper_run, hopper_copy):
    """What was logged after the checkpoint, in its event file or a later one, is gone before it is logged again."""
    file = next(hopper_copy.glob("events.out.tfevents.*"))
    content = file.read_bytes()
    (hopper_copy / f"{file.name}.later").write_bytes(content)
    file.write_bytes(content + content)
    assert scalars(hopper_copy) != scalars(hopper_run)
    assert cli("--resume", hopper_copy).status == 0
    assert scalars(hopper_copy) == scalars(hopper_run)


def test_tracking_and_video_may_differ(hopper_copy, monkeypatch):
    """Tracking and video may be switched on beside --resume."""
    monkeypatch.setattr("sys.argv", ["nfpo"])
    args = nfpo.parse_args(["--resume", str(hopper_copy), "--track", "--capture-video"])
    assert args.track and args.capture_video and args.num_steps == 64


def test_resumed_run_is_a_run(cli, hopper_copy):
    """What was continued can be played and exported like any other, with the command that its end prints."""
    checkpoint = nfpo.load_checkpoint(hopper_copy)
    nfpo.save_checkpoint(hopper_copy / "checkpoint.pt", {**checkpoint, "iteration": 1, "global_step": 64})
    ended = cli("--resume", hopper_copy)
    assert ended.status == 0 and "--capture-video" in ended.out
    (command,) = (line for line in ended.out.splitlines() if line.strip().startswith("export"))
    ended = cli(*command.split("nfpo_continuous_action.py ")[1].split(), "--eval-episodes", 1)
    assert ended.status == 0 and Path("policy.onnx").exists(), ended.err


@pytest.mark.parametrize("env_id", ["tests.envs:CommandedHopper-v0", "tests.envs:WrappedHopper-v0"])
def test_own_simulations_are_not_said_to_be_restored(env_id):
    """What a reader's own task or wrapper keeps beside the simulator's state is unknown: its episodes start anew."""
    envs = build(env_id)
    envs.reset(seed=1)
    assert envs.call("get_state") == (None, None)
    envs.close()


def test_a_cpu_run_leaves_the_gpus_alone(monkeypatch):
    """It can be resumed on a machine with fewer of them, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert nfpo.random_state(torch.device("cpu"))["cuda"] == []


def test_other_environments_restart_their_episodes(cli):
    """What cannot be restored within an episode starts it anew and says so, and goes on with the rest."""
    flags = [*SMALL, "--env-id", "Pendulum-v1", "--total-timesteps", 64 * 6, "--checkpoint-interval", 100]
    assert cli(*flags).status == 0
    run_dir = run_folders(cli.folder)[0]
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    checkpoint.update(iteration=4, global_step=256)
    nfpo.save_checkpoint(run_dir / "checkpoint.pt", checkpoint)
    ended = cli("--resume", run_dir)
    assert ended.status == 0 and "Pendulum-v1 cannot be restored within an episode" in ended.out
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 64 * 6


def test_checkpoint_is_plain(hopper_run):
    """A checkpoint holds tensors and plain values only, and everything that training needs."""
    checkpoint = torch.load(hopper_run / "checkpoint.pt", weights_only=True)
    assert {"policy", "critic", "optimizer", "args", "iteration", "global_step", "processes"} <= checkpoint.keys()
    assert checkpoint["args"].items() <= json.loads((hopper_run / "args.json").read_text()).items()
    assert checkpoint["processes"][0]["random"].keys() >= {"torch", "numpy", "python"}
    for x in (*checkpoint["policy"].values(), *checkpoint["critic"].values()):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()  # or saving the policy saves the critic


def test_write_is_atomic(hopper_copy, monkeypatch):
    """A write that breaks in the middle leaves the old checkpoint in place, whole."""
    file = hopper_copy / "checkpoint.pt"
    before = file.read_bytes()

    def break_in_the_middle(checkpoint, target):
        target = open(target, "wb") if isinstance(target, (str, Path)) else target
        target.write(before[: len(before) // 2])
        target.flush()
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", break_in_the_middle)
    with pytest.raises(OSError, match="disk full"):
        nfpo.save_checkpoint(file, {"iteration": 1})
    assert file.read_bytes() == before
    assert nfpo.load_checkpoint(hopper_copy, nfpo.FlowPolicy)["iteration"] == 2
