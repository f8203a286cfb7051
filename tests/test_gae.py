"""`compute_gae` against formulations that share nothing with its recursion."""

import pytest
import torch

from nfpo_continuous_action import compute_gae

STEPS, ENVS = 40, 6


def random_rollout(seed, dtype=torch.float64):
    """Rewards, values, next values, terminated and done, with both kinds of ends, some on consecutive steps."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, STEPS, ENVS, generator=generator, dtype=dtype)
    ends = torch.rand(2, STEPS, ENVS, generator=generator)
    terminated, truncated = ends < 0.08
    truncated[-1, 0] = terminated[-1, 1] = True  # an episode may end with the rollout, by either
    truncated[:, 2] = terminated[:, 2] = False  # or outlive it
    assert (terminated & ~truncated).any() and (truncated & ~terminated).any()
    return rewards, values, next_values, terminated, terminated | truncated


def episode_end(done, t, env):
    """The last step of the episode that step t belongs to, or of the rollout."""
    return next((k for k in range(t, STEPS) if done[k, env]), STEPS - 1)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
def test_gae_is_the_discounted_sum_of_td_errors_until_the_episode_ends(as_float, gae_lambda):
    """A_t = sum_k (gamma * lambda)^k * delta_(t+k) within the episode, for bool and for 0/1 flags."""
    gamma = 0.9
    rewards, values, next_values, terminated, done = random_rollout(seed=1)
    flags = (terminated.double(), done.double()) if as_float else (terminated, done)
    advantages = compute_gae(rewards, values, next_values, *flags, gamma, gae_lambda)
    for env in range(ENVS):
        for t in range(STEPS):
            expected = 0.0
            for k in range(t, episode_end(done, t, env) + 1):
                future = 0.0 if terminated[k, env] else gamma * next_values[k, env].item()
                delta = rewards[k, env].item() + future - values[k, env].item()
                expected += (gamma * gae_lambda) ** (k - t) * delta
            assert advantages[t, env].item() == pytest.approx(expected, abs=1e-12)


def test_gae_has_no_use_for_the_value_of_a_terminated_state():
    """A simulation that broke may end its episode with an observation, and so a value, that is no number."""
    rewards, values, next_values, terminated, done = random_rollout(seed=3)
    expected = compute_gae(rewards, values, next_values, terminated, done, 0.9, 0.95)
    next_values[terminated] = float("nan")
    assert torch.equal(compute_gae(rewards, values, next_values, terminated, done, 0.9, 0.95), expected)


def test_gae_with_lambda_1_is_the_discounted_return_minus_the_value():
    """With lambda 1 and consistent values, A_t + V_t is the return, bootstrapped unless the episode terminated."""
    gamma = 0.97
    rewards, values, next_values, terminated, done = random_rollout(seed=2)
    going_on = ~done[:-1]  # within an episode the next state's value is the next row's value
    next_values[:-1][going_on] = values[1:][going_on]
    advantages = compute_gae(rewards, values, next_values, terminated, done, gamma, 1.0)
    for env in range(ENVS):
        for t in range(STEPS):
            end = episode_end(done, t, env)
            expected = sum(gamma ** (k - t) * rewards[k, env].item() for k in range(t, end + 1))
            if not terminated[end, env]:
                expected += gamma ** (end - t + 1) * next_values[end, env].item()
            assert (advantages + values)[t, env].item() == pytest.approx(expected, abs=1e-12)
