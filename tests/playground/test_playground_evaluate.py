"""Promise: --evaluate plays the trained policy, repeatably, to an end."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco_playground import registry

import nfpo_playground_jax as nfpo
from benchmarks.baselines.ppo_playground_jax import GaussianPolicy
from playground.conftest import first_agent, small_args


def test_it_plays_the_saved_policy(lane_run):
    """The same seed gives the same returns, another or noise gives others; a loop by hand confirms the first."""
    returns = nfpo.evaluate(lane_run, eval_episodes=5)
    assert returns == nfpo.evaluate(lane_run, eval_episodes=5) and len(set(returns)) == 5
    assert returns != nfpo.evaluate(lane_run, eval_episodes=5, seed=2)
    assert returns != nfpo.evaluate(lane_run, eval_episodes=5, temperature=1.0)
    agent = nfpo.load_checkpoint(lane_run, nfpo.FlowPolicy, first_agent()[2])["agent"]
    assert jnp.abs(agent.obs_stats.mean["state"] - 5).max() < 0.5
    _, envs, fresh = first_agent(num_envs=5, random_initial_steps=False)
    state, total = fresh.env_state, np.zeros(5)
    step = jax.jit(lambda state: envs.step(state, agent.act({"state": state.obs}, None, 0.0)[-1]))
    for _ in range(20):
        state = step(state)
        total += np.asarray(state.reward)
    np.testing.assert_allclose(returns, total, rtol=1e-5)


def test_episodes_end_where_the_environment_ends_them(tmp_path):
    """Rewards after a termination are not counted."""
    run_dir = nfpo.train(small_args(env_id="tests.playground.envs:Diary", runs_dir=str(tmp_path)))["run_dir"]
    returns = nfpo.evaluate(run_dir, eval_episodes=64)
    possible = {sum(1 + k for k in range(1, length + 1)) for length in range(1, 13)}  # the reward is 1 + age
    assert set(returns) <= possible and len(set(returns)) > 5


def test_an_endless_episode_is_cut(cli, lane_run, monkeypatch):
    """Where the time limit is late, episodes end at a stated one, and a bar shows how far they are."""
    monkeypatch.setattr(nfpo, "MAX_EVAL_STEPS", 30)
    status, out, err = cli("--evaluate", lane_run, "--config-overrides", '{"episode_length": 1000000000}')
    assert status == 0 and "cut after 30 steps" in out and "30.0/30.0" in err
    assert "cut" not in cli("--evaluate", lane_run)[1]


def test_another_setting_than_in_training(cli, lane_run, monkeypatch):
    """A policy can be tried under other settings, and on randomized models, than it was trained with."""
    returns = nfpo.evaluate(lane_run, eval_episodes=5)
    shorter = nfpo.evaluate(lane_run, eval_episodes=5, config_overrides={"episode_length": 10})
    assert all(half < whole for half, whole in zip(shorter, returns))
    with pytest.raises(nfpo.BadInput, match="no randomizer for --domain-randomization"):
        nfpo.evaluate(lane_run, domain_randomization=True)

    def slower_models(model, rng):
        return 0.5 * jax.vmap(jax.random.uniform)(rng), 0

    monkeypatch.setattr(registry, "get_domain_randomizer", lambda _: slower_models)
    slower = nfpo.evaluate(lane_run, eval_episodes=5, domain_randomization=True)
    losses = np.subtract(returns, slower)
    assert (losses > 0).all() and np.ptp(losses) > 0.1, "each environment has a model of its own"
    status, out, _ = cli("--evaluate", lane_run, "--eval-episodes", 5, "--domain-randomization")
    assert re.search("return (.*) ±", out)[1] == f"{np.mean(slower):.1f}"


def test_twin_goes_through_the_whole_script(cli, tmp_path):
    """The Gaussian baseline trains, is evaluated and exported; no other script's run is taken for its own."""
    flags = "--num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 1 --critic-hidden-dims 8".split()
    flags += ["--env-id", "tests.playground.envs:Lane", "--total-timesteps", 32, "--exp-name", "a twin"]
    status, out, err = cli(*flags, policy_class=GaussianPolicy)
    assert status == 0, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"--evaluate 'runs/{run_dir.name}'" in out, "a name with a space is quoted"
    assert nfpo.load_checkpoint(run_dir, GaussianPolicy)["global_step"] == 32
    assert cli("--evaluate", run_dir, "--export-onnx", "a.onnx", policy_class=GaussianPolicy)[0] == 0
    assert (tmp_path / "a.onnx").exists()
    for flag in ("--resume", "--evaluate"):
        status, _, err = cli(flag, run_dir)
        assert status == 2 and "GaussianPolicy" in err and "FlowPolicy" in err and len(err.strip().splitlines()) == 1
