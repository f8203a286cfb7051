"""Promise: a simulation that breaks ends its own episode, with reward 0, and neither the run nor the statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import FLAGS, collect, first_agent, run_folder, scalars

ENVS = 16


@pytest.mark.parametrize("damage, full_reset", [("nan", False), ("1e20", False), ("-inf", True)])
def test_a_broken_simulation_ends_its_own_episode(damage, full_reset):
    """Whatever the numbers become, episodes end there and start whole; what was learned from stays small."""
    flags = {"env_id": "tests.playground.envs:Breaks", "num_envs": ENVS, "num_steps": 40, "full_reset": full_reset}
    args, envs, before = first_agent(config_overrides={"damage": damage}, total_timesteps=10_000, **flags)
    start = before.env_state.info
    assert start["_steps"].dtype == jnp.int32 and len(np.unique(start["_steps"])) > 5
    np.testing.assert_array_equal(start["_steps"], start["steps"])
    agent, rollout, metrics = collect(before, envs, args)
    obs, terminated, done = rollout[0]["state"], np.asarray(rollout[-2]), np.asarray(rollout[-1])
    for numbers in (obs, *rollout[1:]):
        assert np.isfinite(numbers).all()
    for stats in (agent.obs_stats, agent.return_stats):
        for numbers in (*jax_leaves(stats.mean), *jax_leaves(stats.std)):
            assert (np.abs(numbers) < 100).all()
    assert all(np.isfinite(value) for value in metrics.values())
    # It takes 4 steps at least to break, and an episode that started with what was left of another would break at once.
    ends = [np.flatnonzero(done[:, env]) for env in range(ENVS)]
    assert min(np.diff(x).min() for x in ends if len(x) > 1) >= 4
    assert metrics["charts/episodic_length"] < 20
    # The first episodes may meet their time limit; all other ends are breaks, and none is a termination.
    broken = int(metrics["charts/broken_episodes"])
    assert not terminated.any() and done.sum() - ENVS <= broken <= done.sum() and broken > 2 * ENVS
    raw = np.asarray(rollout[3]) * np.asarray(agent.return_stats.std)
    late = np.arange(40)[:, None] >= 20
    assert (raw[(done == 1) & late] == 0).all() and (raw[done == 0] != 0).all()
    # A task's own count of steps starts anew where the episode does.
    after = agent.env_state
    np.testing.assert_array_equal(after.info["_steps"], np.where(after.done, 0, after.info["steps"]))


def jax_leaves(tree) -> list:
    return [np.asarray(x) for x in tree.values()] if isinstance(tree, dict) else [np.asarray(tree)]


def test_the_run_goes_on(cli, tmp_path):
    """Broken episodes are counted over the whole run, in every logged number nothing is left of them, and such a policy
    is evaluated and exported."""
    status, _, err = cli(*FLAGS, "--env-id", "tests.playground.envs:Breaks", "--total-timesteps", 640)
    assert status == 0, err
    run_dir = run_folder(tmp_path)
    points = scalars(run_dir)
    for name, values in points.items():
        assert np.isfinite([value for _, value in values]).all(), name
    counts = [count for _, count in points["charts/broken_episodes"]]
    assert len(counts) == 20 and counts == sorted(counts) and counts[-1] > 20
    returns = nfpo.evaluate(run_dir, export_onnx=str(tmp_path / "a.onnx"))
    assert np.isfinite(returns).all() and (tmp_path / "a.onnx").exists()


def test_parameters_that_break_stop_the_run(cli, monkeypatch, tmp_path):
    """Parameters that are no numbers stop training with one line and status 3, and the checkpoint before it stays."""
    right_loss = nfpo.ppo_loss

    def loss(params, *others, **more):
        value, metrics = right_loss(params, *others, **more)
        late = params["critic"]["Dense_1"]["bias"][0] != 0  # after the first step
        return value * jnp.where(late, jnp.nan, 1.0), metrics

    monkeypatch.setattr(nfpo, "ppo_loss", loss)
    status, _, err = cli(*FLAGS, "--total-timesteps", 320, "--update-epochs", 1, "--num-minibatches", 1)
    lines = [line for line in err.splitlines() if line and "it/s" not in line]  # the bar has a line of its own
    assert status == 3 and len(lines) == 1 and "are not finite after step 32" in lines[0], err
    assert nfpo.load_checkpoint(run_folder(tmp_path), nfpo.FlowPolicy)["global_step"] == 32
