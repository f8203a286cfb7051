"""Promise: the losses are what the papers say, against closed forms and brute force."""

from functools import partial

import pytest
import torch

from rfo.conftest import make, rfo, small_args

MEAN, DEVIATION = 0.7, 0.4  # of the targets


def best_velocity(x, u, obs=None):
    """For targets x_1 ~ N(m, s^2): E[x_1 - eps | x_u], by the conditional mean of two joint Gaussians."""
    variance = u**2 * DEVIATION**2 + (1 - u) ** 2
    covariance = u * DEVIATION**2 - (1 - u)
    return MEAN + covariance / variance * (x - u * MEAN)


def flow_matching(velocity) -> float:
    policy = rfo.FlowPolicy(1, 1)
    policy.velocity = velocity
    torch.manual_seed(0)
    targets = MEAN + DEVIATION * torch.randn(400_000, 1)
    return policy.flow_matching_loss(torch.zeros(400_000, 1), targets).item()


def test_flow_matching_closed_form():
    """The best velocity's loss is the conditional variance, integrated over u; every other velocity's is larger."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    expected = (DEVIATION**2 / (u**2 * DEVIATION**2 + (1 - u) ** 2)).mean().item()
    best = flow_matching(best_velocity)
    assert best == pytest.approx(expected, rel=0.01)
    for factor, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.1)):
        other = partial(lambda factor, shift, x, u, obs: factor * best_velocity(x, u) + shift, factor, shift)
        assert flow_matching(other) > best + 0.005


def test_best_velocity_carries_noise_to_the_targets():
    """Integrated in many steps it makes the targets' mean and deviation of N(0, 1)."""
    policy = rfo.FlowPolicy(1, 1, flow_steps=200)
    policy.velocity = best_velocity
    torch.manual_seed(0)
    actions, x = policy.sample(torch.zeros(100_000, 1))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.01) and x.std().item() == pytest.approx(DEVIATION, abs=0.01)
    torch.testing.assert_close(actions[:, 0], x.tanh())
    assert policy.sample(torch.zeros(1, 1), temperature=0.0)[1].item() == pytest.approx(MEAN, abs=0.01)


def test_flow_is_learned():
    """Minimizing the loss over targets of two modes ends in a policy of two modes, in the paper's few steps."""
    torch.manual_seed(0)
    policy = rfo.FlowPolicy(1, 1, flow_steps=8)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    obs = torch.zeros(512, 1)
    for _ in range(300):
        targets = torch.randint(0, 2, (512, 1)) * 3.0 - 1.5 + 0.1 * torch.randn(512, 1)
        loss = policy.flow_matching_loss(obs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = policy.sample(torch.zeros(4000, 1))[1].detach()
    assert 0.3 < (x > 0.9).float().mean() < 0.7 and 0.3 < (x < -0.9).float().mean() < 0.7


def brute_force_target(t, env, rewards, next_values, terminated, done, gamma, lam) -> float:
    """The lambda-return as the weighted sum of all n-step returns within the episode and the rollout."""
    last = t
    while last < len(rewards) - 1 and not done[last, env]:
        last += 1
    returns = []
    for end in range(t, last + 1):  # the return of rewards t .. end, then the value
        total = sum(gamma ** (k - t) * rewards[k, env].item() for k in range(t, end + 1))
        returns.append(total + gamma ** (end - t + 1) * next_values[end, env].item() * (not terminated[end, env]))
    weights = [(1 - lam) * lam**n for n in range(len(returns))]
    weights[-1] = lam ** (len(returns) - 1)
    return sum(weight * value for weight, value in zip(weights, returns))


def test_td_lambda():
    """Against the weighted sum of n-step returns, episode by episode."""
    torch.manual_seed(0)
    rewards, next_values = torch.randn(2, 12, 5, dtype=torch.float64)
    done = torch.rand(12, 5) < 0.25
    terminated = done & (torch.rand(12, 5) < 0.5)
    found = rfo.td_lambda_targets(rewards, next_values, terminated, done, 0.9, 0.8)
    data = rewards, next_values, terminated, done, 0.9, 0.8
    expected = [[brute_force_target(t, env, *data) for env in range(5)] for t in range(12)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_regularizers_reach_the_loss():
    """Each coefficient multiplies its own part, and the past one waits for the first rollout."""
    args = small_args(past_coef=0.3, uniform_coef=0.7)
    envs, agent = make(args)
    rollout = rfo.collect_rollout(agent, envs, args)
    past = [(rollout["decision_obs"], rollout["latents"].detach())]
    _, parts = rfo.actor_loss(agent, args, rollout, [])
    assert set(parts) == {"losses/actor_loss", "losses/flow_matching_uniform"}
    loss, parts = rfo.actor_loss(agent, args, rollout, past)
    total = parts["losses/actor_loss"] + 0.3 * parts["losses/flow_matching_past"]
    assert loss.item() == pytest.approx(total + 0.7 * parts["losses/flow_matching_uniform"], rel=1e-5)


def test_critics_learn_values():
    """On a problem whose value is known: with all rewards 1 and no end it is 1 / (1 - gamma)."""
    args = small_args(gamma=0.5, critic_epochs=10)
    envs, agent = make(args)
    rollout = rfo.collect_rollout(agent, envs, args)
    rollout["rewards"] = torch.ones_like(rollout["rewards"])
    optimizer = torch.optim.AdamW(agent.critic.parameters(), lr=1e-3)
    for _ in range(20):
        rollout["next_values"] = agent.critic(rollout["obs"]).mean(-1)  # values are the same everywhere
        metrics = rfo.critic_update(agent, optimizer, args, rollout)
    values = agent.critic(rollout["obs"])
    assert values.shape[-1] == 2 and (values - 2).abs().max() < 0.2, values
    assert metrics["losses/value_loss"] < 0.02


def test_chunks():
    """A chunk's actions are played in order, and a new one is drawn where one is used up or an episode has started."""
    args = small_args(env_id="rfo_envs:Falls", action_chunk=4)
    envs, agent = make(args)
    drawn, played = [], []
    sample, step = agent.policy.sample, envs.step

    def watched_sample(*inputs):
        drawn.append((len(played), *sample(*inputs)))
        return drawn[-1][1:]

    def watched_step(action):
        played.append(action.detach())
        return step(action)

    agent.policy.sample, envs.step = watched_sample, watched_step
    rollout = rfo.collect_rollout(agent, envs, args)
    plans = {t: actions for t, actions, _ in drawn}
    starts = {0: [0, 3, 6], 1: [0, 3, 6], 2: [0, 4], 3: [0, 4]}  # episodes of the first two end after three steps
    for env, times in starts.items():
        for t in range(8):
            start = max(time for time in times if time <= t)
            torch.testing.assert_close(played[t][env], plans[start][env, t - start])
    assert len(rollout["latents"]) == sum(map(len, starts.values())) == len(rollout["decision_obs"])


def test_chunks_of_one_are_no_chunks():
    """The same rollout as drawing an action at each step."""
    args = small_args()
    envs, agent = make(args)
    torch.manual_seed(1)
    envs.restart()
    rewards = rfo.collect_rollout(agent, envs, args)["rewards"]
    torch.manual_seed(1)
    envs.restart()
    for t in range(args.horizon):
        action = agent.policy.sample(agent.normalize(envs.obs))[0][:, 0]
        torch.testing.assert_close(envs.step(action)[0], rewards[t], rtol=0, atol=0)


def test_temperature():
    """Multiplies the noise that an action starts from; 0 leaves none."""
    _, agent = make(small_args())
    obs = torch.zeros(50_000, 2)
    assert torch.equal(agent.policy.sample(obs, 0.0)[1], agent.policy.sample(obs, 0.0)[1])
    agent.policy.velocity = lambda x, u, obs: torch.zeros_like(x)
    for temperature in (1.0, 0.5):
        x = agent.policy.sample(obs, temperature)[1]
        assert x.std().item() == pytest.approx(temperature, rel=0.02)


def test_reward_scale():
    """Multiplies the rewards that are trained on, and not the returns that are reported."""
    rewards, episodes = [], []
    for scale in (1.0, 0.1):
        envs, agent = make(small_args(reward_scale=scale, env_kwargs={"episode_length": 5}))
        rewards.append(rfo.collect_rollout(agent, envs, small_args(reward_scale=scale))["rewards"])
        episodes.append(envs.episodes)
    torch.testing.assert_close(rewards[1], 0.1 * rewards[0])
    assert len(episodes[0]) == 4 and episodes[0] == episodes[1]
