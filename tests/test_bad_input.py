"""Promise: bad input gets one line naming the flag, what was given and what is allowed, and leaves nothing behind."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import SMALL, TWIN, run, run_folders

import nfpo_continuous_action as nfpo


class TinyEnv(gym.Env):
    """Three steps of any observation and any action."""

    def __init__(self, observation_space, action_space=None, **_):
        self.observation_space = observation_space
        self.action_space = action_space or gym.spaces.Box(-1, 1, (2,))
        self.observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


IMAGE = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
BOX = gym.spaces.Box(-1, 1, (3,))
for name, spaces in {
    "Image-v0": {"observation_space": IMAGE},
    "DictOfImages-v0": {"observation_space": gym.spaces.Dict(left=IMAGE, right=IMAGE)},
    "DiscreteObs-v0": {"observation_space": gym.spaces.Discrete(5)},
    "DictWithDiscrete-v0": {"observation_space": gym.spaces.Dict(a=BOX, b=gym.spaces.Discrete(5))},
    "DictOfBoxes-v0": {"observation_space": gym.spaces.Dict(a=BOX, b=gym.spaces.Tuple([BOX, BOX]))},
    "MatrixAction-v0": {"observation_space": BOX, "action_space": gym.spaces.Box(-1, 1, (2, 3))},
}.items():
    gym.register(f"nfpo_test/{name}", lambda spaces=spaces, **_: TinyEnv(**spaces), max_episode_steps=3)


def assert_one_line(ended, *words) -> None:
    """Status 2, one line on stderr with all these words, and nothing written."""
    lines = [line for line in ended.err.splitlines() if "WARN" not in line and "logger.deprecation" not in line]
    assert ended.status == 2 and len(lines) == 1, ended
    assert "Traceback" not in ended.err + ended.out
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id Humanoidd-v4", ["--env-id", "Humanoidd-v4", "Humanoid-v4"]),
        ("--env-id no_such_module:Env-v0", ["--env-id", "no_such_module"]),
        ("--env-id CartPole-v1", ["--env-id", "CartPole-v1", "Discrete(2)", "Box"]),
        ("--env-id nfpo_test/Image-v0", ["--env-id", "nfpo_test/Image-v0", "images"]),
        ("--env-id nfpo_test/DictOfImages-v0", ["--env-id", "images"]),
        ("--env-id nfpo_test/DiscreteObs-v0", ["--env-id", "Discrete(5)", "Box"]),
        ("--env-id nfpo_test/DictWithDiscrete-v0", ["--env-id", "Discrete(5)", "Box"]),
        ("--num-minibatches 3", ["--num-minibatches", "3", "64"]),
        ("--num-minibatches 64", ["--num-minibatches", "64", "32"]),
        ("--total-timesteps 63", ["--total-timesteps", "63", "64"]),
        ("--total-timesteps -5", ["--total-timesteps", "-5", "64"]),
        ("--num-envs 0", ["--num-envs", "0", "at least 1"]),
        ("--num-steps -1", ["--num-steps", "-1", "at least 1"]),
        ("--num-minibatches 0", ["--num-minibatches", "0", "at least 1"]),
        ("--update-epochs 0", ["--update-epochs", "0", "at least 1"]),
        ("--hidden-dim 0", ["--hidden-dim", "0", "at least 1"]),
        ("--hidden-layers 0", ["--hidden-layers", "0", "at least 1"]),
        ("--num-flow-layers 0", ["--num-flow-layers", "0", "at least 1"]),
        ("--checkpoint-interval 0", ["--checkpoint-interval", "0", "at least 1"]),
        ("--keep-interval 0", ["--keep-interval", "0", "at least 1"]),
        ("--torch-threads 0", ["--torch-threads", "0", "at least 1"]),
        ("--scale-bound 0", ["--scale-bound", "0", "above 0"]),
        ("--scale-bound -0.5", ["--scale-bound", "-0.5", "above 0"]),
        ("--scale-bound nan", ["--scale-bound", "nan", "above 0"]),
        ("--learning-rate 0", ["--learning-rate", "0", "above 0"]),
        ("--gamma 1.1", ["--gamma", "1.1", "between 0 and 1"]),
        ("--clip-coef 0", ["--clip-coef", "0", "above 0"]),
        ("--action-noise -1", ["--action-noise", "-1", "at least 0"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--export-onnx a.onnx", ["--export-onnx", "--evaluate"]),
    ],
)
def test_flags(flags, words, cli):
    """Each wrong flag is named with its value and what is allowed."""
    assert_one_line(cli(*SMALL, *flags.split()), *words)
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize("flags", ["--num-envs two", "--scale-fn sigmoid", "--no-such-flag 1"])
def test_flags_that_the_parser_catches(flags, cli):
    """What the parser catches is named in its frame, without a traceback."""
    ended = cli(*flags.split())
    assert ended.status == 2 and flags.split()[0] in ended.err + ended.out and "Traceback" not in ended.err
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize("env_id", ["nfpo_test/DictOfBoxes-v0", "nfpo_test/MatrixAction-v0"])
def test_unusual_but_good(env_id, cli):
    """Dict and Tuple observations and actions of any shape are no bad input."""
    assert cli(*SMALL, "--env-id", env_id).status == 0
    assert run_folders(cli.folder)[0].name.startswith(env_id.replace("/", "-") + "__")


def test_as_a_user_sees_it(tmp_path):
    """In a real process: one line, status 2, no traceback, no folder."""
    ended = run("--env-id", "HalfCheeta-v5", cwd=tmp_path)
    assert_one_line(ended, "--env-id", "HalfCheeta-v5", "HalfCheetah-v5")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_runs_dir(cli):
    """An output folder that cannot be made is named, here one below a regular file."""
    (cli.folder / "file").write_text("")
    for path in (cli.folder / "file", cli.folder / "file" / "runs"):
        assert_one_line(cli(*SMALL, "--env-id", "Hopper-v4", "--runs-dir", path), "--runs-dir", path)
    assert [path.name for path in cli.folder.iterdir()] == ["file"]


def test_twin_has_no_flow_flags(cli, gaussian):
    """A flow's flag given to the Gaussian twin is an error, not silently ignored."""
    ended = cli(*SMALL, "--env-id", "Hopper-v4", "--scale-bound", 0.3, policy_class=gaussian)
    assert_one_line(ended, "--scale-bound", "0.3", "GaussianPolicy")
    assert list(cli.folder.iterdir()) == []


@pytest.fixture(params=["--resume", "--evaluate"])
def flag(request) -> str:
    return request.param


def copy_run(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_missing_run(flag, cli):
    """A path that holds no run is named."""
    assert_one_line(cli(flag, "nowhere"), flag, "nowhere", "holds no")
    (cli.folder / "empty").mkdir()
    assert_one_line(cli(flag, "empty"), flag, "empty", "holds no")
    assert_one_line(cli(flag, ""), flag, "holds no")  # a variable of the shell that is not set


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
def test_truncated_checkpoint(kept, flag, cli, hopper_run):
    """A checkpoint that was cut anywhere is called truncated."""
    copy = copy_run(hopper_run, cli.folder / "copy")
    whole = (copy / "checkpoint.pt").read_bytes()
    (copy / "checkpoint.pt").write_bytes(whole[:kept])
    assert_one_line(cli(flag, copy), flag, copy, "truncated")


def test_another_environment(flag, cli, hopper_run):
    """A run of another environment is an error that names both environments."""
    assert_one_line(cli(flag, hopper_run, "--env-id", "Walker2d-v4"), "--env-id", "Walker2d-v4", "Hopper-v4")


def test_checkpoint_of_another_environment(cli, hopper_run, train_small):
    """A checkpoint that was copied in from another environment's run is an error as well."""
    copy = copy_run(hopper_run, cli.folder / "copy")
    (copy / "checkpoint.pt").write_bytes((train_small("Walker2d-v4") / "checkpoint.pt").read_bytes())
    assert_one_line(cli("--resume", copy), "--resume", copy, "Walker2d-v4")


def test_another_policy(flag, cli, hopper_run, gaussian_run, gaussian):
    """A run of another policy class is an error that names both classes, either way round."""
    assert_one_line(cli(flag, gaussian_run), flag, gaussian_run, "GaussianPolicy", "FlowPolicy")
    ended = cli(flag, hopper_run, policy_class=gaussian)
    assert_one_line(ended, flag, hopper_run, "GaussianPolicy", "FlowPolicy")


def test_another_policy_before_the_first_checkpoint(cli, hopper_run, gaussian):
    """A run killed before its first checkpoint starts anew, but not with another policy."""
    copy = copy_run(hopper_run, cli.folder / "copy")
    (copy / "checkpoint.pt").unlink()
    ended = cli("--resume", copy, policy_class=gaussian)
    assert_one_line(ended, "--resume", copy, "GaussianPolicy", "FlowPolicy")


def test_another_policy_with_its_own_flags(flag, cli, train_small, gaussian):
    """The other policy is named also where its run used flags that this one lacks, and the user gave none of them."""
    flow_run = train_small("Hopper-v4", hidden_dim=32)
    ended = cli(flag, flow_run, policy_class=gaussian)
    assert_one_line(ended, flag, flow_run, "GaussianPolicy", "FlowPolicy")


def test_not_this_scripts_run(flag, cli):
    """A folder with somebody else's args.json and checkpoint is an error, not a crash."""
    (cli.folder / "other").mkdir()
    (cli.folder / "other" / "args.json").write_text(json.dumps({"lr": 1}))
    (cli.folder / "other" / "checkpoint.pt").write_text("hello")
    assert_one_line(cli(flag, "other"), flag, "other")
    (cli.folder / "other" / "args.json").write_text("[]")
    assert_one_line(cli(flag, "other"), flag, "other")


@pytest.mark.parametrize("name, value", [("num_steps", "many"), ("anneal_lr", "no"), ("gamma", None)])
def test_argument_of_another_type(name, value, cli, hopper_run):
    """An args.json that was edited wrongly is an error that names the argument."""
    copy = copy_run(hopper_run, cli.folder / "copy")
    (copy / "checkpoint.pt").unlink()  # whose arguments would contradict
    saved = json.loads((copy / "args.json").read_text())
    (copy / "args.json").write_text(json.dumps({**saved, name: value}))
    assert_one_line(cli("--resume", copy), "--resume", copy, nfpo.as_flag(name)[2:], value)


def test_export_to_a_folder(cli, hopper_run):
    """Said before an episode is played."""
    assert_one_line(cli("--evaluate", hopper_run, "--export-onnx", "."), "--export-onnx", "allowed is a file")


def test_export_with_noise(cli, hopper_run):
    """The file holds the deterministic policy, whose returns are not those of another temperature."""
    flags = "--evaluate", hopper_run, "--export-onnx", "a.onnx", "--temperature"
    assert_one_line(cli(*flags, "0.3"), "--temperature is 0.3", "allowed is 0 with --export-onnx")
    assert cli(*flags, "0", "--eval-episodes", 1).status == 0


def test_resume_of_nothing_by_function():
    """`train` raises what its docstring says."""
    with pytest.raises(nfpo.BadInput, match="--resume is nowhere"):
        nfpo.train(nfpo.Args(resume="nowhere"))


def test_a_clusters_variables(cli, monkeypatch):
    """WORLD_SIZE alone, as some schedulers set it, is no torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(*SMALL, "--env-id", "Pendulum-v1").status == 0


def test_strangers_code_is_not_run(cli, hopper_run):
    """A checkpoint with code in it is refused and its code stays asleep."""
    import torch

    class Payload:
        def __reduce__(self):
            return (Path.touch, (cli.folder / "ran",))

    copy = copy_run(hopper_run, cli.folder / "copy")
    torch.save({"policy_class": "FlowPolicy", "args": Payload()}, copy / "checkpoint.pt")
    assert_one_line(cli("--evaluate", copy), "--evaluate")
    assert not (cli.folder / "ran").exists()


def test_non_finite_stops(cli):
    """Numbers that break stop the run with status 3, name the flag, and keep the last good checkpoint."""
    import torch

    flags = "--env-id Hopper-v4 --scale-fn none --learning-rate 1 --no-anneal-lr".split()
    ended = cli(*SMALL, *flags, "--total-timesteps", 64 * 100, "--checkpoint-interval", 1)
    lines = [line for line in ended.err.splitlines() if line.startswith("error")]
    assert ended.status == 3 and len(lines) == 1 and "Traceback" not in ended.err, ended
    assert "--scale-fn none" in lines[0] and "finite" in lines[0]
    run_dir = run_folders(cli.folder)[0]
    saved = nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy)
    assert f"iteration {saved['iteration']}" in lines[0]
    assert all(torch.isfinite(x).all() for name in ("policy", "critic") for x in saved[name].values())


def test_twin_as_a_program(tmp_path):
    """The Gaussian twin's own command line answers in the same way."""
    ended = run(*SMALL, "--num-flow-layers", 2, cwd=tmp_path, script=TWIN)
    assert_one_line(ended, "--num-flow-layers", "2", "GaussianPolicy")
    assert list(tmp_path.iterdir()) == []


def test_track_without_an_account(tmp_path):
    """Weights & Biases without an account is one line that says what to do, and leaves nothing behind."""
    ended = run(
        *SMALL,
        "--env-id",
        "Pendulum-v1",
        "--track",
        cwd=tmp_path,
        WANDB_MODE="online",
        WANDB_API_KEY="",
        HOME=str(tmp_path),
    )
    assert ended.status == 2
    assert "--track" in ended.err and "WANDB_MODE=offline" in ended.err and "Traceback" not in ended.err
    assert not list((tmp_path / "runs").iterdir())


def test_broken_policy_with_worker_processes_ends(tmp_path):
    """An error after the worker processes have started ends the program, and them."""
    program = """
import torch
from nfpo_continuous_action import Args, train

class Broken(torch.nn.Module):
    def __init__(self, obs_dim, action_dim):
        raise RuntimeError("broken on purpose")

train(Args(env_id="Pendulum-v1", num_envs=2, async_envs=True, compile=False), Broken)
"""
    (tmp_path / "program.py").write_text(program)
    ended = run(cwd=tmp_path, script=tmp_path / "program.py")
    assert ended.status == 1 and "broken on purpose" in ended.err
