"""Promise: bad input gets one line naming the flag, what was given and what is allowed, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from mujoco_playground import registry

import nfpo_playground_jax as nfpo
from benchmarks.baselines.ppo_playground_jax import GaussianPolicy
from playground.conftest import SMALL
from playground.test_playground_resume import scalars

LANE = ["--env-id", "tests.playground.envs:Lane"]


def assert_one_line(ended, *words) -> None:
    """Status 2, one line on stderr with all these words."""
    status, _, err = ended
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1, ended
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartpoleBalanc", ["--env-id", "CartpoleBalanc,", "CartpoleBalance"]),
        ("--env-id no_such_module:Env", ["--env-id", "no_such_module"]),
        ("--env-id tests.playground.envs:Images", ["--env-id", "Images", "image"]),
        ("--impl warp", ["--impl", "warp", "jax"]),
        ("--num-minibatches 3", ["--num-minibatches", "3", "32"]),
        ("--num-minibatches 32", ["--num-minibatches", "32", "16"]),
        ("--total-timesteps 31", ["--total-timesteps", "31", "32"]),
        ("--num-envs 0", ["--num-envs", "0", "at least 1"]),
        ("--num-devices 3", ["--num-devices", "3", "2"]),
        ("--num-envs 5 --num-minibatches 1 --num-devices 2", ["--num-devices", "2", "num_envs", "5"]),
        ("--critic-hidden-dims 0", ["--critic-hidden-dims", "0", "at least 1"]),
        ("--scale-bound nan", ["--scale-bound", "nan", "above 0"]),
        ("--gamma 1.1", ["--gamma", "1.1", "between 0 and 1"]),
        ("--desired-kl 0", ["--desired-kl", "0", "above 0"]),
        ("--num-processes 2", ["--num-processes", "2", "--distributed"]),
        ("--distributed --capture-video", ["--distributed", "--capture-video"]),
        ("--desired-kl 0.01 --anneal-lr", ["--desired-kl", "--anneal-lr"]),
        ("--config-overrides [1]", ["--config-overrides", "[1]", "JSON object"]),
        ("--config-overrides {", ["--config-overrides", "{", "JSON object"]),
        ('--config-overrides {"impl":"jax"} --total-timesteps 32', ["--config-overrides", "impl", "--impl sets"]),
        ("--keep-interval 0", ["--keep-interval", "0", "at least 1"]),
        ('--config-overrides {"no_such_key":1}', ["--env-id", "no_such_key"]),
        ("--domain-randomization", ["--domain-randomization", "Lane"]),
        ("--export-onnx a.onnx", ["--export-onnx", "--evaluate"]),
        ("--export-npz a.npz", ["--export-npz", "--evaluate"]),
        ("--resume nowhere", ["--resume", "nowhere"]),
        ("--evaluate nowhere", ["--evaluate", "nowhere"]),
        ("--resume=", ["--resume", "holds no"]),  # a variable of the shell that is not set
        ("--evaluate=", ["--evaluate", "holds no"]),
        ("--resume nowhere --evaluate nowhere", ["--resume", "--evaluate", "one of them"]),
    ],
)
def test_flags(flags, words, cli, tmp_path):
    """Each wrong flag is named with its value and what is allowed, before anything is written."""
    assert_one_line(cli(*SMALL, *LANE, *flags.split()), *words)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_runs_dir(cli, tmp_path):
    """An output folder that cannot be made is named, here one below a regular file."""
    (tmp_path / "file").write_text("")
    assert_one_line(cli(*SMALL, *LANE, "--runs-dir", "file/runs"), "--runs-dir", "file/runs")


def test_twin_has_no_flow_flags(cli):
    """A flow's flag given to the Gaussian twin is an error, not silently ignored."""
    flags = [*LANE, "--num-envs", 4, "--scale-bound", 0.3]
    assert_one_line(cli(*flags, policy_class=GaussianPolicy), "--scale-bound", "0.3", "GaussianPolicy")


def test_export_with_noise(cli, lane_run):
    """The files hold the deterministic policy, whose returns are not those of another temperature."""
    for flag in ("--export-onnx", "--export-npz"):
        ended = cli("--evaluate", lane_run, flag, "a", "--temperature", 0.3)
        assert_one_line(ended, "--temperature is 0.3", f"allowed is 0 with {flag}")
    assert not Path("a").exists()


def test_missing_meshes_are_one_line(cli, monkeypatch):
    """Where the robots' meshes cannot be cloned, whoever asked for a robot gets one line."""

    def clone(*_, **__):
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(registry.locomotion.mjx_env, "ensure_menagerie_exists", clone)
    assert_one_line(cli("--env-id", "Go1JoystickFlatTerrain"), "--env-id", "Go1Joystick", "no network here")


def test_runs_of_others(cli, lane_run, tmp_path):
    """Another policy's run, a damaged one and a contradicting flag are named."""
    for flag in ("--resume", "--evaluate"):
        assert_one_line(cli(flag, lane_run, policy_class=GaussianPolicy), flag, "FlowPolicy", "GaussianPolicy")
        assert_one_line(cli(flag, lane_run, "--gamma", 0.5), "--gamma", "0.5", "0.99")
    damaged = tmp_path / "damaged"
    shutil.copytree(lane_run, damaged)
    for file in damaged.glob("checkpoint/*/meta/metadata"):
        file.write_text("{")
    assert_one_line(cli("--evaluate", damaged), "--evaluate", damaged, "incomplete")
    (damaged / "args.json").write_text(json.dumps({"policy_class": "FlowPolicy", "no_such_argument": 1}))
    assert_one_line(cli("--resume", damaged), "--resume", "no_such_argument")
    (damaged / "args.json").write_text(json.dumps({"policy_class": "FlowPolicy", "num_steps": "many"}))
    assert_one_line(cli("--resume", damaged), "--resume", "num-steps", "many")


def test_a_warp_run_without_its_gpu(cli, lane_run, tmp_path):
    """Resume says what works here instead of an --impl that it would refuse."""
    moved = shutil.copytree(lane_run, tmp_path / "moved")
    contents = json.loads((moved / "args.json").read_text())
    (moved / "args.json").write_text(json.dumps({**contents, "impl": "warp"}))
    ended = cli("--resume", moved)
    assert_one_line(ended, "--resume", moved, "--impl warp", "NVIDIA GPU", "--evaluate works")
    assert "allowed" not in ended[2]


def test_a_run_is_not_made_shorter_than_it_is(cli, lane_run, tmp_path):
    """--resume names the steps done, and a learning rate that was annealed over another number of steps."""
    assert_one_line(cli("--resume", lane_run, "--total-timesteps", 63), "--total-timesteps", "63", "64")
    flags = [*SMALL, *LANE, "--total-timesteps", 32]
    assert cli(*flags, "--anneal-lr")[0] == 0
    (run_dir,) = Path(tmp_path, "runs").iterdir()
    assert_one_line(cli("--resume", run_dir, "--total-timesteps", 64), "--total-timesteps", "64", "32", "annealed")


def test_a_simulation_that_breaks_ends_its_episode(cli, tmp_path):
    """One broken environment ends neither the run nor what is known of the others, and nothing of it is left."""
    status, _, err = cli(*SMALL, "--env-id", "tests.playground.envs:Breaks", "--total-timesteps", 640)
    assert status == 0, err
    (run_dir,) = Path(tmp_path, "runs").iterdir()
    points = scalars(run_dir)
    assert points["charts/episodic_return"] and points["charts/episodic_length"]
    for name, values in points.items():
        assert np.isfinite([value for _, value in values]).all(), name
    lengths = [length for _, length in points["charts/episodic_length"]]
    assert max(lengths) < 20
    assert min(lengths) >= 4, "it takes 4 steps to break; an episode broke that started with what was left of another"
    assert sum(count for _, count in points["charts/broken_environments"]) >= len(lengths)
    args = nfpo.from_json(nfpo.load_checkpoint(run_dir)["args"])
    stats = nfpo.restore_policy(run_dir, nfpo.FlowPolicy, args, nfpo.make_env(args)).obs_stats
    assert np.isfinite(stats.mean).all() and np.isfinite(stats.var).all()

    status, out, err = cli("--evaluate", run_dir, "--export-onnx", "a.onnx", "--export-npz", "a.npz")
    assert status == 0, err
    assert "nan" not in out and "of them ended early" in out and Path("a.onnx").exists() and Path("a.npz").exists()


def test_numbers_that_break_stop_the_run(cli, monkeypatch, tmp_path):
    """A loss that is no number stops training with status 3, and the checkpoint before it stays."""
    right_loss = nfpo.minibatch_loss

    def loss(params, learner, minibatch, key):
        value, metrics = right_loss(params, learner, minibatch, key)
        late = params["critic"]["Dense_1"]["bias"][0] != 0  # after the first step
        return value * jnp.where(late, jnp.nan, 1.0), metrics

    monkeypatch.setattr(nfpo, "minibatch_loss", loss)
    status, _, err = cli(*SMALL, *LANE, "--total-timesteps", 320, "--update-epochs", 1, "--num-minibatches", 1)
    assert status == 3 and "not finite" in err and "--learning-rate" in err and "iteration 1 is kept" in err
    (run_dir,) = Path(tmp_path, "runs").iterdir()
    assert nfpo.load_checkpoint(run_dir)["iteration"] == 1
