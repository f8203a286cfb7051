"""Promise: the return is differentiated rightly, through policy and simulator, across no reset and past every reset."""

import torch
from rfo_envs import Linear

from rfo.conftest import make, rfo, small_args

DOUBLE = {"dtype": "float64"}


def loss_of(envs, agent, args):
    """The loss of one rollout, always of the same noise and from the same states."""
    torch.manual_seed(5)
    envs.restart()
    rollout = rfo.collect_rollout(agent, envs, args)
    return rfo.actor_loss(agent, args, rollout, [])[0]


def check_against_finite_differences(args):
    envs, agent = make(args, double=True)
    parameters = list(agent.policy.parameters())
    gradients = torch.autograd.grad(loss_of(envs, agent, args), parameters)
    for parameter, gradient in zip(parameters, gradients):
        row = int(gradient.abs().argmax())
        step, flat = 1e-6, parameter.data.view(-1)
        with torch.no_grad():
            before = flat[row].item()
            flat[row] = before + step
            above = loss_of(envs, agent, args)
            flat[row] = before - step
            below = loss_of(envs, agent, args)
            flat[row] = before
        torch.testing.assert_close((above - below) / (2 * step), gradient.view(-1)[row], rtol=1e-5, atol=1e-9)


def test_finite_differences():
    """The largest entry of every parameter's gradient is the loss's slope, in float64, the critic in it. (The losses of
    flow matching take the visited states as given, so that their slope is not the gradient.)"""
    check_against_finite_differences(small_args(env_kwargs=DOUBLE, uniform_coef=0))


def test_finite_differences_with_resets_and_chunks():
    """Also where episodes end within the rollout, two actions at a time."""
    check_against_finite_differences(
        small_args(env_id="rfo_envs:Falls", env_kwargs=DOUBLE, action_chunk=2, uniform_coef=0)
    )


class LinearPolicy(torch.nn.Module):
    """a = -K o, without noise and without tanh."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(action_dim, obs_dim))

    def sample(self, obs, temperature=1.0):
        x = -obs @ self.gain.T
        return x[:, None], x


def riccati(gamma: float) -> torch.Tensor:
    """The best gain of the discounted problem, by iterating its Riccati equation."""
    A, B, Q, R, P = Linear.A, Linear.B, Linear.Q, Linear.R, torch.zeros(2, 2, dtype=torch.float64)
    for _ in range(2000):
        K = torch.linalg.solve(R + gamma * B.T @ P @ B, gamma * B.T @ P @ A)
        P = Q + gamma * A.T @ P @ (A - B @ K)
    return K


def test_riccati():
    """Following the gradient through a long rollout ends at the best linear controller."""
    args = small_args(env_kwargs=DOUBLE, num_envs=64, horizon=120, gamma=0.9, uniform_coef=0, total_timesteps=7680)
    envs, agent = make(args, LinearPolicy, double=True)
    agent.normalize = lambda obs: obs
    agent.critic.forward = lambda obs: obs.new_zeros(*obs.shape[:-1], 2)  # 0.9 ** 120 of the last state's value
    best = riccati(args.gamma)
    assert (agent.policy.gain.detach() - best).abs().max() > 0.3
    optimizer = torch.optim.LBFGS(agent.policy.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(envs, agent, args)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(agent.policy.gain.detach(), best, rtol=1e-3, atol=1e-3)


class OpenLoop(torch.nn.Module):
    """Plays given actions (T, N, 1), one after the other."""

    def __init__(self, actions):
        super().__init__()
        self.actions, self.t = actions, -1

    def sample(self, obs, temperature=1.0):
        self.t += 1
        return self.actions[self.t][:, None], self.actions[self.t]


def test_resets_cut_one_environment_only():
    """A reward depends on an action before it in the same episode, and on no other; the environments that go on keep
    their gradient, though Rewarped's reset drops it."""
    args = small_args(env_id="rfo_envs:Falls", env_kwargs=DOUBLE)
    envs, agent = make(args, double=True)
    agent.policy = OpenLoop(torch.randn(8, 4, 1, dtype=torch.float64, requires_grad=True))
    rewards = rfo.collect_rollout(agent, envs, args)["rewards"]
    for env in range(4):
        for t in range(8):
            (gradient,) = torch.autograd.grad(rewards[t, env], agent.policy.actions, retain_graph=True)
            depends = gradient.abs().sum(-1) > 0  # (T, N)
            start = t // 3 * 3 if env < 2 else 0  # episodes of the first two end after every third step
            expected = torch.zeros_like(depends)
            expected[start : t + 1, env] = True
            torch.testing.assert_close(depends, expected)


def test_bootstrap():
    """A time limit and the horizon bootstrap from the state that really followed, a fall does not; discounts start anew
    with an episode. Against a sum by hand."""
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    next_values = torch.tensor([[100.0, 200.0], [300.0, 400.0], [500.0, 600.0]])
    done = torch.tensor([[False, False], [True, True], [False, False]])
    terminated = torch.tensor([[False, False], [True, False], [False, False]])
    found = rfo.discounted_return(rewards, next_values, terminated, done, 0.5)
    fell = (1 + 0.5 * 2) + (3 + 0.5 * 500)
    limit = (10 + 0.5 * 20 + 0.25 * 400) + (30 + 0.5 * 600)
    assert found.tolist() == [fell, limit]


def test_time_limits_are_not_terminations():
    """Some of Rewarped's tasks set `terminated` where they only mean a time limit."""
    envs, _ = make(small_args(env_id="Cartpole"))
    envs.env.progress_buf[:] = envs.env.episode_length - 1
    _, terminated, done, _ = envs.step(torch.zeros(4, 1))
    assert done.all() and not terminated.any()


def final_rewards(limit: bool) -> torch.Tensor:
    """Of a real Ant: the gradient of environment 1's fourth reward with respect to its first action, where environment
    0 meets a time limit at the second step, or does not."""
    envs, _ = make(small_args(env_id="Ant", num_envs=2, horizon=4))
    torch.manual_seed(7)
    envs.restart()
    envs.detach()
    action = torch.zeros(2, 8, requires_grad=True)
    envs.step(action)
    if limit:
        envs.env.progress_buf[0] = envs.env.episode_length - 1
    for _ in range(3):
        reward = envs.step(torch.zeros(2, 8))[0]
    return torch.autograd.grad(reward[1], action)[0]


def test_rewarped_keeps_the_gradient_of_those_that_go_on():
    """The same with and without a reset beside it; and it is no zero."""
    with_reset, without = final_rewards(True), final_rewards(False)
    assert without[1].abs().max() > 0 and not with_reset[0].any()
    torch.testing.assert_close(with_reset[1], without[1], rtol=1e-4, atol=1e-6)
