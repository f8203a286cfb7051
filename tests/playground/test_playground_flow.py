"""The flow in JAX is the density it claims to be, and the same as the PyTorch script's."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.stats import norm

import nfpo_continuous_action as reference
from benchmarks.baselines.ppo_playground_jax import GaussianPolicy
from nfpo_playground_jax import FlowPolicy

OBS_DIM = 5
SCALE_FNS = ("tanh", "clip", "none", "zero", "asymmetric")
VARIANTS = {
    "default": {},
    "two hidden layers": {"hidden_layers": 2},
    "three layers": {"num_layers": 3},
    "learned base": {"learned_base_std": True, "base_std": 0.5, "num_layers": 5, "scale_bound": 1.0},
}
# Every bound, and every variant of the paper's own; each case compiles for seconds.
CASES = [(3, scale_fn, "default") for scale_fn in SCALE_FNS]
CASES += [(1, "tanh", "three layers"), (1, "none", "learned base"), (2, "tanh", "two hidden layers")]
CASES += [(12, "tanh", "learned base")]


def initial(policy):
    """Variables of a policy, of which scripts know `sample` and `log_prob` only."""
    obs, action = jnp.zeros((1, OBS_DIM)), jnp.zeros((1, policy.action_dim))
    return jax.jit(lambda key: policy.init(key, obs, action, method="log_prob"))(jax.random.PRNGKey(0))


def random_policy(action_dim, dtype=jnp.float64, size=1.0, **flags):
    """A flow far from its initialization: most scales are past their bound."""
    policy = FlowPolicy(OBS_DIM, action_dim, **{"hidden_dim": 16, **flags})
    variables = initial(policy)
    generator = np.random.default_rng(1)
    gain = {"none": 0.5, "asymmetric": 1.0}.get(policy.scale_fn, 2.0) * size  # "none" must not overflow

    def replace(x):
        return jnp.asarray(gain * generator.standard_normal(x.shape) / max(1, x.shape[0]) ** 0.5, dtype)

    return policy, jax.tree.map(replace, variables)


def apply(policy, method):
    """A method of a policy, compiled."""
    return jax.jit(lambda variables, *inputs: policy.apply(variables, *inputs, method=method))


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

        (z, log_det), found = policy.apply(variables, obs, action, method="forward", mutable=["intermediates"])
        back, inverse_log_det = policy.apply(variables, obs, z, method="inverse")
        log_std = variables["params"]["base_log_std"]
        base = jax.scipy.stats.norm.logpdf(z, scale=jnp.exp(log_std)).sum(-1)
        log_prob = policy.apply(variables, obs, action, method="log_prob")
        log_scales = jax.tree.leaves(found)
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
    names = "hidden_dim num_layers scale_bound scale_fn hidden_layers base_std learned_base_std".split()
    flags = {name: getattr(policy, name) for name in names}
    other = reference.FlowPolicy(policy.obs_dim, policy.action_dim, **flags)
    params = jax.tree.map(
        lambda x: torch.from_numpy(np.array(x).T.copy()), variables["params"]
    )  # torch's are (out, in)
    state = {"base_log_std": params["base_log_std"]}

    def add(name, dense):
        state[f"{name}.weight"], state[f"{name}.bias"] = dense["kernel"], dense["bias"]

    add("obs_encoder", params["obs_encoder"])
    for j in range(policy.num_layers):
        layers = [params[f"layers_{j}"][f"Dense_{i}"] for i in range(1 + policy.hidden_layers)]
        state[f"layers.{j}.kept_weight"] = layers[0]["kernel"]
        add(f"layers.{j}.out", layers[-1])
        for i, layer in enumerate(layers[1:-1]):
            add(f"layers.{j}.hidden.{i}", layer)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("action_dim, scale_fn, variant", CASES)
def test_same_weights_give_the_same_policy_in_pytorch(action_dim, scale_fn, variant):
    """Density, inverse, deterministic action and its log-probability equal those of the reference script."""
    flags = {"scale_fn": scale_fn, "activation": nn.tanh, **VARIANTS[variant]}
    policy, variables = random_policy(action_dim, jnp.float32, size=0.5, **flags)
    obs, action = (x.astype(np.float32) for x in draw(32, action_dim))
    with torch.no_grad():
        other, torch_obs, torch_action = as_torch(policy, variables), torch.from_numpy(obs), torch.from_numpy(action)
        expected = other.log_prob(torch_obs, torch_action), *other.inverse(torch_obs, torch_action)
        expected += other.sample(torch_obs, temperature=0.0)

    @jax.jit
    def ours(variables):
        log_prob = policy.apply(variables, obs, action, method="log_prob")
        inverse = policy.apply(variables, obs, action, method="inverse")
        return log_prob, *inverse, *policy.apply(variables, obs, None, 0.0, method="sample")

    for mine, theirs in zip(ours(variables), expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), 1e-5, 1e-5)


@pytest.mark.parametrize("policy_class", [FlowPolicy, GaussianPolicy])
@pytest.mark.parametrize("action_dim", [1, 6])
def test_sample_hands_out_the_log_prob_of_its_action(action_dim, policy_class, in_float64):
    """The log-probability of the sampling pass is log_prob(obs, action), at every temperature that of temperature 1; at
    temperature 0 there is one action, and it needs no key."""
    if policy_class is FlowPolicy:
        policy, variables = random_policy(action_dim, learned_base_std=True)
    else:
        policy = GaussianPolicy(OBS_DIM, action_dim, hidden_dims=(16,))
        variables = initial(policy)
        variables["params"]["log_std"] = jnp.linspace(-1, 0.5, action_dim)
    obs = jnp.asarray(draw(64, action_dim)[0])
    key = jax.random.PRNGKey(3)

    @jax.jit
    def samples(variables):
        found = {}
        for temperature in (0.0, 0.3, 1.0, 2.0):
            action, log_prob = policy.apply(variables, obs, key, temperature, method="sample")
            found[temperature] = action, log_prob, policy.apply(variables, obs, action, method="log_prob")
        return found, policy.apply(variables, obs, None, 0.0, method="sample")[0]

    found, mode = samples(variables)
    for temperature, (action, log_prob, expected) in found.items():
        assert action.shape == (64, action_dim) and log_prob.shape == (64,)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-9, atol=1e-9)
        assert np.allclose(action, mode, atol=1e-12) == (temperature == 0)


@pytest.mark.parametrize("temperature", [0.25, 1.5])
def test_temperature_scales_the_deviation_of_the_base_noise(temperature, in_float64):
    """The latents of sampled actions are normal with deviation temperature * sigma."""
    policy, variables = random_policy(3, learned_base_std=True)
    count = 20_000
    obs = jnp.asarray(draw(count, 3)[0])

    @jax.jit
    def latents(variables):
        action, _ = policy.apply(variables, obs, jax.random.PRNGKey(5), temperature, method="sample")
        return policy.apply(variables, obs, action, method="forward")[0]

    standard = np.asarray(latents(variables)) / (temperature * np.exp(variables["params"]["base_log_std"]))
    tolerance = 5 / math.sqrt(count)  # five standard errors of a mean
    assert np.abs(standard.mean(0)).max() < tolerance
    assert np.abs((standard**2).mean(0) - 1).max() < tolerance * math.sqrt(2)
    assert np.abs((standard**4).mean(0) - 3).max() < tolerance * math.sqrt(96)


@pytest.mark.parametrize("policy_class", [FlowPolicy, GaussianPolicy])
def test_policy_starts_as_a_normal_nearly(policy_class):
    """At initialization log pi(a|o) is that of N(0, base_std^2 I) up to the small output layers."""
    policy = policy_class(OBS_DIM, 6, base_std=0.5)
    obs, action = draw(256, 6)
    action = action / 4
    found = apply(policy, "log_prob")(initial(policy), obs, action)
    difference = found - norm.logpdf(action, scale=0.5).sum(-1)
    assert 0 < np.abs(difference).max() < 0.5


def test_only_a_learned_deviation_has_a_gradient():
    """--no-learned-base-std keeps the deviation where it starts."""
    obs, action = draw(16, 4)
    for learned in (False, True):
        policy = FlowPolicy(OBS_DIM, 4, hidden_dim=8, base_std=0.5, learned_base_std=learned)
        loss = lambda variables: policy.apply(variables, obs, action, method="log_prob").mean()  # noqa: B023, E731
        gradient = jax.jit(jax.grad(loss))(initial(policy))["params"]
        assert (np.abs(gradient["base_log_std"]).max() > 0) == learned
        assert np.abs(gradient["obs_encoder"]["bias"]).max() > 0


def test_wrong_sizes_are_errors():
    """A scale function that does not exist and a deviation of 0 do not make a policy."""
    with pytest.raises(KeyError, match="tan"):
        initial(FlowPolicy(OBS_DIM, 2, scale_fn="tan"))
    with pytest.raises(ValueError, match="math domain"):
        initial(FlowPolicy(OBS_DIM, 2, base_std=0.0))


def test_gaussian_twin_is_the_diagonal_gaussian():
    """The baseline's log_prob is that of a normal distribution around its mode."""
    policy = GaussianPolicy(OBS_DIM, 6, hidden_dims=(16,))
    obs, action = draw(32, 6)
    variables = initial(policy)
    variables["params"]["log_std"] = jnp.linspace(-1, 0.5, 6)
    mean = jax.jit(lambda x: policy.apply(x, obs, None, 0.0, method="sample")[0])(variables)
    expected = norm.logpdf(action, mean, np.exp(variables["params"]["log_std"])).sum(-1)
    np.testing.assert_allclose(apply(policy, "log_prob")(variables, obs, action), expected, 1e-4, 1e-4)
