"""Promise: the update is PPO's, its learning rate follows the KL divergence by rsl_rl's rule, steps that only reset are
left out, and compilation changes nothing."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import nfpo_isaacgym as nfpo
from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

from .conftest import make, make_optimizer, small_args


def prepare(args, policy_class=None):
    """An agent, its optimizer and a rollout of the task of `args`."""
    envs, agent = make(args, policy_class)
    optimizer = make_optimizer(agent, args)
    envs.reset(args.random_initial_steps)
    return agent, optimizer, nfpo.collect_rollout(agent, envs, agent.act, args)


def minibatch(agent, rollout):
    """Observations and actions of a rollout, and log-probabilities, advantages, returns, values out of the air."""
    generator = torch.Generator().manual_seed(2)
    obs, actions = (x.flatten(0, 1) for x in rollout[:2])
    with torch.no_grad():
        old = agent.policy.log_prob(obs[:, agent.policy_obs], actions)
    old = old + 0.3 * torch.randn(old.shape, generator=generator)
    return obs, actions, old, *torch.randn(3, len(old), generator=generator)


@pytest.mark.parametrize("learning_rate", [1e-3, 1.2e-5, 9e-3])
@pytest.mark.parametrize("kl, factor", [(0.021, 1 / 1.5), (0.019, 1), (0.0051, 1), (0.0049, 1.5), (0.0, 1)])
def test_adaptive_rule(learning_rate, kl, factor):
    """rsl_rl's rule, before every gradient step, within its limits; a KL of 0 is the first minibatch's."""
    args = small_args(learning_rate=learning_rate, desired_kl=0.01, update_epochs=1, num_minibatches=1)
    agent, optimizer, rollout = prepare(args)
    gradient = torch.zeros_like(optimizer.param_groups[0]["params"][0])
    nfpo.ppo_update(agent, optimizer, args, rollout, lambda *_: (gradient, torch.tensor([0.0, 0.0, 0.0, kl, 0.0])))
    expected = min(max(learning_rate * factor, 1e-5), 1e-2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_learning_rate_stays_without_the_flag():
    args = small_args(learning_rate=9e-3, update_epochs=5, env_id="pointmass")
    agent, optimizer, rollout = prepare(args)
    nfpo.ppo_update(agent, optimizer, args, rollout, partial(nfpo.ppo_gradient, agent, args))
    assert optimizer.param_groups[0]["lr"] == 9e-3


def test_kl_is_of_the_old_policy_to_the_new():
    """What the rule is handed estimates the KL that rsl_rl computes in closed form for a Gaussian."""
    torch.manual_seed(0)
    envs, agent = make(small_args(env_id="pointmass"), GaussianPolicy)
    obs, before = torch.randn(20_000, 6), None
    with torch.no_grad():
        actions, old = agent.policy.sample(obs)
        before = Independent(Normal(agent.policy.mean(obs), agent.policy.log_std.exp()), 1)
        agent.policy.log_std += 0.1
        agent.policy.mean[-1].bias += 0.05
        after = Independent(Normal(agent.policy.mean(obs), agent.policy.log_std.exp()), 1)
    _, stats = nfpo.ppo_gradient(agent, small_args(), obs, actions, old, *torch.randn(3, len(obs)))
    assert stats[3].item() == pytest.approx(kl_divergence(before, after).mean().item(), rel=0.05)


def test_resetting_steps_are_left_out():
    """What stands in the rows of steps that only reset does not matter; elsewhere it does."""
    results = []
    for poison in (None, "resetting", "others"):
        args = small_args(env_id="isaacgymenvs:Cartpole", num_steps=64, num_minibatches=4)
        agent, optimizer, rollout = prepare(args)
        resetting = rollout[-1]
        assert resetting.any(), "nothing to get wrong"
        if poison:
            rollout[1][resetting if poison == "resetting" else ~resetting] += 5.0
        torch.manual_seed(5)
        nfpo.ppo_update(agent, optimizer, args, rollout, partial(nfpo.ppo_gradient, agent, args))
        results.append(optimizer.param_groups[0]["params"][0].detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_every_row_is_learned_from():
    """An epoch sees all usable rows once, and some of them again only where others are not usable."""
    args = small_args(update_epochs=1, num_minibatches=4)
    agent, optimizer, rollout = prepare(args)
    rollout = [x.clone() for x in rollout]
    seen = []

    def note(obs, *_):
        seen.append(obs)
        return torch.zeros_like(optimizer.param_groups[0]["params"][0]), torch.zeros(5)

    for is_resetting in (False, True):
        rollout[-1][0, :3] = is_resetting
        seen.clear()
        nfpo.ppo_update(agent, optimizer, args, tuple(rollout), note)
        assert [len(obs) for obs in seen] == [12] * 4
        assert len(torch.cat(seen).unique(dim=0)) == (45 if is_resetting else 48)


def test_loss_in_numpy():
    """Losses and statistics by hand, and the gradient of the loss they make."""
    args = small_args(vf_coef=0.7)
    agent, _, rollout = prepare(args)
    obs, actions, old, advantages, returns, old_values = batch = minibatch(agent, rollout)
    gradient, stats = nfpo.ppo_gradient(agent, args, *batch)
    new, value = agent.policy.log_prob(obs[:, :5], actions), agent.critic(obs[:, 5:])
    normalized = (advantages - advantages.mean()) / advantages.std()
    ratio = (new - old).exp()
    surrogate = torch.where(normalized > 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * normalized
    near = old_values + (value - old_values).clamp(-0.2, 0.2)
    worse = torch.where((value - returns).abs() > (near - returns).abs(), value, near)
    loss = -surrogate.mean() + 0.7 * 0.5 * ((worse - returns) ** 2).mean()
    gradients = torch.autograd.grad(loss, agent.trained(), allow_unused=True, materialize_grads=True)
    expected = nfpo.parameters_to_vector(gradients).detach()
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    new, old, ratio = (x.detach().double().numpy() for x in (new, old, ratio))
    numbers = [-surrogate.mean().item(), 0.5 * ((worse - returns) ** 2).mean().item(), -(new - old).mean()]
    numbers += [(ratio - 1 - np.log(ratio)).mean(), (np.abs(ratio - 1) > 0.2).mean()]
    np.testing.assert_allclose(stats, numbers, rtol=1e-3)


def test_gradients_are_clipped_and_flow_metrics_logged():
    """All networks together, to --max-grad-norm; the diagnostics are those of the rollout's transitions."""
    args = small_args(max_grad_norm=0.01, num_minibatches=1, update_epochs=1, env_id="pointmass")
    agent, optimizer, rollout = prepare(args)
    with torch.no_grad():
        _, log_det = agent.policy.forward(rollout[0][..., :6], rollout[1])
    metrics = nfpo.ppo_update(agent, optimizer, args, rollout, partial(nfpo.ppo_gradient, agent, args))
    (parameters,) = optimizer.param_groups[0]["params"]
    assert metrics["losses/grad_norm"] > 0.01 and parameters.grad.norm().item() == pytest.approx(0.01, rel=1e-3)
    wide = nfpo.dataclasses.replace(args, max_grad_norm=1e3)  # a shorter gradient keeps its length
    unclipped = nfpo.ppo_update(agent, optimizer, wide, rollout, partial(nfpo.ppo_gradient, agent, wide))
    assert parameters.grad.norm().item() == pytest.approx(unclipped["losses/grad_norm"], rel=1e-3)
    assert metrics["flow/log_det"] == pytest.approx(log_det.mean().item(), abs=0.05)
    assert metrics["losses/entropy"] == pytest.approx(-rollout[2].mean().item())
    for name, module in agent.named_parameters():  # they are views of the vector that was stepped
        assert module.untyped_storage().data_ptr() == parameters.untyped_storage().data_ptr() or "base" in name


def test_compiled_is_the_same():
    """Compiled functions are the eager ones up to rounding, and compiled once."""
    args = small_args(env_id="pointmass", num_flow_layers=2)
    agent, optimizer, rollout = prepare(args)
    torch._inductor.config.fallback_random = True  # the random numbers of eager mode
    function = partial(nfpo.ppo_gradient, agent, args)
    compiled = torch.compile(function)
    results = []
    for call in (function, compiled, compiled):
        torch.manual_seed(7)
        results.append(call(*minibatch(agent, rollout)))
        counted = dict(torch._dynamo.utils.counters["stats"])
    for gradient, stats in results[1:]:
        np.testing.assert_allclose(gradient, results[0][0], atol=1e-4)
        np.testing.assert_allclose(stats, results[0][1], atol=1e-4)
    torch.manual_seed(7)
    compiled(*minibatch(agent, rollout))
    assert counted == dict(torch._dynamo.utils.counters["stats"]) and counted["unique_graphs"] > 0


@pytest.mark.parametrize(
    "env_id, compiler, compiles", [("pointmass", "g++", 2), ("cartpole", "g++", 0), ("pointmass", None, 0)]
)
def test_what_cannot_be_compiled_runs_eagerly(env_id, compiler, compiles, tmp_path, monkeypatch, capsys):
    """PyTorch 2.4.1 compiles one-dimensional actions wrongly; that and a missing compiler are a line."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(1) or function)
    monkeypatch.setattr(nfpo.shutil, "which", lambda _: compiler)
    args = small_args(env_id=env_id, compile=True, runs_dir=str(tmp_path), total_timesteps=48)
    assert nfpo.train(args)["global_step"] == 48
    assert len(calls) == compiles and ("eagerly" in capsys.readouterr().out) == (compiles == 0)
