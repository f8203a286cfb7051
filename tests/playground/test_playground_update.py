"""Promise: advantages, loss, gradient and update are those of the PyTorch script, which is checked by brute force."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import nfpo_continuous_action as reference
import nfpo_playground_jax as nfpo
from playground.conftest import collect, first_agent, small_args, update
from playground.test_playground_flow import as_torch


@pytest.mark.parametrize("dtype", [bool, np.float32])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_the_pytorch_script(gae_lambda, dtype):
    """Random rollouts with terminations and time limits, some on consecutive steps, give the same advantages."""
    generator = np.random.default_rng(0)
    rewards, values, next_values = generator.standard_normal((3, 40, 6)).astype(np.float32)
    terminated, truncated = generator.random((2, 40, 6)) < 0.08
    flags = terminated.astype(dtype), (terminated | truncated).astype(dtype)
    assert (truncated & ~terminated).any()
    rollout = (rewards, values, next_values, *flags)
    expected = reference.compute_gae(*map(torch.from_numpy, rollout), 0.97, gae_lambda).numpy()
    ours = jax.jit(nfpo.compute_gae)(*map(jnp.asarray, rollout), 0.97, gae_lambda)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def as_torch_agent(agent):
    """The PyTorch script's agent with the same networks."""
    policy, layers = as_torch(agent.policy, {"params": agent.params["policy"]}), []
    for _, dense in sorted(agent.params["critic"].items()):
        layer = torch.nn.Linear(*dense["kernel"].shape)
        layer.weight.data = torch.from_numpy(np.array(dense["kernel"]).T.copy())
        layer.bias.data = torch.from_numpy(np.array(dense["bias"]))
        layers += [layer, torch.nn.ELU()]
    critic = torch.nn.Sequential(*layers[:-1], torch.nn.Flatten(0))
    trained = [x for x in (*policy.parameters(), *critic.parameters()) if x.requires_grad]
    every = slice(None)
    return SimpleNamespace(
        policy=policy, critic=critic, policy_obs=every, critic_obs=every, obs=every, trained=lambda: trained
    )


def reference_log_prob(agent, obs, actions):
    """About what the old policy's log-probabilities have to be for some ratios to be clipped and some not."""
    with torch.no_grad():
        return as_torch_agent(agent).policy.log_prob(torch.from_numpy(obs), torch.from_numpy(actions)).median()


@pytest.mark.parametrize("flags", [{}, {"clip_vloss": False, "norm_adv": False, "vf_coef": 0.3}])
def test_loss_equals_the_pytorch_script(flags):
    """Policy loss, value loss, KL estimates, clipped share and the gradient's size of one minibatch are the same."""
    args, _, agent = first_agent()
    args = small_args(**flags)
    generator = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.02 * generator.standard_normal(x.shape).astype(np.float32), agent.params)
    agent = agent.replace(params=params, policy=agent.policy.clone(activation=jnp.tanh))
    obs, actions = 0.3 * generator.standard_normal((2, 64, 3)).astype(np.float32)
    log_probs, advantages, returns, values = generator.standard_normal((4, 64)).astype(np.float32)
    log_probs = log_probs * 0.3 + float(reference_log_prob(agent, obs, actions))
    batch = {"state": obs}, actions, log_probs, advantages, returns, values
    loss = jax.jit(jax.grad(functools.partial(nfpo.ppo_loss, args=args), has_aux=True))
    gradient, found = loss(params, agent, key=None, **dict(zip(BATCH, batch)))
    tensors = map(torch.from_numpy, (obs, actions, log_probs, advantages, returns, values))
    reference_args = reference.Args(**{name: getattr(args, name) for name in ("clip_vloss", "norm_adv", "vf_coef")})
    expected_gradient, stats = reference.ppo_gradient(as_torch_agent(agent), reference_args, *tensors)
    names = ("policy_loss", "value_loss", "old_approx_kl", "approx_kl", "clipfrac")
    assert [float(found[f"losses/{name}"]) for name in names] == pytest.approx(stats.tolist(), rel=1e-3, abs=1e-5)
    assert 0.1 < float(found["losses/clipfrac"]) < 0.9
    size = float(np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(gradient))))
    assert size == pytest.approx(expected_gradient.norm().item(), rel=1e-3)


BATCH = ("obs", "actions", "old_log_probs", "advantages", "returns", "old_values")


def test_update_takes_every_transition_once_per_epoch(monkeypatch):
    """The minibatches of each epoch are a partition of the rollout, in an order of its own."""
    args, _, agent = first_agent()
    seen, right_loss = [], nfpo.ppo_loss

    def watch(params, agent, args, key, *batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x).tolist()), batch[-1], ordered=True)
        return right_loss(params, agent, args, key, *batch)

    numbers = jnp.arange(32.0).reshape(8, 4)
    zeros = jnp.zeros((8, 4))
    vectors = zeros[..., None].repeat(3, 2)
    monkeypatch.setattr(nfpo, "ppo_loss", watch)
    update(agent, args, ({"state": vectors}, vectors, zeros, zeros, numbers, zeros, zeros, zeros))
    jax.effects_barrier()
    assert [len(x) for x in seen] == [16] * 4  # 2 epochs of 2 minibatches
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == list(range(32)) and first != second != sorted(first)


def test_gradients_are_clipped_and_adam_steps(monkeypatch):
    """The first step of Adam has the learning rate's size, whatever the gradient's, which is clipped before."""
    args, envs, agent = first_agent(update_epochs=1, num_minibatches=1, max_grad_norm=1e-3)
    agent, rollout, _ = collect(agent, envs, args)
    after, metrics = update(agent, args, rollout)
    assert metrics["losses/grad_norm"] > 0.1
    moved = jnp.concatenate([(a - b).ravel() for a, b in zip(*map(jax.tree.leaves, (after.params, agent.params)))])
    assert 0.5 * 5e-4 < jnp.abs(moved).max() < 1.01 * 5e-4
    squares = sum(float((x**2).sum()) for x in jax.tree.leaves(after.opt_state.mu))
    assert squares**0.5 / 0.1 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("approx_kl, factor", [(0.05, 1 / 1.5), (0.001, 1.5), (0.01, 1.0)])
def test_desired_kl_adapts_the_learning_rate(approx_kl, factor, monkeypatch):
    """rsl_rl's rule: above twice the desired KL the rate is divided by 1.5, below half of it multiplied."""
    args, envs, agent = first_agent(desired_kl=0.01, update_epochs=1, num_minibatches=1)
    right_loss = nfpo.ppo_loss

    def loss(*arguments):
        value, metrics = right_loss(*arguments)
        return value, {**metrics, "losses/approx_kl": jnp.asarray(approx_kl)}

    monkeypatch.setattr(nfpo, "ppo_loss", loss)
    agent, rollout, _ = collect(agent, envs, args)
    after, metrics = update(agent, args, rollout)
    assert float(after.learning_rate) == pytest.approx(5e-4 * factor)
    assert metrics["charts/learning_rate"] == after.learning_rate


def test_entropy_bonus_widens_and_action_noise_moves_the_actions():
    """--ent-coef differentiates the entropy of samples; --action-noise compares both policies at the noisy action."""
    base = {"update_epochs": 1, "num_minibatches": 1, "norm_adv": False, "base_std": 0.5, "learned_base_std": True}
    log_stds = {}
    for coefficient in (0.0, 10.0):
        args, envs, agent = first_agent(ent_coef=coefficient, **base)
        agent, rollout, _ = collect(agent, envs, args)
        obs, actions, log_probs, rewards, *others = rollout
        after, _ = update(agent, args, (obs, actions, log_probs, jnp.zeros_like(rewards), *others))
        log_stds[coefficient] = np.asarray(after.params["policy"]["base_log_std"])
    assert (log_stds[10.0] > log_stds[0.0]).all() and (log_stds[10.0] > np.log(0.5)).all()
    args, envs, agent = first_agent(action_noise=0.5, **base)
    agent, rollout, _ = collect(agent, envs, args)
    _, noisy = update(agent, args, rollout)
    assert abs(float(noisy["losses/approx_kl"])) < 1e-6  # before the first step both policies are the same
    _, plain = update(agent, small_args(**base), rollout)
    assert abs(float(noisy["losses/grad_norm"] / plain["losses/grad_norm"]) - 1) > 1e-3


def test_small_args_are_the_small_flags():
    """What `train` gets in these tests is what the command line gets."""
    import tyro

    from playground.conftest import FLAGS

    assert tyro.cli(nfpo.Args, args=FLAGS) == small_args()
