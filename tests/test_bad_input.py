"""Promise: bad input gets one line naming what was given and what is allowed, status 2, and leaves nothing behind."""

import re
import shlex
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import SMALL, SMALL_ARGS, assert_one_line, run, run_folders

import nfpo_continuous_action as nfpo


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-minibatches 3", ["num-minibatches", "3", "64"]),
        ("--num-minibatches 64", ["num-minibatches", "64"]),
        ("--total-timesteps 63", ["total-timesteps", "63", "64"]),
        ("--total-timesteps -5", ["total_timesteps", "greater than 0", "-5"]),
        ("--num-envs 0", ["num_envs", "greater than 0"]),
        ("--num-envs two", ["num-envs", "two"]),
        ("--num-steps -1", ["num_steps", "greater than 0"]),
        ("--num-minibatches 0", ["num_minibatches", "greater than 0"]),
        ("--update-epochs 0", ["update_epochs", "greater than 0"]),
        ("--hidden-dim 0", ["hidden_dim", "greater than 0"]),
        ("--hidden-layers 0", ["hidden_layers", "greater than 0"]),
        ("--num-flow-layers 0", ["num_flow_layers", "greater than 0"]),
        ("--checkpoint-interval 0", ["checkpoint_interval", "greater than 0"]),
        ("--keep-interval 0", ["keep_interval", "greater than 0"]),
        ("--eval-episodes 0", ["eval_episodes", "greater than 0"]),
        ("--torch-threads 0", ["torch_threads", "greater than 0"]),
        ("--scale-bound 0", ["scale_bound", "greater than 0"]),
        ("--scale-bound nan", ["scale_bound", "finite"]),
        ("--scale-fn sigmoid", ["scale-fn", "sigmoid", "tanh"]),
        ("--base-std 0", ["base_std", "greater than 0"]),
        ("--learning-rate 0", ["learning_rate", "greater than 0"]),
        ("--gamma 1.1", ["gamma", "less than or equal to 1"]),
        ("--gae-lambda -0.1", ["gae_lambda", "greater than or equal to 0"]),
        ("--clip-coef 0", ["clip_coef", "greater than 0"]),
        ("--clip-coef 1", ["clip_coef", "less than 1"]),
        ("--action-noise -1", ["action_noise", "greater than or equal to 0"]),
        ("--ent-coef inf", ["ent_coef", "finite"]),
        ("--target-kl 0", ["target_kl", "greater than 0"]),
        ("--temperature -1", ["temperature", "greater than or equal to 0"]),
        ("--seed -1", ["seed", "greater than or equal to 0"]),
        ("--env-kwargs {nonsense", ["env-kwargs", "property name"]),
        ("--export-onnx a.onnx", ["export-onnx", "evaluate"]),
        ("--no-such-flag 1", ["no-such-flag"]),
    ],
)
def test_flags(flags, words, cli):
    """The parser's frame names each wrong flag, its value and what is allowed."""
    ended = cli(*SMALL, *flags.split())
    said = re.sub(r"[│╭╮╰╯─\s]+", " ", ended.err + ended.out)
    assert ended.status == 2 and "Traceback" not in said, ended
    for word in words:
        assert word in said, (word, said)
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("Humanoidd-v4", ["Humanoidd-v4", "Humanoid"]),
        ("no_such_module:Env-v0", ["no_such_module"]),
        ("CartPole-v1", ["Discrete(2)", "Box"]),
        ("tests.envs:IntegerAction-v0", ["int32", "Box of floats"]),
        ("tests.envs:DictAction-v0", ["Dict", "Box of floats"]),
        ("tests.envs:Image-v0", ["images"]),
        ("tests.envs:DictOfImages-v0", ["images"]),
        ("tests.envs:DiscreteObs-v0", ["MultiDiscrete", "Box"]),
        ("tests.envs:DictWithDiscrete-v0", ["MultiDiscrete", "Box"]),
        ("", []),
    ],
)
def test_environments_that_do_not_fit(env_id, words, cli):
    """The line names the environment, what it has and what is allowed."""
    assert_one_line(cli(*SMALL, "--env-id", env_id), "--env-id", env_id, *words)
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize(
    "fault, words",
    [
        ("four values", ["expected 5", "got 4"]),
        ("old reset", []),
        ("no reward", []),
        ("two rewards", []),
        ("a word", ["good"]),
        ("two observations", []),
        ("raises nothing", ["NotImplementedError"]),  # an error without a text
    ],
)
@pytest.mark.parametrize("env_id", ["tests.envs:Faulty-v0", "tests.envs:FaultyEndless-v0"])
def test_environments_at_fault(env_id, fault, words, cli):
    """What an environment does wrong is said in one line that names the environment, and never trained on."""
    ended = cli(*SMALL, "--env-id", env_id, "--env-kwargs", f'{{"fault": "{fault}"}}')
    assert_one_line(ended, env_id, *words)
    assert not ended.err.rstrip().endswith(":") and "learning" not in ended.err
    assert list(cli.folder.iterdir()) == []


def test_arguments_that_an_environment_does_not_take(cli):
    """A wrong name in --env-kwargs is in the line."""
    ended = cli(*SMALL, "--env-id", "tests.envs:Target-v0", "--env-kwargs", '{"hight": 2}')
    assert_one_line(ended, "tests.envs:Target-v0", "hight")
    assert list(cli.folder.iterdir()) == []


def test_the_typed_id_is_never_suggested(cli):
    """`Did you mean ...` names something else than what was typed."""
    for env_id in ("Humanoidd-v4", "Hopper-v99", "hopper-v4", "HalfCheeta-v5"):
        ended = cli(*SMALL, "--env-id", env_id)
        assert_one_line(ended, env_id)
        assert ended.err.count(env_id) <= 2, ended.err
        assert not re.search(rf"[Dd]id you mean:? `?{env_id}", ended.err)


@pytest.mark.parametrize(
    "env_id", ["tests.envs:DictOfBoxes-v0", "tests.envs:TupleOfBoxes-v0", "tests.envs:MatrixAction-v0"]
)
def test_unusual_but_good(env_id, cli):
    """Dict and Tuple observations and actions of any shape are no bad input."""
    assert cli(*SMALL, "--env-id", env_id).status == 0
    assert run_folders(cli.folder)[0].name.startswith(env_id.replace(":", "-") + "__")


def test_as_a_user_sees_it(tmp_path):
    """In a real process: one line, status 2, no traceback, no folder."""
    ended = run("--env-id", "HalfCheeta-v5", cwd=tmp_path)
    assert_one_line(ended, "--env-id", "HalfCheeta-v5", "HalfCheetah")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_runs_dir(cli):
    """An output folder that cannot be made is named, here one below a regular file."""
    (cli.folder / "file").write_text("")
    ended = cli(*SMALL, "--env-id", "tests.envs:Target-v0", "--runs-dir", cli.folder / "file" / "runs")
    assert_one_line(ended, cli.folder / "file" / "runs")
    assert [path.name for path in cli.folder.iterdir()] == ["file"]


@pytest.fixture(params=["--resume", "--evaluate"])
def flag(request) -> str:
    return request.param


def test_missing_run(flag, cli):
    """A path that holds no run is named."""
    (cli.folder / "empty").mkdir()
    for path in ("nowhere", "empty", ""):  # the last is a variable of the shell that is not set
        assert_one_line(cli(flag, path), repr(path), "no checkpoint")
    assert [path.name for path in cli.folder.iterdir()] == ["empty"]


@pytest.mark.parametrize("kept", [0, 10, 5000, -100])
def test_truncated_checkpoint(kept, flag, cli, hopper_copy):
    """A checkpoint that was cut anywhere is refused with its path."""
    whole = (hopper_copy / "checkpoint.pt").read_bytes()
    (hopper_copy / "checkpoint.pt").write_bytes(whole[:kept])
    assert_one_line(cli(flag, hopper_copy), hopper_copy, "no checkpoint")


@pytest.mark.parametrize("content", [{"lr": 1}, [1], {"args": {"lr": 1}}, {"args": {"num_steps": "many"}}], ids=str)
def test_not_this_scripts_checkpoint(content, flag, cli):
    """Somebody else's file is an error, not a crash."""
    torch.save(content, cli.folder / "checkpoint.pt")
    assert_one_line(cli(flag, cli.folder), cli.folder, "no checkpoint")


@pytest.mark.parametrize("flags", [["--env-id", "Walker2d-v4"], ["--hidden-dim", "32"]], ids=str)
def test_another_shape(flags, cli, flag, hopper_copy):
    """A flag beside a run with which its parameters no longer fit is refused in one line."""
    before = {file.name: file.read_bytes() for file in hopper_copy.iterdir()}
    assert_one_line(cli(flag, hopper_copy, "--total-timesteps", 1024, *flags), hopper_copy, "size mismatch")
    assert {file.name: file.read_bytes() for file in hopper_copy.iterdir()} == before


def test_another_policy(flag, cli, hopper_run, gaussian_run, gaussian):
    """A run of another policy class does not fit, either way round."""
    more = ["--total-timesteps", 1024]
    assert_one_line(cli(flag, gaussian_run, *more), gaussian_run, "no checkpoint that fits")
    assert_one_line(cli(flag, hopper_run, *more, policy_class=gaussian), hopper_run, "no checkpoint that fits")


def test_export_with_noise(cli, hopper_run):
    """The file holds the deterministic policy, whose returns are not those of another temperature."""
    ended = cli("--evaluate", hopper_run, "--export-onnx", "a.onnx", "--temperature", "0.3")
    assert ended.status == 2 and "temperature 0" in ended.err + ended.out and "Traceback" not in ended.err
    assert list(cli.folder.iterdir()) == []


def test_by_function():
    """`train` and `evaluate` raise what their docstrings say."""
    with pytest.raises(nfpo.BadInput, match="nowhere"):
        nfpo.train(nfpo.Args(resume="nowhere"))
    with pytest.raises(nfpo.BadInput, match="nowhere"):
        nfpo.evaluate("nowhere")
    with pytest.raises(ValueError, match="num_envs"):
        nfpo.Args(num_envs=0)


def test_a_clusters_variables(cli, monkeypatch):
    """WORLD_SIZE alone, as some schedulers set it, is no torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(*SMALL, "--env-id", "tests.envs:Target-v0").status == 0


def test_strangers_code_is_not_run(flag, cli, hopper_copy):
    """A checkpoint with code in it is refused and its code stays asleep."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (cli.folder / "ran",))

    checkpoint = torch.load(hopper_copy / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "payload": Payload()}, hopper_copy / "checkpoint.pt")
    assert_one_line(cli(flag, hopper_copy), hopper_copy)
    assert not (cli.folder / "ran").exists()


def test_non_finite_stops(cli):
    """Numbers that break stop the run with status 3 and one line, and the last good checkpoint stays."""
    flags = "--env-id Hopper-v4 --scale-fn none --learning-rate 1e30 --no-anneal-lr --checkpoint-interval 1".split()
    ended = cli(*SMALL, *flags, "--total-timesteps", 64 * 10, "--update-epochs", 4)
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]  # and no progress bar before it
    assert ended.status == 3 and len(lines) == 1 and "Traceback" not in ended.err, ended
    assert "finite" in lines[0] and "Hopper-v4" in lines[0]


def test_non_finite_keeps_the_last_checkpoint(cli, monkeypatch):
    """Broken in the third iteration, the run has left the second one's checkpoint, which can be played."""
    update, calls = nfpo.ppo_update, []

    def breaking(agent, optimizer, *rest):
        calls.append(1)
        if len(calls) == 3:
            optimizer.param_groups[0]["params"][0].data[5] = float("nan")
        return update(agent, optimizer, *rest)

    monkeypatch.setattr(nfpo, "ppo_update", breaking)
    flags = "--env-id Hopper-v4 --total-timesteps 640 --checkpoint-interval 1".split()
    ended = cli(*SMALL, *flags)
    assert ended.status == 3 and "after step 128" in ended.err, ended
    (run_dir,) = run_folders(cli.folder)
    saved = nfpo.load_checkpoint(run_dir)
    assert saved["global_step"] == 128 and all(tensor.isfinite().all() for tensor in saved["agent"].values())
    monkeypatch.undo()
    assert len(nfpo.evaluate(cli.folder / run_dir, eval_episodes=1)) == 1


def test_a_run_folder_with_a_space_is_quoted(cli):
    """The command that a run's end prints works as it stands, whatever the folder is called."""
    flags = [*SMALL, "--env-id", "tests.envs:Target-v0"]
    ended = cli(*flags, "--runs-dir", "my runs", "--exp-name", "it's")
    assert ended.status == 0
    (command,) = re.findall(r"--evaluate .*", ended.out)
    _, run_dir, *_ = shlex.split(command)
    assert (cli.folder / run_dir / "checkpoint.pt").exists()


class Minimal(torch.nn.Module):
    """A reader's own policy: nothing but what the scripts know of one."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.mean = torch.nn.Linear(obs_dim, action_dim)

    def log_prob(self, obs, action):
        return torch.distributions.Normal(self.mean(obs), 0.3).log_prob(action).sum(-1)

    def sample(self, obs, temperature=1.0):
        action = self.mean(obs) + 0.3 * temperature * torch.randn(len(obs), self.mean.out_features)
        return action, self.log_prob(obs, action)


def test_a_strangers_policy(tmp_path):
    """A class with `sample` and `log_prob` is all that `train` and `evaluate` ask for."""
    args = nfpo.Args(env_id="Hopper-v4", runs_dir=str(tmp_path), **SMALL_ARGS)
    ended = nfpo.train(args, Minimal)
    assert ended["global_step"] == 128 and not any(name.startswith("flow/") for name in ended)
    assert len(nfpo.evaluate(ended["run_dir"], Minimal, eval_episodes=2)) == 2
    longer = nfpo.Args(env_id="Hopper-v4", resume=ended["run_dir"], **{**SMALL_ARGS, "total_timesteps": 256})
    assert nfpo.train(longer, Minimal)["global_step"] == 256


class BrokenPolicy(torch.nn.Module):
    def __init__(self, obs_dim, action_dim):
        raise RuntimeError("broken on purpose")


def test_broken_policy_with_worker_processes_ends(tmp_path):
    """An error after the worker processes have started is the error that is seen, and the program ends."""
    program = """
from nfpo_continuous_action import Args, train
from tests.test_bad_input import BrokenPolicy

train(Args(env_id="Pendulum-v1", num_envs=2, async_envs=True, compile=False), BrokenPolicy)
"""
    (tmp_path / "program.py").write_text(program)
    ended = run(cwd=tmp_path, script=tmp_path / "program.py", PYTHONPATH=f"{nfpo.__file__}/..:{Path(__file__).parent}")
    assert ended.status == 1 and "broken on purpose" in ended.err


def test_gymnasium_knows_the_ids():
    """What the tests above take for wrong ids are wrong."""
    assert "Humanoidd-v4" not in gym.registry and "Hopper-v4" in gym.registry
