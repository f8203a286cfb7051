"""A time limit is no death, and what a rollout hands on is exact where episodes end."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_agent

from nfpo_continuous_action import Args, collect_rollout, load_checkpoint, make_envs, train

GAMMA, TIME_LIMIT = 0.9, 10


class Forever(gym.Env):
    """Reward 1 in every step, and observations that tell nothing, not even the time."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), 1.0, False, False, {}

    def observe(self):
        return self.np_random.normal(size=2).astype(np.float32)


class Diary(Forever):
    """Random rewards and terminations, observations that grow with the episode, and a record of all of it."""

    def __init__(self):
        self.diary = []  # of (observation, reward, terminated, is_reset)

    def reset(self, *, seed=None, options=None):
        self.age = 0
        obs, info = super().reset(seed=seed)
        self.diary.append((obs, 0.0, False, True))
        return obs, info

    def step(self, action):
        self.age += 1
        reward, terminated = float(self.np_random.normal(1.0)), bool(self.np_random.random() < 0.1)
        self.diary.append((self.observe(), reward, terminated, False))
        return self.diary[-1][0], reward, terminated, False, {}

    def observe(self):
        return (3 + 2 * self.age + self.np_random.normal(size=2)).astype(np.float32)


gym.register("Forever-v0", Forever, max_episode_steps=TIME_LIMIT)
gym.register("Diary-v0", Diary, max_episode_steps=TIME_LIMIT)


def test_value_of_an_endless_reward_is_that_of_an_endless_episode(tmp_path):
    """With reward 1 forever the critic learns 1 / (1 - gamma), although every episode is cut after ten steps."""
    args = Args(
        env_id="Forever-v0",
        total_timesteps=16_000,
        num_envs=8,
        num_steps=40,
        num_minibatches=4,
        update_epochs=4,
        learning_rate=3e-3,
        gamma=GAMMA,
        clip_vloss=False,
        compile=False,
        runs_dir=str(tmp_path),
    )
    checkpoint = load_checkpoint(train(args)["run_dir"])
    agent = make_agent(2, 1)
    agent.load_state_dict(checkpoint["agent"])
    with torch.no_grad():  # in units of the environment's reward
        value = agent.critic(torch.randn(1000, 2)).mean().item() * agent.return_stats.var.sqrt().item()
    endless = 1 / (1 - GAMMA)
    print(f"value {value:.2f}, endless {endless:.2f}, were limits deaths {mean_of_ten_steps():.2f}")
    assert value == pytest.approx(endless, rel=0.1)


def mean_of_ten_steps():
    """What a critic that cannot see the time would learn if the time limit were a death."""
    return float(np.mean([(1 - GAMMA**left) / (1 - GAMMA) for left in range(1, TIME_LIMIT + 1)]))


class Recorded:
    """Two rollouts on Diary, and the same told by the environments' own records."""

    def __init__(self, num_envs=3, num_steps=150):
        args = Args(env_id="Diary-v0", num_steps=num_steps, gamma=GAMMA)
        envs = make_envs(args, num_envs, seed=1)
        for env in envs.envs.envs:  # what was played to see whether it works, up to the last reset
            del env.unwrapped.diary[:-1]
        self.agent = make_agent(2, 1)
        parts = [collect_rollout(self.agent, envs, self.agent.act, args) for _ in range(2)]
        parts = [torch.cat(pair).numpy() for pair in zip(*parts)]
        self.obs, _, _, self.rewards, self.values, self.next_values, self.terminated, self.done = parts
        self.episodes = envs.episodes
        self.num_steps = 2 * num_steps

        # The diaries, as (T, N): what a step returned, and what the policy saw next (the reset's where one followed).
        steps = [[entry for entry in env.unwrapped.diary if not entry[3]] for env in envs.envs.envs]
        self.raw_rewards = np.array([[entry[1] for entry in env] for env in steps]).T
        self.raw_terminated = np.array([[entry[2] for entry in env] for env in steps]).T
        self.raw_final = np.array([[entry[0] for entry in env] for env in steps]).swapaxes(0, 1)
        self.raw_seen = np.array([self.seen(env.unwrapped.diary) for env in envs.envs.envs]).swapaxes(0, 1)
        self.raw_done = np.array([self.ends(env.unwrapped.diary) for env in envs.envs.envs]).T
        envs.envs.close()

    @staticmethod
    def seen(diary):
        """The first observation, and after every step the observation that the next action is chosen on."""
        return [e[0] for i, e in enumerate(diary) if i + 1 == len(diary) or not diary[i + 1][3]]

    @staticmethod
    def ends(diary):
        """For every step, whether a reset followed."""
        return [i + 1 < len(diary) and diary[i + 1][3] for i, e in enumerate(diary) if not e[3]]


@pytest.fixture(scope="module")
def recorded():
    recorded = Recorded()
    truncated = recorded.raw_done & ~recorded.raw_terminated
    assert truncated.sum() > 20 and recorded.raw_terminated.sum() > 20  # both kinds of ends are tested
    return recorded


def test_flags_tell_terminations_from_time_limits(recorded):
    """`terminated` and `done` of the buffer are the environment's."""
    assert np.array_equal(recorded.terminated, recorded.raw_terminated)
    assert np.array_equal(recorded.done, recorded.raw_done)


def test_obs_statistics_are_the_mean_and_variance_of_what_the_policy_saw(recorded):
    """The running statistics equal NumPy's over all observations acted on; final observations are not among them."""
    seen = recorded.raw_seen[:-1].reshape(-1, 2)  # the last one is acted on in the next rollout
    assert len(seen) == 3 * recorded.num_steps
    np.testing.assert_allclose(recorded.agent.obs_stats.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(recorded.agent.obs_stats.var, seen.var(0), rtol=1e-5)


def test_obs_are_normalized_with_the_statistics_of_their_time(recorded):
    """Each observation of the buffer is normalized with all that had been seen by then, itself included."""
    for t in range(10, recorded.num_steps):
        so_far = recorded.raw_seen[: t + 1].reshape(-1, 2)
        expected = (recorded.raw_seen[t] - so_far.mean(0)) / so_far.std(0)
        np.testing.assert_allclose(recorded.obs[t], expected, atol=2e-3)


def normalized(recorded, raw):
    """As at the end of the rollouts, in which the statistics hardly move any more."""
    seen = recorded.raw_seen[:-1].reshape(-1, 2)
    return torch.from_numpy((raw - seen.mean(0)) / seen.std(0)).float()


def test_next_value_at_an_end_is_that_of_the_final_observation(recorded):
    """Where an episode ended, `next_values` is V(final observation), in the second rollout with the last statistics."""
    checked = 0
    for t, env in zip(*np.nonzero(recorded.raw_done)):
        if t < recorded.num_steps // 2:
            continue
        with torch.no_grad():
            expected = recorded.agent.critic(normalized(recorded, recorded.raw_final[t, env])[None]).item()
        assert recorded.next_values[t, env] == pytest.approx(expected, abs=5e-5)
        if t + 1 < recorded.num_steps:
            assert abs(recorded.next_values[t, env] - recorded.values[t + 1, env]) > 1e-4  # not the reset's
        checked += 1
    assert checked > 20


def test_next_value_within_an_episode_is_that_of_the_next_row(recorded):
    """Where no episode ended, `next_values[t]` is `values[t + 1]` within a rollout."""
    for start in (0, recorded.num_steps // 2):
        rows = slice(start, start + recorded.num_steps // 2 - 1)
        going_on = ~recorded.raw_done[rows]
        following = recorded.values[rows.start + 1 : rows.stop + 1]
        np.testing.assert_allclose(recorded.next_values[rows][going_on], following[going_on], atol=1e-5)


def test_rewards_are_divided_by_the_std_of_returns_that_restart_with_each_episode(recorded):
    """The discounted return includes an episode's last reward and then starts anew, whatever ended the episode."""
    discounted, running = [], np.zeros(3)
    for t in range(recorded.num_steps):
        running = GAMMA * running + recorded.raw_rewards[t]
        discounted.append(running)
        running = np.where(recorded.raw_done[t], 0.0, running)
        if t >= 10:
            expected = recorded.raw_rewards[t] / np.std(discounted)
            np.testing.assert_allclose(recorded.rewards[t], expected, rtol=2e-4)


def test_episodic_returns_are_raw_and_undiscounted(recorded):
    """The returns and lengths handed out are sums of the environment's own rewards from reset to end."""
    expected = []
    for env in range(3):
        start = 0
        for end in np.nonzero(recorded.raw_done[:, env])[0]:
            expected.append((recorded.raw_rewards[start : end + 1, env].sum(), end + 1 - start))
            start = end + 1
    found = sorted((length, episodic_return) for episodic_return, length in recorded.episodes)
    np.testing.assert_allclose(found, sorted((length, episodic_return) for episodic_return, length in expected))
