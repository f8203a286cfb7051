"""What is deployed is what was trained: evaluation, ONNX, NumPy, film and logs."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from moviepy import VideoFileClip
from mujoco_playground import registry

import nfpo_playground_jax as nfpo
from benchmarks.baselines.ppo_playground_jax import GaussianPolicy
from playground.conftest import SMALL, small_args
from playground.test_playground_resume import finish, scalars, start

ABOUT = {"env_id": "Lane", "ctrl_dt": 0.02}


def deployed_policy(action_dim, **flags):
    """A flow far from its initialization with statistics far from 0 and 1."""
    policy = nfpo.FlowPolicy(4, action_dim, hidden_dim=16, **flags)
    variables = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, 4)), jnp.zeros((1, action_dim)))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.PRNGKey(x.size), x.shape), variables)
    stats = nfpo.RunningMeanStd(jnp.asarray(9.0), jnp.arange(4.0) * 10, jnp.arange(1.0, 5.0))
    return nfpo.DeployedPolicy(policy, params["params"], stats)


@pytest.mark.parametrize(
    "action_dim, flags",
    [
        (1, {}),
        (3, {"scale_fn": "clip", "num_layers": 3}),
        (6, {"hidden_layers": 2, "learned_base_std": True}),
        (5, {"scale_fn": "asymmetric"}),
        (5, {"scale_fn": "none"}),
        (5, {"scale_fn": "zero"}),
        (2, {"hidden_layers": 12}),
    ],
)
def test_exported_policies_are_the_policy(action_dim, flags, tmp_path):
    """The ONNX file, and the NumPy file in a process without JAX, act as the policy does on raw observations."""
    deployed = deployed_policy(action_dim, **flags)
    obs = np.random.default_rng(0).normal(15, 15, (200, 4)).astype(np.float32)
    expected = np.asarray(deployed(jnp.asarray(obs)))
    key = jax.random.PRNGKey(0)
    np.testing.assert_allclose(deployed.act(jnp.asarray(obs), key, 0.0), expected, atol=1e-6)
    assert np.abs(expected).max() == 1 and len(np.unique(expected)) > 20, "clipped at the door, and not constant"
    assert nfpo.to_onnx(deployed, str(tmp_path / "policy.onnx"), obs, ABOUT) <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    for count in (1, 7, 200):
        found = session.run(["continuous_actions"], {"obs": obs[:count]})[0]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-5)
    assert nfpo.to_npz(deployed, str(tmp_path / "policy.npz"), obs, ABOUT) <= 1e-5
    np.save(tmp_path / "obs.npy", obs)
    source = Path(nfpo.__file__).read_text()
    function = re.search(r"^def numpy_policy.*?(?=^# ---)", source, re.DOTALL | re.MULTILINE)[0]
    program = (
        "import sys\nfrom collections.abc import Mapping\nimport numpy as np\n" + function + "\n"
        "np.save('found.npy', numpy_policy(np.load('policy.npz'), np.load('obs.npy')))\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, rtol=0, atol=1e-5)


def test_an_export_that_differs_is_not_written(cli, lane_run, tmp_path, monkeypatch):
    """A file that acts differently must not reach a robot; it is one line, after the return that was computed."""
    deployed = deployed_policy(3)
    monkeypatch.setattr(nfpo, "numpy_policy", lambda weights, obs: np.zeros((len(obs), 3), np.float32))
    with pytest.raises(nfpo.WrongExport, match="differs from the JAX policy"):
        nfpo.to_npz(deployed, str(tmp_path / "policy.npz"), np.ones((8, 4), np.float32), ABOUT)
    status, out, err = cli("--evaluate", lane_run, "--export-npz", "policy.npz")
    assert status == 1 and len(err.strip().splitlines()) == 1 and "policy.npz differs" in err
    assert "at temperature 0: return" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "large, error, is_kept", [(1000, 1e-3, True), (1000, 0.1, False), (0.01, 5e-6, True), (0.01, 1e-4, False)]
)
def test_large_actions_are_compared_by_their_size(large, error, is_kept, tmp_path):
    """float32 has seven digits: next to an action of 1000 the rounding of the others is no difference. Small actions
    are compared as they are."""
    obs, unclipped = jnp.zeros((1, 4)), jnp.array([[large, 0.005]])
    deployed = SimpleNamespace(unclipped=lambda obs: unclipped)
    (tmp_path / "new").write_text("")
    found = unclipped.clip(-1, 1) + jnp.array([0.0, error])
    with contextlib.nullcontext() if is_kept else pytest.raises(nfpo.WrongExport):
        nfpo.keep_if_same(str(tmp_path / "new"), str(tmp_path / "kept"), found, deployed, obs)
    assert (tmp_path / "kept").exists() == is_kept


def test_command_line_exports(cli, lane_run, tmp_path):
    """--evaluate plays, exports both files and prints the return."""
    status, out, _ = cli("--evaluate", lane_run, "--export-onnx", "a.onnx", "--export-npz", "a.npz")
    assert status == 0 and {"a.onnx", "a.npz"} <= {path.name for path in tmp_path.iterdir()}
    assert "10 episodes of tests.playground.envs:Lane at temperature 0: return" in out
    # Both say what a robot's program needs to know of the task.
    said = onnxruntime.InferenceSession("a.onnx").get_modelmeta().custom_metadata_map
    assert said["env_id"] == "tests.playground.envs:Lane"
    assert json.loads(said["ctrl_dt"]) == 0.02 and json.loads(said["action_scale"]) == 0.5
    np.testing.assert_allclose(json.loads(said["default_pose"]), [0.1, 0.2, 0.3])
    with np.load("a.npz") as arrays:
        assert str(arrays["env_id"]) == said["env_id"]
        assert (arrays["ctrl_dt"], arrays["action_scale"]) == (0.02, 0.5)
        np.testing.assert_allclose(arrays["default_pose"], [0.1, 0.2, 0.3])


def test_a_robot_is_told_what_there_is_to_tell():
    """A task without poses has none, and an action that is repeated lasts longer."""
    args = nfpo.Args(config_overrides='{"action_repeat": 3}', impl="jax")
    assert nfpo.about_robot(args, nfpo.make_env(args)) == {"env_id": "CartpoleBalance", "ctrl_dt": pytest.approx(0.03)}


def test_evaluation_in_another_setting(cli, lane_run, monkeypatch):
    """A policy can be tried under other settings, and on randomized models, than it was trained with."""
    returns = nfpo.evaluate(lane_run, eval_episodes=5)
    shorter = nfpo.evaluate(lane_run, eval_episodes=5, config_overrides='{"episode_length": 10}')
    assert all(half < whole for half, whole in zip(shorter, returns))
    with pytest.raises(nfpo.BadInput, match="randomizer"):
        nfpo.evaluate(lane_run, domain_randomization=True)
    monkeypatch.setattr(
        registry, "get_domain_randomizer", lambda _: lambda model, rng: (jax.vmap(jax.random.uniform)(rng), 0)
    )
    slower = nfpo.evaluate(lane_run, eval_episodes=5, domain_randomization=True)
    assert all(b < a for a, b in zip(returns, slower))

    def printed(*flags) -> str:
        status, out, err = cli("--evaluate", lane_run, "--eval-episodes", 5, *flags)
        assert status == 0, err
        return re.search("return (.*)", out)[1]

    assert printed().startswith(f"{np.mean(returns):.1f} ")
    assert printed("--config-overrides", '{"episode_length": 10}').startswith(f"{np.mean(shorter):.1f} ")
    assert printed("--domain-randomization").startswith(f"{np.mean(slower):.1f} ")


def test_evaluation_is_plain_after_randomized_training(lane_run, tmp_path, cli, monkeypatch):
    """Whether training was on randomized models says nothing about evaluation."""
    monkeypatch.setattr(
        registry, "get_domain_randomizer", lambda _: lambda model, rng: (jax.vmap(jax.random.uniform)(rng), 0)
    )
    args = small_args(runs_dir=str(tmp_path), total_timesteps=32, domain_randomization=True)
    run_dir = nfpo.train(args)["run_dir"]
    monkeypatch.setattr(registry, "get_domain_randomizer", lambda _: None)
    status, _, err = cli("--evaluate", run_dir)
    assert status == 0, err


def test_evaluation_is_repeatable_and_plays_the_saved_policy(lane_run):
    """The same seed gives the same returns; temperature 0 plays the mode, which a loop by hand confirms."""
    returns = nfpo.evaluate(lane_run, eval_episodes=5)
    assert returns == nfpo.evaluate(lane_run, eval_episodes=5) and len(set(returns)) == 5
    assert returns != nfpo.evaluate(lane_run, eval_episodes=5, seed=2)
    assert returns != nfpo.evaluate(lane_run, eval_episodes=5, temperature=1.0)
    args = nfpo.from_json(nfpo.load_checkpoint(lane_run)["args"])
    env = nfpo.make_env(args)
    deployed = nfpo.restore_policy(lane_run, nfpo.FlowPolicy, args, env)
    assert deployed.obs_stats.count > 60 and jnp.abs(deployed.obs_stats.mean - 5).max() < 0.5
    key = jax.random.split(jax.random.PRNGKey(1), 5)[0]
    state, total, step = env.reset(jax.random.split(key)[0]), 0.0, jax.jit(env.step)
    for _ in range(20):
        state = step(state, deployed(state.obs[None])[0])
        total += float(state.reward)
    assert total == pytest.approx(returns[0], rel=1e-5)


def test_episodes_end_where_the_environment_ends_them(tmp_path):
    """Rewards after a termination are not counted."""
    run_dir = nfpo.train(small_args(env_id="tests.playground.envs:Diary", runs_dir=str(tmp_path), total_timesteps=32))
    returns = nfpo.evaluate(run_dir["run_dir"], eval_episodes=64)
    possible = {sum(1 + k for k in range(1, length + 1)) for length in range(1, 13)}  # the reward is 1 + age
    assert set(returns) <= possible and len(set(returns)) > 5


def test_twin_trains_evaluates_and_exports(cli, tmp_path):
    """The Gaussian baseline goes through the whole script; only the flow's NumPy export is refused."""
    flags = "--num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1 --critic-hidden-dims 8".split()
    flags += ["--env-id", "tests.playground.envs:Lane", "--total-timesteps", 32, "--exp-name", "twin"]
    assert cli(*flags, policy_class=GaussianPolicy)[0] == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert cli("--evaluate", run_dir, "--export-onnx", "a.onnx", policy_class=GaussianPolicy)[0] == 0
    assert (tmp_path / "a.onnx").exists()
    status, _, err = cli("--evaluate", run_dir, "--export-npz", "a.npz", policy_class=GaussianPolicy)
    assert status == 2 and "--export-npz" in err


def test_metrics_keep_their_names(lane_run):
    """What dashboards read is there, once an iteration, with the environment's own terms."""
    points = scalars(lane_run)
    names = "charts/SPS charts/learning_rate charts/reward losses/approx_kl losses/value_loss losses/entropy"
    names += " losses/explained_variance losses/grad_norm losses/clipfrac flow/log_det flow/scale_saturation"
    for name in names.split():
        assert [step for step, _ in points[name]] == [32, 64], name
    assert "charts/episodes" in points
    assert all(np.isfinite(value) for values in points.values() for _, value in values)


def test_wandb_offline(cli, tmp_path, monkeypatch):
    """--track leaves a Weights & Biases run without an account, and without a login it is one line."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = [*SMALL, "--env-id", "tests.playground.envs:Lane", "--total-timesteps", 64, "--track"]
    assert cli(*flags)[0] == 0
    assert list(tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb"))


def test_episode_terms_are_logged(tmp_path):
    """The environment's metrics appear as means over episodes."""
    flags = {"num_envs": 8, "num_steps": 32, "total_timesteps": 256, "runs_dir": str(tmp_path)}
    run_dir = Path(nfpo.train(small_args(**flags))["run_dir"])
    (step, speed), *_ = scalars(run_dir)["episode/speed"]
    assert step == 256 and 0 < speed < 20
    assert scalars(run_dir)["charts/episodic_length"][0][1] == 20


def test_film(tmp_path):
    """--capture-video films an episode after training, in real time; where nothing can be drawn training still ends."""
    flags = [*SMALL, "--total-timesteps", 32, "--capture-video", "--config-overrides", '{"episode_length": 200}']
    out = finish(start(*flags, cwd=tmp_path, MUJOCO_GL="egl"))
    if "cannot draw" in out:
        assert not list(tmp_path.glob("runs/*/videos"))
        pytest.skip("no off-screen OpenGL here: `apt-get install libegl1`")
    (film,) = tmp_path.glob("runs/*/videos/eval-step32-temperature0-episode-0.mp4")
    with VideoFileClip(str(film)) as clip:
        assert clip.duration == pytest.approx(2, abs=0.1)  # 200 steps of 10 ms, in which an untrained pole falls
        first, last = clip.get_frame(0), clip.get_frame(clip.duration - 0.05)
    assert first.std() > 5 and np.abs(first.astype(float) - last).max() > 50


def test_film_plays_in_real_time_where_actions_are_repeated(lane_run, tmp_path, monkeypatch):
    """A frame lasts as long as its action, which some tasks repeat."""
    dts = []
    monkeypatch.setattr(nfpo, "can_render", lambda *_: True)
    monkeypatch.setattr(nfpo, "FRAME", ())
    monkeypatch.setattr(nfpo, "film", lambda env, frames, alive, dt, *_: dts.append((len(alive), dt)))
    for repeat in (1, 4):
        overrides = json.dumps({"action_repeat": repeat})
        nfpo.evaluate(lane_run, eval_episodes=2, capture_video=True, config_overrides=overrides)
    assert dts == [(20, 0.02), (5, 0.08)]


def test_works_without_warp(tmp_path):
    """Where warp-lang is not installed the physics is MJX in JAX."""
    program = (
        "import sys; sys.modules['warp'] = None\n"
        "import nfpo_playground_jax as nfpo\n"
        "assert nfpo.choose_impl(None) == 'jax'\n"
        "assert nfpo.make_env(nfpo.Args()).mjx_model.impl.value == 'jax'\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(nfpo.__file__).parent, check=True)
