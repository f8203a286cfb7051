"""Promise: a time limit is no death, although environments reset themselves within the step that meets it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import collect, first_agent, small_args

ENVS, STEPS, LIMIT = 16, 30, 12


def rollout_of_diary(**flags):
    """A rollout over several episodes of the environment that counts its steps in its observation."""
    flags = {"env_id": "tests.playground.envs:Diary", "num_envs": ENVS, "num_steps": STEPS, "gamma": 0.9, **flags}
    args, envs, before = first_agent(total_timesteps=10_000, **flags)
    return before, *collect(before, envs, args)


@pytest.mark.parametrize("full_reset", [False, True], ids=["cached reset", "full reset"])
def test_next_values_are_those_of_the_states_that_followed(full_reset):
    """At every step, the ends included, the next value is the critic's of the observation after that very step; ends by
    the limit are no terminations."""
    before, agent, rollout, _ = rollout_of_diary(full_reset=full_reset)
    obs, _, _, _, _, next_values, terminated, done = map(np.asarray, (rollout[0]["state"], *rollout[1:]))
    # Statistics were fresh, so that normalization only clips, and the diary's numbers stay below 10 with this one.
    age, episode = obs.transpose(2, 0, 1)
    followed = np.stack((np.minimum(age + 1, 10), episode), -1)
    privileged = np.concatenate((followed, -followed), -1)
    expected = agent.value({"state": followed, "privileged_state": privileged})
    unclipped = age < 9  # where clipping hides nothing
    np.testing.assert_allclose(next_values[unclipped], expected[unclipped], rtol=1e-4, atol=1e-5)
    # The rows themselves say where an episode ended: the next one starts at age 0.
    np.testing.assert_array_equal(done[:-1] == 1, age[1:] == 0)
    assert terminated.sum() > 5 and (done - terminated).sum() > 5
    steps = np.asarray(before.env_state.info["steps"])  # the first episodes start somewhere
    assert len(np.unique(steps)) > 5
    for t in range(STEPS):
        truncated = (steps + 1 >= LIMIT) & (terminated[t] == 0)
        np.testing.assert_array_equal(done[t] - terminated[t] == 1, truncated)
        steps = np.where(done[t] == 1, 0, steps + 1)
    starts = len(np.unique(episode[:, 0]))
    assert starts > 1 if full_reset else starts == 1, "--full-reset starts anew, the default at the first state"


def test_episodes_are_counted_whole():
    """Mean return and length are those of the episodes that ended, without the first, which started in the middle."""
    before, _, rollout, metrics = rollout_of_diary()
    done = np.asarray(rollout[-1])
    returns, lengths = [], []
    for env in range(ENVS):
        whole = before.env_state.info["steps"][env] == 0
        length = 0
        for t in range(STEPS):
            length += 1
            if done[t, env]:
                if whole:
                    lengths.append(length)
                    returns.append(sum(1 + k for k in range(1, length + 1)))  # the reward is 1 + age
                whole, length = True, 0
    assert 5 < len(lengths) < done.sum()
    assert metrics["charts/episodes"] == len(lengths) and metrics["charts/broken_episodes"] == 0
    assert metrics["charts/episodic_length"] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert metrics["charts/episodic_return"] == pytest.approx(np.mean(returns), rel=1e-5)


def test_discounted_return_starts_anew():
    """What rewards are divided by comes from discounted returns within episodes, and rewards are clipped after it."""
    before, agent, rollout, _ = rollout_of_diary()
    done, rewards = np.asarray(rollout[-1]), np.asarray(rollout[3])
    count, running, seen, raw = np.asarray(before.env_state.data)[:, 0], np.zeros(ENVS), [], []
    for t in range(STEPS):
        count = count + 1
        raw.append(1 + count)
        running = 0.9 * running + raw[-1]
        seen.append(running)
        running, count = np.where(done[t], 0, running), np.where(done[t], 0, count)
    assert agent.return_stats.mean == pytest.approx(np.mean(seen), rel=1e-4)
    np.testing.assert_allclose(rewards, np.clip(raw / np.std(seen), -10, 10), rtol=1e-3)


def test_statistics_are_those_of_the_observations_acted_on():
    """Mean and deviation of what was seen, of policy and critic, and not of observations after the last step."""
    before, agent, rollout, _ = rollout_of_diary()
    done, data = np.asarray(rollout[-1]), np.asarray(before.env_state.data)
    age, ages = data[:, 0], []
    for t in range(STEPS):
        ages.append(age)
        age = np.where(done[t], 0, age + 1)
    stats = agent.obs_stats
    assert stats.mean["state"][0] == pytest.approx(np.mean(ages), rel=1e-4)
    assert stats.std["state"][0] == pytest.approx(np.std(ages), rel=1e-4)
    np.testing.assert_allclose(stats.mean["privileged_state"], [*stats.mean["state"], *-stats.mean["state"]], rtol=1e-5)


def test_actions_are_repeated():
    """A step of an environment that repeats its actions is several of the simulator, and counts as such."""
    overrides = {"action_repeat": 3, "episode_length": 12}
    flags = {"env_id": "tests.playground.envs:Forever", "config_overrides": overrides, "random_initial_steps": False}
    args, envs, agent = first_agent(**flags)
    _, (*_, terminated, done), metrics = collect(agent, envs, args)
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(done)[:, 0]), [3, 7])
    assert not np.asarray(terminated).any()
    assert metrics["charts/episodic_length"] == 12 and metrics["charts/episodic_return"] == 12


def test_value_of_an_endless_reward_is_that_of_an_endless_episode(tmp_path):
    """With reward 1 forever the critic learns 1 / (1 - gamma), although every episode is cut after ten steps."""
    flags = {"env_id": "tests.playground.envs:Forever", "num_envs": 64, "num_steps": 20, "update_epochs": 4}
    flags |= {"learning_rate": 3e-3, "gamma": 0.9, "clip_vloss": False, "total_timesteps": 128_000}
    run_dir = nfpo.train(small_args(**flags, runs_dir=str(tmp_path)))["run_dir"]
    _, _, agent = first_agent(**flags)
    agent = nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy, agent)["agent"]
    value = jax.jit(agent.value)({"state": jnp.zeros((1, 2))})[0] * agent.return_stats.std
    assert value == pytest.approx(10, rel=0.1)  # 6.5 where a time limit is taken for a death
