"""A time limit is no death, although environments reset themselves within the step that meets it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import learner_and_state, small_args

ENVS, STEPS, LIMIT = 16, 30, 12


def rollout_of_diary(**flags):
    """A rollout over several episodes of the environment that counts its steps in its observation."""
    flags = {"env_id": "tests.playground.envs:Diary", "num_envs": ENVS, "num_steps": STEPS, **flags}
    learner, state = learner_and_state(**flags)
    before = jax.device_get(state)
    state, rollout, metrics = jax.jit(functools.partial(nfpo.collect_rollout, learner))(state)
    return learner, before, state, rollout, metrics


@pytest.mark.parametrize("full_reset", [False, True], ids=["cached reset", "full reset"])
def test_next_values_are_those_of_the_states_that_followed(full_reset):
    """At every step, the ends included, the next value is the critic's of the observation after that very step; ends by
    the limit are no terminations."""
    learner, before, state, rollout, _ = rollout_of_diary(full_reset=full_reset)
    # Statistics were fresh, so that normalization only clips, and the diary's numbers stay below 10 with this one.
    age, episode = np.asarray(rollout.obs["state"]).transpose(2, 0, 1)
    done, terminated = np.asarray(rollout.done), np.asarray(rollout.terminated)
    followed = np.stack((np.minimum(age + 1, 10), episode), -1)
    privileged = np.concatenate((followed, -followed), -1)
    expected = learner.critic.apply({"params": state.params["critic"]}, privileged)
    unclipped = age < 9  # where clipping hides nothing
    np.testing.assert_allclose(rollout.next_values[unclipped], expected[unclipped], rtol=1e-4, atol=1e-5)
    # The rows themselves say where an episode ended: the next one starts at age 0.
    np.testing.assert_array_equal(done[:-1] == 1, age[1:] == 0)
    assert terminated.sum() > 5 and (done - terminated).sum() > 5
    steps = np.asarray(before.env_state.info["steps"]) * np.ones((1, ENVS))  # the first episodes start somewhere
    for t in range(STEPS):
        truncated = (steps[0] + 1 >= LIMIT) & (terminated[t] == 0)
        np.testing.assert_array_equal(done[t] - terminated[t] == 1, truncated)
        steps = np.where(done[t] == 1, 0, steps + 1)
    if full_reset:
        assert len(np.unique(episode[:, 0])) > 1, "the environment did not start anew"
    else:
        assert len(np.unique(episode[:, 0])) == 1, "the environment did not return to its first state"


def test_episodes_are_counted_whole():
    """Mean return and length are those of the episodes that ended, without the first, which started in the middle."""
    _, before, _, rollout, metrics = rollout_of_diary()
    done, age = np.asarray(rollout.done), np.asarray(rollout.obs["state"])[..., 0]
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
    assert age.max() > 0 and 5 < len(lengths) < done.sum()
    assert metrics["charts/episodes"] == len(lengths)
    assert metrics["charts/episodic_length"] == pytest.approx(np.mean(lengths), rel=1e-5)
    assert metrics["charts/episodic_return"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics["charts/reward"] == pytest.approx(np.mean(1 + np.minimum(age, 99) + 1), rel=0.2)


def test_a_task_that_counts_its_steps_counts_as_we_do():
    """A task's own count starts where ours starts and starts anew where ours does, after a broken simulation too."""
    learner, state = learner_and_state(env_id="tests.playground.envs:Breaks", num_envs=ENVS)
    start = state.env_state.info
    assert start["_steps"].dtype == jnp.int32 and len(np.unique(start["_steps"])) > 5
    np.testing.assert_array_equal(start["_steps"], start["steps"])
    state, rollout, metrics = jax.jit(functools.partial(nfpo.collect_rollout, learner))(state)
    assert metrics["charts/broken_environments"] > 5 and (rollout.done - rollout.terminated).sum() > 0
    after = state.env_state
    np.testing.assert_array_equal(after.info["_steps"], np.where(after.done, 0, after.info["steps"]))


def test_discounted_return_starts_anew():
    """What rewards are divided by comes from discounted returns within episodes, and rewards are clipped after it."""
    learner, before, state, rollout, _ = rollout_of_diary(gamma=0.9)
    done, age = np.asarray(rollout.done), np.asarray(rollout.obs["state"])[..., 0]
    # Ages are clipped at 10 in the observation; count them again.
    start = np.asarray(before.env_state.data)[:, 0]
    running, count, seen, rewards = np.zeros(ENVS), start.copy(), [], []
    for t in range(STEPS):
        count = count + 1
        rewards.append(1 + count)
        running = 0.9 * running + 1 + count
        seen.append(running.copy())
        running, count = np.where(done[t], 0, running), np.where(done[t], 0, count)
    assert age.max() == 10
    assert state.reward_stats.mean == pytest.approx(np.mean(seen), rel=1e-4)
    np.testing.assert_allclose(rollout.rewards, np.clip(rewards / np.std(seen), -10, 10), rtol=1e-3)
    np.testing.assert_allclose(state.discounted_return, running, rtol=1e-4)


def test_value_of_an_endless_reward_is_that_of_an_endless_episode(tmp_path):
    """With reward 1 forever the critic learns 1 / (1 - gamma), although every episode is cut after ten steps."""
    args = small_args(
        env_id="tests.playground.envs:Forever",
        num_envs=64,
        num_steps=20,
        total_timesteps=128_000,
        update_epochs=4,
        learning_rate=3e-3,
        gamma=0.9,
        clip_vloss=False,
        runs_dir=str(tmp_path),
    )
    run_dir = nfpo.train(args)["run_dir"]
    learner = nfpo.make_learner(args, nfpo.FlowPolicy, nfpo.make_envs(args))
    state = nfpo.restore(run_dir, "state", *nfpo.describe_state(learner, nfpo.make_mesh(args)))
    value = learner.critic.apply({"params": state.params["critic"]}, jnp.zeros((1, 2)))[0] * state.reward_stats.std
    assert value == pytest.approx(10, rel=0.1)  # 6.5 where a time limit is taken for a death
