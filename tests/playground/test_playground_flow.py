"""The flow in JAX is the density it claims to be, and the same as the PyTorch script's."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import nfpo_continuous_action as reference
from benchmarks.baselines.ppo_playground_jax import GaussianPolicy
from nfpo_playground_jax import FlowPolicy

OBS_DIM = 5
SCALE_FNS = ("tanh", "clip", "none", "zero", "asymmetric")
VARIANTS = {
    "default": {},
    "two hidden layers": {"hidden_layers": 2},
    "three layers": {"num_layers": 3},
    "learned base": {"learned_base_std": True, "num_layers": 5, "scale_bound": 1.0},
}
# Every bound, and every variant of the paper's own; each case compiles for seconds.
CASES = [(dim, scale_fn, "default") for dim in (1, 3, 12) for scale_fn in SCALE_FNS]
CASES += [(dim, "tanh", variant) for dim in (1, 2, 5) for variant in list(VARIANTS)[1:]]


def random_policy(action_dim, dtype=jnp.float64, size=1.0, **flags):
    """A flow far from its initialization: most scales are past their bound."""
    policy = FlowPolicy(OBS_DIM, action_dim, **{"hidden_dim": 16, **flags})
    variables = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, OBS_DIM)), jnp.zeros((1, action_dim)))
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    gain = {"none": 0.5, "asymmetric": 1.0}.get(policy.scale_fn, 2.0) * size  # "none" must not overflow
    leaves = [
        (gain * jax.random.normal(key, x.shape) / max(1, x.shape[0]) ** 0.5).astype(dtype)
        for key, x in zip(keys, leaves)
    ]
    return policy, jax.tree.unflatten(structure, leaves)


def draw(count, action_dim):
    generator = np.random.default_rng(2)
    return generator.standard_normal((count, OBS_DIM)), 2 * generator.standard_normal((count, action_dim))


@pytest.mark.parametrize("action_dim, scale_fn, variant", CASES)
def test_log_prob_is_the_change_of_variables(action_dim, scale_fn, variant, in_float64):
    """log pi(a|o) = log N(f(a)) + log|det df/da| with autodiff's Jacobian; each map's log-det is its own."""
    policy, variables = random_policy(action_dim, scale_fn=scale_fn, **VARIANTS[variant])
    obs, action = map(jnp.asarray, draw(3, action_dim))

    @jax.jit
    def everything(variables, obs, action):
        def true_log_det(method, x):
            row = lambda o, x: policy.apply(variables, o[None], x[None], method=method)[0][0]  # noqa: E731
            return jnp.linalg.slogdet(jax.vmap(jax.jacfwd(row, argnums=1))(obs, x))[1]

        z, log_det = policy.apply(variables, obs, action)
        back, inverse_log_det = policy.apply(variables, obs, z, method="inverse")
        log_std = variables["params"].get("base_log_std", jnp.zeros(action_dim))
        base = jax.scipy.stats.norm.logpdf(z, scale=jnp.exp(log_std)).sum(-1)
        log_prob = policy.apply(variables, obs, action, method="log_prob")
        log_scales = policy.apply(variables, obs, action, method="transform")[1]
        forward = true_log_det("forward", action)
        pairs = (
            (log_det, forward),
            (back, action),
            (inverse_log_det, true_log_det("inverse", z)),
            (log_prob, base + forward),
        )
        return pairs, jnp.abs(jnp.concatenate(log_scales, -1)).max()

    pairs, largest_scale = everything(variables, obs, action)
    for ours, expected in pairs:
        np.testing.assert_allclose(jnp.zeros(expected.shape) + ours, expected, rtol=1e-9, atol=1e-9)
    if scale_fn == "tanh" and action_dim > 1:  # the parameters are far enough from zero to test the bound
        assert 0.7 * policy.scale_bound < largest_scale <= policy.scale_bound


def as_torch(policy, variables):
    """The PyTorch script's policy with the same weights."""
    flags = {
        name: getattr(policy, name)
        for name in ("hidden_dim", "num_layers", "scale_bound", "scale_fn", "hidden_layers", "learned_base_std")
    }
    other = reference.FlowPolicy(policy.obs_dim, policy.action_dim, **flags)
    params = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), variables["params"])
    layers = [params[f"layers_{j}"] for j in range(policy.num_layers)]
    state = {
        "obs_encoder.weight": torch.cat([layer["kernel"][: policy.obs_dim] for layer in layers], dim=1).T,
        "obs_encoder.bias": torch.cat([layer["bias"] for layer in layers]),
    }
    for j, layer in enumerate(layers):
        state[f"layers.{j}.kept.weight"] = layer["kernel"][policy.obs_dim :].T
        for name in [name for name in layer if name.startswith(("hidden_", "out"))]:
            state[f"layers.{j}.{name.replace('_', '.')}.weight"] = layer[name]["kernel"].T
            state[f"layers.{j}.{name.replace('_', '.')}.bias"] = layer[name]["bias"]
    if policy.learned_base_std:
        state["base_log_std"] = params["base_log_std"]
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("action_dim, scale_fn, variant", CASES)
def test_same_weights_give_the_same_policy_in_pytorch(action_dim, scale_fn, variant):
    """Density, inverse, deterministic action and diagnostics equal those of the reference script."""
    flags = {"scale_fn": scale_fn, "activation": nn.tanh, **VARIANTS[variant]}
    policy, variables = random_policy(action_dim, jnp.float32, size=0.5, **flags)
    apply = jax.jit(policy.apply, static_argnames="method")
    obs, action = (x.astype(np.float32) for x in draw(32, action_dim))
    with torch.no_grad():
        other, torch_obs, torch_action = as_torch(policy, variables), torch.from_numpy(obs), torch.from_numpy(action)
        expected = other.log_prob(torch_obs, torch_action).numpy()
        np.testing.assert_allclose(apply(variables, obs, action, method="log_prob"), expected, 1e-5, 1e-5)
        expected = [x.numpy() for x in other.inverse(torch_obs, torch_action)]
        for ours, theirs in zip(apply(variables, obs, action, method="inverse"), expected):
            np.testing.assert_allclose(ours, theirs, 1e-5, 1e-5)
        mode = apply(variables, obs, method="mode")
        np.testing.assert_allclose(mode, other.sample(torch_obs, temperature=0.0)[0].numpy(), 1e-5, 1e-5)
        if action_dim > 1:
            diagnostics = apply(variables, obs, action, method="diagnostics")
            assert diagnostics == pytest.approx(other.diagnostics(torch_obs, torch_action), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("policy_class", [FlowPolicy, GaussianPolicy])
@pytest.mark.parametrize("action_dim", [1, 6])
def test_sample_hands_out_the_log_prob_of_its_action(action_dim, policy_class, in_float64):
    """The log-probability of the sampling pass is log_prob(obs, action), at every temperature that of temperature 1."""
    if policy_class is FlowPolicy:
        policy, variables = random_policy(action_dim, learned_base_std=True)
    else:
        policy = GaussianPolicy(OBS_DIM, action_dim)
        variables = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, OBS_DIM)), jnp.zeros((1, action_dim)))
        variables["params"]["log_std"] = jnp.linspace(-1, 0.5, action_dim)
    obs = jnp.asarray(draw(64, action_dim)[0])
    key = jax.random.PRNGKey(3)
    for temperature in (0.0, 0.3, 1.0, 2.0):
        action, log_prob = policy.apply(variables, obs, key, temperature, method="sample")
        assert action.shape == (64, action_dim) and log_prob.shape == (64,)
        expected = policy.apply(variables, obs, action, method="log_prob")
        np.testing.assert_allclose(log_prob, expected, rtol=1e-9, atol=1e-9)
        is_mode = jnp.allclose(action, policy.apply(variables, obs, method="mode"), atol=1e-12)
        assert is_mode == (temperature == 0)


@pytest.mark.parametrize("temperature", [0.25, 1.5])
@pytest.mark.parametrize("learned_base_std", [False, True])
def test_temperature_scales_the_deviation_of_the_base_noise(learned_base_std, temperature, in_float64):
    """The latents of sampled actions are normal with deviation temperature * sigma."""
    policy, variables = random_policy(3, learned_base_std=learned_base_std)
    count = 20_000
    obs = jnp.asarray(draw(count, 3)[0])
    action, _ = policy.apply(variables, obs, jax.random.PRNGKey(5), temperature, method="sample")
    z, _ = policy.apply(variables, obs, action)
    standard = z / (temperature * jnp.exp(variables["params"].get("base_log_std", 0.0)))
    tolerance = 5 / math.sqrt(count)  # five standard errors of a mean
    assert jnp.abs(standard.mean(0)).max() < tolerance
    assert jnp.abs((standard**2).mean(0) - 1).max() < tolerance * math.sqrt(2)
    assert jnp.abs((standard**4).mean(0) - 3).max() < tolerance * math.sqrt(96)


def test_policy_starts_as_a_standard_normal_nearly():
    """At initialization log pi(a|o) is that of N(0, I) up to the small output layers."""
    policy = FlowPolicy(OBS_DIM, 6)
    obs, action = map(jnp.asarray, draw(256, 6))
    variables = policy.init(jax.random.PRNGKey(0), obs, action)
    difference = policy.apply(variables, obs, action, method="log_prob") - jax.scipy.stats.norm.logpdf(action).sum(-1)
    assert 0 < jnp.abs(difference).max() < 0.5


def test_gaussian_twin_is_the_diagonal_gaussian():
    """The baseline's log_prob is that of a normal distribution around its mode."""
    policy = GaussianPolicy(OBS_DIM, 6)
    obs, action = map(jnp.asarray, draw(32, 6))
    variables = policy.init(jax.random.PRNGKey(0), obs, action)
    variables["params"]["log_std"] = jnp.linspace(-1, 0.5, 6)
    mean, std = policy.apply(variables, obs, method="mode"), jnp.exp(variables["params"]["log_std"])
    expected = jax.scipy.stats.norm.logpdf(action, mean, std).sum(-1)
    np.testing.assert_allclose(policy.apply(variables, obs, action, method="log_prob"), expected, 1e-5, 1e-5)
