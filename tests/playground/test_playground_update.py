"""GAE, the loss and the update in JAX against the PyTorch script, which has been checked against brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import nfpo_continuous_action as reference
import nfpo_playground_jax as nfpo
from playground.conftest import learner_and_state, small_args
from playground.test_playground_flow import as_torch


def collect(learner, state):
    return jax.jit(functools.partial(nfpo.collect_rollout, learner))(state)


def update(learner, state, rollout):
    return jax.jit(functools.partial(nfpo.ppo_update, learner))(state, rollout)


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
    ours = nfpo.compute_gae(*map(jnp.asarray, rollout), 0.97, gae_lambda)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


class TorchCritic(torch.nn.Module):
    """The JAX critic's weights."""

    def __init__(self, params):
        super().__init__()
        self.weights = [
            (torch.from_numpy(np.array(x["kernel"])), torch.from_numpy(np.array(x["bias"])))
            for _, x in sorted(params.items())
        ]

    def forward(self, obs):
        for i, (kernel, bias) in enumerate(self.weights):
            obs = obs @ kernel + bias
            obs = torch.nn.functional.elu(obs) if i < len(self.weights) - 1 else obs
        return obs.squeeze(-1)


@pytest.mark.parametrize("flags", [{}, {"clip_vloss": False}, {"norm_adv": False, "vf_coef": 0.3}])
def test_loss_equals_the_pytorch_script(flags):
    """Policy loss, value loss, both KL estimates and the clipped share of one minibatch are the same."""
    learner, state = learner_and_state(**flags)
    learner = learner._replace(policy=learner.policy.clone(activation=jnp.tanh))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.PRNGKey(x.size), x.shape), state.params)
    generator = np.random.default_rng(1)
    obs, actions = generator.standard_normal((2, 64, 3)).astype(np.float32)
    log_probs, advantages, returns, values = generator.standard_normal((4, 64)).astype(np.float32)
    log_probs = log_probs * 0.3 - 4.0
    batch = nfpo.Batch({"state": obs}, actions, log_probs, advantages, returns, values)
    loss, metrics = nfpo.minibatch_loss(params, learner, batch, jax.random.PRNGKey(0))
    policy = as_torch(learner.policy, {"params": params["policy"]})
    args = reference.Args(**{name: getattr(learner.args, name) for name in ("clip_vloss", "norm_adv", "vf_coef")})
    tensors = map(torch.from_numpy, (obs, actions, log_probs, advantages, returns, values))
    expected, stats = reference.minibatch_loss(policy, TorchCritic(params["critic"]), args, *tensors)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-4)
    names = ("policy_loss", "value_loss", "old_approx_kl", "approx_kl", "clipfrac")
    assert [float(metrics[f"losses/{name}"]) for name in names] == pytest.approx(stats.tolist(), rel=1e-3, abs=1e-5)
    assert 0.1 < float(metrics["losses/clipfrac"]) < 0.9


def test_update_takes_every_transition_once_an_epoch():
    """The minibatches of an epoch are a partition of the rollout."""
    learner, state = learner_and_state(update_epochs=1)
    args, seen = learner.args, []

    def watch(params, learner, minibatch, key):
        jax.debug.callback(lambda x: seen.extend(np.asarray(x).tolist()), minibatch.values)
        return right_loss(params, learner, minibatch, key)

    right_loss = nfpo.minibatch_loss
    shape = (args.num_steps, args.num_envs)
    numbers = jnp.arange(args.batch_size, dtype=jnp.float32).reshape(shape)
    zeros = jnp.zeros(shape)
    rollout = nfpo.Rollout({"state": zeros[..., None].repeat(3, 2)}, zeros[..., None].repeat(3, 2), *[zeros] * 6)
    rollout = rollout._replace(values=numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nfpo, "minibatch_loss", watch)
        nfpo.ppo_update(learner, state, rollout)
        jax.effects_barrier()
    assert sorted(seen) == list(range(args.batch_size)) and seen != sorted(seen)


@pytest.mark.parametrize("approx_kl, factor", [(0.05, 1 / 1.5), (0.001, 1.5), (0.01, 1.0)])
def test_desired_kl_adapts_the_learning_rate(approx_kl, factor, monkeypatch):
    """rsl_rl's rule: above twice the desired KL the rate is divided by 1.5, below half of it multiplied."""
    learner, state = learner_and_state(desired_kl=0.01, update_epochs=1, num_minibatches=1)
    right_loss = nfpo.minibatch_loss

    def loss(*arguments):
        value, metrics = right_loss(*arguments)
        return value, {**metrics, "losses/approx_kl": jnp.asarray(approx_kl)}

    monkeypatch.setattr(nfpo, "minibatch_loss", loss)
    state, rollout, _ = collect(learner, state)
    after, _ = update(learner, state, rollout)
    assert float(after.learning_rate) == pytest.approx(5e-4 * factor)


def test_running_statistics_are_those_of_all_that_was_seen():
    """Merged batch by batch, mean and variance are numpy's over everything."""
    generator = np.random.default_rng(0)
    batches = [generator.normal(100 * i, 1 + i, (7, 5, 3)).astype(np.float32) for i in range(4)]
    stats = nfpo.RunningMeanStd.create((3,))
    for batch in batches:
        stats = stats.update(jnp.asarray(batch))
    every = np.concatenate(batches).reshape(-1, 3)
    np.testing.assert_allclose(stats.mean, every.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.std, every.std(0), rtol=1e-4)
    assert stats.count == pytest.approx(len(every), abs=1e-2)


def test_entropy_bonus_widens_and_action_noise_moves_the_actions():
    """--ent-coef differentiates the entropy of samples; --action-noise compares both policies at the noisy action."""
    base = {"update_epochs": 1, "num_minibatches": 1, "norm_adv": False, "learned_base_std": True}
    log_stds = {}
    for coefficient in (0.0, 10.0):
        learner, state = learner_and_state(ent_coef=coefficient, **base)
        state, rollout, _ = collect(learner, state)
        rollout = rollout._replace(rewards=jnp.zeros_like(rollout.rewards))
        after, _ = update(learner, state, rollout)
        log_stds[coefficient] = np.asarray(after.params["policy"]["base_log_std"])
    assert (log_stds[10.0] > log_stds[0.0]).all() and (log_stds[10.0] > 0).all()
    learner, state = learner_and_state(action_noise=0.5, **base)
    state, rollout, _ = collect(learner, state)
    _, metrics = update(learner, state, rollout)
    assert abs(float(metrics["losses/approx_kl"])) < 1e-6  # before the first step both policies are the same


def test_small_args_are_the_small_flags(cli):
    """What `train` gets in these tests is what the command line gets."""
    from playground.conftest import SMALL

    assert nfpo.parse_args([*SMALL, "--env-id", "tests.playground.envs:Lane"]) == small_args()
