"""The policy is the density it claims to be: against autograd, quadrature, finite differences and zuko."""

import math

import pytest
import torch
import zuko
from conftest import make_agent

from benchmarks.baselines.ppo_continuous_action import GaussianPolicy
from nfpo_continuous_action import Args, FlowPolicy, ppo_update

OBS_DIM = 5
SCALE_FNS = ("tanh", "clip", "none", "zero", "asymmetric")
VARIANTS = {
    "default": {},
    "two hidden layers": {"hidden_layers": 2},
    "three layers": {"num_layers": 3},
    "learned base": {"learned_base_std": True, "num_layers": 5, "scale_bound": 1.0},
}


def random_policy(action_dim, size=1.0, seed=0, scale_fn="tanh", **flags):
    """A float64 flow far from its initialization; at `size` 1 most scales are past their bound."""
    torch.manual_seed(seed)
    policy = FlowPolicy(OBS_DIM, action_dim, scale_fn=scale_fn, **{"hidden_dim": 16, **flags}).double()
    with torch.no_grad():
        for parameter in filter(lambda parameter: parameter.requires_grad, policy.parameters()):
            parameter.copy_(size * torch.randn_like(parameter) * max(1, parameter.shape[1:].numel()) ** -0.5)
        gain = {"none": 0.5, "asymmetric": 8.0}.get(scale_fn, 3.0)  # "none" must not overflow
        for layer in policy.layers:
            layer.out.weight.mul_(gain)
    policy.scale_fn = scale_fn
    return policy


def observations(count, seed=1):
    return torch.randn(count, OBS_DIM, generator=torch.Generator().manual_seed(seed)).double()


def jacobian_log_det(function, x):
    """log|det| of a batched function's Jacobian, by autograd, row by row."""
    jacobians = [torch.autograd.functional.jacobian(lambda row, i=i: function(i, row), x[i]) for i in range(len(x))]
    return torch.stack([torch.linalg.slogdet(jacobian)[1] for jacobian in jacobians])


def paper_scale_and_shift(policy, j, obs, kept):
    """s_j bounded and t_j, from the weights as the paper writes them: one network on [observation, kept part]."""
    layer = policy.layers[j]
    width = len(layer.kept_weight)
    rows = slice(j * width, (j + 1) * width)
    weight = torch.cat((policy.obs_encoder.weight[rows], layer.kept_weight), dim=1)
    hidden = torch.tanh(torch.cat((obs, kept), dim=-1) @ weight.T + policy.obs_encoder.bias[rows])
    for inner in layer.hidden:
        hidden = torch.tanh(hidden @ inner.weight.T + inner.bias)
    out = hidden @ layer.out.weight.T + layer.out.bias
    scale, shift = out[..., : out.shape[-1] // 2], out[..., out.shape[-1] // 2 :]
    bound = layer.scale_bound
    bounded = {
        "tanh": lambda s: bound * torch.tanh(s),
        "clip": lambda s: s.clamp(-bound, bound),
        "none": lambda s: s,
        "zero": lambda s: 0 * s,
        "asymmetric": lambda s: 2 / math.pi * torch.where(s >= 0, 0.1 * (s / 0.1).atan(), 2 * (s / 2).atan()),
    }
    return bounded[policy.scale_fn](scale), shift


def zuko_flow(policy, obs):
    """The same weights as a flow made of zuko's parts, which does its own accounting of determinants."""

    def coupling(j):
        def affine(kept):
            scale, shift = paper_scale_and_shift(policy, j, obs, kept)
            each = zuko.transforms.MonotonicAffineTransform(shift, scale, slope=1e-300)
            # zuko's soft clip, which this slope makes nearly and this line exactly the identity
            each.log_scale, each.scale = scale, scale.exp()
            return zuko.transforms.DependentTransform(each, 1)

        return zuko.transforms.CouplingTransform(affine, torch.arange(action_dim) % 2 == j % 2)

    action_dim = len(policy.base_log_std)
    layers = zuko.transforms.ComposedTransform(*(coupling(j) for j in range(len(policy.layers))))
    base = zuko.distributions.DiagNormal(torch.zeros(action_dim).double(), policy.base_log_std.exp())
    return zuko.distributions.NormalizingFlow(layers, base.expand(obs.shape[:1]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale_fn", SCALE_FNS)
@pytest.mark.parametrize("action_dim", [1, 2, 3, 6, 17])
def test_log_prob_is_the_change_of_variables(action_dim, scale_fn, variant):
    """log pi(a|o) = log N(f(a)) + log|det df/da| with autograd's Jacobian, and each map's log-det is its own."""
    policy = random_policy(action_dim, scale_fn=scale_fn, **VARIANTS[variant])
    obs, action = observations(3), 2 * torch.randn(3, action_dim).double()
    z, log_det = policy.forward(obs, action)
    true_log_det = jacobian_log_det(lambda i, a: policy.forward(obs[i : i + 1], a[None])[0][0], action)
    torch.testing.assert_close(torch.zeros(3) + log_det, true_log_det, rtol=0, atol=1e-9, check_dtype=False)

    base = torch.distributions.Normal(torch.zeros(action_dim).double(), policy.base_log_std.exp())
    expected = base.log_prob(z).sum(-1) + true_log_det
    torch.testing.assert_close(policy.log_prob(obs, action), expected, rtol=1e-12, atol=1e-9)

    back, inverse_log_det = policy.inverse(obs, z)
    torch.testing.assert_close(back, action, rtol=1e-9, atol=1e-9)
    true_log_det = jacobian_log_det(lambda i, x: policy.inverse(obs[i : i + 1], x[None])[0][0], z.detach())
    torch.testing.assert_close(torch.zeros(3) + inverse_log_det, true_log_det, rtol=0, atol=1e-9, check_dtype=False)

    if scale_fn in ("none", "zero"):
        return
    policy.forward(observations(64), 2 * torch.randn(64, action_dim).double())
    bound = policy.layers[0].scale_bound
    limits, sizes = {"asymmetric": (-2.0, 0.1)}.get(scale_fn, (-bound, bound)), policy.log_scales
    assert limits[0] - 1e-6 <= sizes.min() and sizes.max() <= limits[1] + 1e-6
    if action_dim > 1:  # the parameters are far enough from zero to test the bound
        assert sizes.min() < 0.7 * limits[0] and sizes.max() > 0.7 * limits[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("action_dim", [1, 2, 3, 6, 17])
@pytest.mark.parametrize("policy_class", [FlowPolicy, GaussianPolicy])
def test_sample_hands_out_the_log_prob_of_its_action(policy_class, action_dim, variant):
    """The log-probability of the sampling pass is log_prob(obs, action), at every temperature that of temperature 1."""
    if policy_class is FlowPolicy:
        policy = random_policy(action_dim, **VARIANTS[variant])
    else:
        policy = GaussianPolicy(OBS_DIM, action_dim).double()
        torch.nn.init.normal_(policy.log_std)
    obs = observations(64)
    for temperature in (0.0, 0.3, 1.0, 2.0):
        action, log_prob = policy.sample(obs, temperature=temperature)
        assert action.shape == (64, action_dim) and log_prob.shape == (64,)
        torch.testing.assert_close(log_prob, policy.log_prob(obs, action), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learned_base_std", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (4, 4), (3, 1, 2)])
def test_sample_takes_any_leading_shape(shape, learned_base_std):
    """One observation gives one action, a stack of batches a stack of batches with noise of its own everywhere."""
    policy = random_policy(4, learned_base_std=learned_base_std)
    obs = observations(1)[0].expand(*shape, OBS_DIM)
    action, log_prob = policy.sample(obs)
    assert action.shape == (*shape, 4) and log_prob.shape == shape
    torch.testing.assert_close(log_prob, policy.log_prob(obs, action), rtol=1e-10, atol=1e-10)
    assert len(action.reshape(-1, 4).unique(dim=0)) == obs.numel() // OBS_DIM


@pytest.mark.parametrize("variant", VARIANTS)
def test_temperature_0_is_the_flow_run_backwards_from_0(variant):
    """At temperature 0 the policy is deterministic and gives f^-1(0; o) (Sec. A.6)."""
    policy, obs = random_policy(6, **VARIANTS[variant]), observations(8)
    first, second = policy.sample(obs, temperature=0.0)[0], policy.sample(obs, temperature=0.0)[0]
    assert torch.equal(first, second)
    torch.testing.assert_close(policy.forward(obs, first)[0], torch.zeros(8, 6).double(), rtol=0, atol=1e-12)
    assert not torch.allclose(first, policy.sample(obs, temperature=1.0)[0])


@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("learned_base_std", [False, True])
def test_temperature_scales_the_deviation_of_the_base_noise(learned_base_std, temperature):
    """The latents of sampled actions are normal with deviation temperature * sigma."""
    policy, count = random_policy(3, learned_base_std=learned_base_std), 20_000
    obs = observations(count)
    z, _ = policy.forward(obs, policy.sample(obs, temperature=temperature)[0])
    sigma = policy.base_log_std.exp()
    standard = z / (temperature * sigma)
    tolerance = 5 / math.sqrt(count)  # five standard errors of a mean
    assert standard.mean(0).abs().max() < tolerance
    assert (standard.square().mean(0) - 1).abs().max() < tolerance * math.sqrt(2)
    assert (standard.pow(4).mean(0) - 3).abs().max() < tolerance * math.sqrt(96)
    assert (torch.corrcoef(standard.T) - torch.eye(3)).abs().max() < tolerance, "each dimension has noise of its own"


@pytest.mark.parametrize("scale_fn", SCALE_FNS)
@pytest.mark.parametrize("action_dim, reach, points", [(1, 40, 4001), (2, 24, 481)])
def test_density_integrates_to_1(action_dim, reach, points, scale_fn):
    """The density has mass 1 over the action space, by quadrature on a grid."""
    size = 0.3 if scale_fn == "asymmetric" else 0.7  # it may widen by exp(2) in each layer, and the grid is finite
    policy = random_policy(action_dim, size=size, seed=3, scale_fn=scale_fn, num_layers=3)
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * action_dim).view(-1, action_dim)
    obs = observations(1).expand(len(grid), -1)
    mass = policy.log_prob(obs, grid).exp().sum() * (axis[1] - axis[0]) ** action_dim
    assert mass.item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale_fn", SCALE_FNS)
@pytest.mark.parametrize("action_dim", [1, 2, 6, 17])
def test_same_weights_give_the_same_density_in_zuko(action_dim, scale_fn, variant):
    """A flow of zuko's coupling transforms with the same s_j and t_j has the same log_prob."""
    policy = random_policy(action_dim, scale_fn=scale_fn, **VARIANTS[variant])
    obs, action = observations(32), 2 * torch.randn(32, action_dim).double()
    expected = zuko_flow(policy, obs).log_prob(action)
    torch.testing.assert_close(policy.log_prob(obs, action), expected, rtol=1e-10, atol=1e-9)


def trained(policy):
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def finite_difference(policy, function, step=1e-6):
    """A random direction in parameter space and the central difference of `function` along it."""
    parameters = trained(policy)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    values = []
    with torch.no_grad():
        for sign in (1, -2):  # one step forward, then two back
            for parameter, d in zip(parameters, direction):
                parameter.add_(sign * step * d)
            values.append(function().item())
        for parameter, d in zip(parameters, direction):
            parameter.add_(step * d)
    return direction, (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("quantity", ["log_prob", "entropy"])
def test_parameter_gradient_matches_finite_differences(quantity, variant):
    """d log pi / d theta, and d/d theta of the sampled entropy through its samples, are what differences say."""
    policy = random_policy(5, size=0.5, **VARIANTS[variant])
    obs, action = observations(16), torch.randn(16, 5).double()

    def function():
        if quantity == "log_prob":
            return policy.log_prob(obs, action).mean()
        torch.manual_seed(7)
        return policy.sample(obs)[1].mean()

    gradients = torch.autograd.grad(function(), trained(policy))
    for _ in range(3):
        direction, expected = finite_difference(policy, function)
        along = sum((gradient * d).sum() for gradient, d in zip(gradients, direction)).item()
        assert abs(expected) > 1e-3
        assert along == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_every_parameter_of_a_one_dimensional_flow_that_can_act_is_trained():
    """With one action dimension half of the layers are empty; the others see the observation and learn."""
    policy = FlowPolicy(OBS_DIM, 1)
    policy.log_prob(observations(8).float(), torch.randn(8, 1)).sum().backward()
    for j, layer in enumerate(policy.layers):
        assert layer.out.weight.numel() == (0 if j % 2 == 0 else 2 * 64)
        assert j % 2 == 0 or layer.out.weight.grad.abs().sum() > 0
        assert j % 2 == 0 or policy.obs_encoder.weight.grad.chunk(4)[j].abs().sum() > 0


@pytest.mark.parametrize("learned", [False, True])
def test_base_deviation(learned):
    """`base_std` is the base's deviation at the start, the paper's 1 by default, and trained only where asked."""
    assert FlowPolicy(OBS_DIM, 3).base_log_std.exp().tolist() == [1.0] * 3
    policy = FlowPolicy(OBS_DIM, 3, base_std=0.5, learned_base_std=learned)
    assert policy.base_log_std.exp().tolist() == [0.5] * 3
    before = [parameter.clone() for parameter in policy.parameters()]
    optimizer = torch.optim.SGD(trained(policy), lr=0.1)
    policy.log_prob(observations(8).float(), torch.randn(8, 3)).sum().backward()
    optimizer.step()
    moved = {name for (name, now), old in zip(policy.named_parameters(), before) if not torch.equal(now, old)}
    assert ("base_log_std" in moved) == learned and "layers.1.out.weight" in moved


def test_unknown_settings_are_refused():
    """As the class's docstring says."""
    with pytest.raises(KeyError, match="sigmoid"):
        FlowPolicy(OBS_DIM, 3, scale_fn="sigmoid")
    for base_std in (0.0, -1.0):
        with pytest.raises(ValueError):
            FlowPolicy(OBS_DIM, 3, base_std=base_std)


def test_parameters_are_as_many_as_the_paper_says():
    """On g1 (47 observations, 12 actions) 16.9 k, nearest to the paper's "aligned with [96, 96, 64]" of 20.9 k."""
    assert sum(parameter.numel() for parameter in trained(FlowPolicy(47, 12))) == 16_944
    assert sum(parameter.numel() for parameter in trained(FlowPolicy(47, 12, learned_base_std=True))) == 16_956


def test_policy_starts_as_a_standard_normal_nearly():
    """At initialization log pi(a|o) is that of N(0, I) up to the small output layers."""
    torch.manual_seed(0)
    policy, obs, action = FlowPolicy(OBS_DIM, 6), observations(256).float(), torch.randn(256, 6)
    normal = torch.distributions.Normal(0, 1).log_prob(action).sum(-1)
    assert (policy.log_prob(obs, action) - normal).abs().max() < 0.5
    assert not torch.equal(policy.log_prob(obs, action), normal)


def test_gaussian_twin_is_the_diagonal_gaussian():
    """The baseline's log_prob is that of torch.distributions.Normal with its mean and deviation."""
    torch.manual_seed(0)
    policy = GaussianPolicy(OBS_DIM, 6).double()
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    obs, action = observations(32), 2 * torch.randn(32, 6).double()
    normal = torch.distributions.Normal(policy.mean(obs), policy.log_std.exp())
    torch.testing.assert_close(policy.log_prob(obs, action), normal.log_prob(action).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(policy.sample(obs, temperature=0.0)[0], policy.mean(obs), rtol=0, atol=0)


@pytest.mark.parametrize("scale_bound", [0.5, 1.5])
def test_logged_diagnostics(scale_bound):
    """flow/... of an update equal a computation by hand: log-determinant, size and saturation of the log-scales."""
    agent = make_agent(OBS_DIM, 4, scale_bound=scale_bound)
    agent.policy = random_policy(4, scale_bound=scale_bound)
    obs, action = observations(50), torch.randn(50, 4).double()
    x, scales = action, []
    for j in range(4):
        scale, shift = paper_scale_and_shift(agent.policy, j, obs, x[:, j % 2 :: 2])
        x = x.clone()
        x[:, 1 - j % 2 :: 2] = x[:, 1 - j % 2 :: 2] * scale.exp() + shift
        scales.append(scale)
    scales = torch.cat(scales, dim=1)
    expected = {
        "flow/log_det": scales.sum(1).mean().item(),
        "flow/scale_abs_mean": scales.abs().mean().item(),
        "flow/scale_saturation": ((scales / scale_bound).abs() > 0.95).double().mean().item(),
    }
    assert 0.1 < expected["flow/scale_saturation"] < 0.9
    args = Args(num_envs=5, num_steps=10, num_minibatches=1, update_epochs=1, scale_bound=scale_bound)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    zeros, never = torch.zeros(10, 5), torch.zeros(10, 5, dtype=torch.bool)
    rollout = obs.view(10, 5, -1), action.view(10, 5, -1), zeros, zeros, zeros, zeros, never, never
    metrics = ppo_update(agent, optimizer, args, rollout, lambda *_: (torch.zeros(1), torch.zeros(5)))
    found = {name: value for name, value in metrics.items() if name.startswith("flow/")}
    assert found == pytest.approx(expected, rel=1e-6)
