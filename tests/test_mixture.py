"""Promise: the mixture baseline is the density it claims to be, and runs wherever the other policies run."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import noisy_obs
from test_evaluate import deterministic_actions

import nfpo_continuous_action as nfpo
from benchmarks.baselines.ppo_mixture import MixturePolicy

OBS_DIM = 5


def random_policy(action_dim: int, seed: int = 0, **sizes) -> MixturePolicy:
    """A float64 mixture far from its initialization: unequal weights, spread means, unequal deviations."""
    torch.manual_seed(seed)
    policy = MixturePolicy(OBS_DIM, action_dim, hidden_dim=16, **sizes).double()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            spread = 0.5 if name == "log_std" else parameter.shape[-1] ** -0.5
            parameter.add_(spread * torch.randn_like(parameter))
    return policy


def observations(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, OBS_DIM, generator=torch.Generator().manual_seed(seed)).double()


def reference(policy: MixturePolicy, obs: torch.Tensor) -> torch.distributions.Distribution:
    """The same mixture from PyTorch's parts."""
    hidden = policy.trunk(obs)
    means = policy.means(hidden).view(len(obs), *policy.log_std.shape)
    components = torch.distributions.Independent(torch.distributions.Normal(means, policy.log_std.exp()), 1)
    weights = torch.distributions.Categorical(logits=policy.logits(hidden))
    return torch.distributions.MixtureSameFamily(weights, components)


@pytest.mark.parametrize("num_components", [1, 2, 5])
@pytest.mark.parametrize("action_dim", [1, 2, 6, 17])
def test_log_prob_is_that_of_pytorchs_mixture(action_dim, num_components):
    """log_prob equals MixtureSameFamily's, also far out, and in float32 to 1e-5 of its size."""
    policy = random_policy(action_dim, num_components=num_components)
    obs = observations(64)
    for size in (1, 30):
        action = size * torch.randn(64, action_dim).double()
        expected = reference(policy, obs).log_prob(action)
        torch.testing.assert_close(policy.log_prob(obs, action), expected, rtol=1e-12, atol=1e-12)
        in_float32 = random_policy(action_dim, num_components=num_components).float()
        found = in_float32.log_prob(obs.float(), action.float())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("action_dim", [1, 2, 17])
def test_sample_hands_out_the_log_prob_of_its_action(action_dim):
    """The log-probability of the sampling pass is log_prob(obs, action), at every temperature that of temperature 1."""
    policy, obs = random_policy(action_dim), observations(64)
    for temperature in (0.0, 0.3, 1.0, 2.0):
        action, log_prob = policy.sample(obs, temperature=temperature)
        assert action.shape == (64, action_dim) and log_prob.shape == (64,)
        torch.testing.assert_close(log_prob, policy.log_prob(obs, action), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_samples_have_the_mixtures_moments(temperature):
    """Mean and covariance of samples at one observation are the analytic ones, the noise scaled by the temperature."""
    policy, count = random_policy(3), 200_000
    obs = observations(1)
    action, _ = policy.sample(obs.expand(count, -1), temperature=temperature)
    mixture = reference(policy, obs)
    weights, means = mixture.mixture_distribution.probs[0], mixture.component_distribution.mean[0]  # (K,), (K, 3)
    mean = weights @ means
    offsets = means - mean
    noise = (temperature * policy.log_std.exp()).square()
    covariance = torch.einsum("k,ki,kj->ij", weights, offsets, offsets) + torch.diag(weights @ noise)
    deviation = covariance.diagonal().sqrt()
    error = 5 / math.sqrt(count)  # five standard errors of a mean of unit variables
    assert ((action.mean(0) - mean) / deviation).abs().max() < error
    # The variance of a product of two correlated variables is at most that of a square: kurtosis - 1, here below 4.
    scaled = (torch.cov(action.T) - covariance) / torch.outer(deviation, deviation)
    assert scaled.abs().max() < 2 * error


def test_components_are_drawn_by_their_weights():
    """With components that cannot be mistaken for each other, the share of each is its weight."""
    policy, count = random_policy(2), 200_000
    obs = observations(1)
    with torch.no_grad():
        policy.log_std.fill_(-7)
        policy.means.bias.mul_(10)
    action, _ = policy.sample(obs.expand(count, -1))
    mixture = reference(policy, obs)
    means, weights = mixture.component_distribution.mean[0], mixture.mixture_distribution.probs[0]
    distance, nearest = torch.cdist(action, means).min(-1)
    assert distance.max() < 0.01 and torch.pdist(means).min() > 0.1
    shares = torch.bincount(nearest, minlength=5) / count
    assert weights.min() < 0.7 / 5 < 1.3 / 5 < weights.max(), "equal weights show nothing"
    assert ((shares - weights).abs() < 5 * (weights * (1 - weights) / count).sqrt()).all()


@pytest.mark.parametrize("action_dim, points", [(1, 4001), (2, 401)])
def test_density_integrates_to_1(action_dim, points):
    """The density has mass 1 over the action space, by quadrature on a grid."""
    policy = random_policy(action_dim, seed=3)
    axis = torch.linspace(-15, 15, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * action_dim).view(-1, action_dim)
    mass = policy.log_prob(observations(1).expand(len(grid), -1), grid).exp().sum() * (axis[1] - axis[0]) ** action_dim
    assert mass.item() == pytest.approx(1, abs=1e-6)


def test_temperature_0_is_the_mean_of_the_likeliest_component():
    """At temperature 0 the policy is deterministic, and different observations choose different components."""
    policy, obs = random_policy(4), observations(64)
    mixture = reference(policy, obs)
    likeliest = mixture.mixture_distribution.probs.argmax(-1)
    first, second = policy.sample(obs, temperature=0.0)[0], policy.sample(obs, temperature=0.0)[0]
    assert torch.equal(first, second) and len(likeliest.unique()) > 1
    assert torch.equal(first, mixture.component_distribution.mean[range(64), likeliest])
    assert not torch.allclose(first, policy.sample(obs, temperature=1.0)[0])


@pytest.mark.parametrize("base_std", [0.5, 1.0])
@pytest.mark.parametrize("num_components", [1, 2, 5])
def test_starts_apart_and_as_wide_as_the_twin(num_components, base_std):
    """At initialization no two components lie together, and the mixture's mean is 0, its deviation base_std nearly."""
    torch.manual_seed(0)
    policy = MixturePolicy(OBS_DIM, 6, num_components=num_components, base_std=base_std)
    mixture = reference(policy, observations(64).float())
    assert mixture.mean.abs().max() < 0.1 and (mixture.variance.sqrt() / base_std - 1).abs().max() < 0.1
    means = mixture.component_distribution.mean[0]
    assert num_components == 1 or torch.pdist(means).min() > 0.5 * base_std


def test_trained_played_and_exported(cli, train_small):
    """It trains, plays and resumes with the script's own functions, and its export is the deployed policy."""
    run_dir = train_small("Hopper-v4", MixturePolicy, learning_rate=0.03, exp_name="ppo_mixture")
    assert run_dir.name.startswith("Hopper-v4__ppo_mixture__1__")
    flags = "--evaluate", run_dir, "--eval-episodes", 1, "--export-onnx", "policy.onnx"
    ended = cli(*flags, policy_class=MixturePolicy)
    assert ended.status == 0 and "1 episodes, temperature 0" in ended.out, ended.err
    session = onnxruntime.InferenceSession("policy.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7, 256):
        obs = noisy_obs(run_dir, batch)
        expected = deterministic_actions(run_dir, obs, "Hopper-v4", MixturePolicy(11, 3))
        np.testing.assert_allclose(session.run(None, {"obs": obs})[0], expected, atol=1e-5)
    assert expected.std(0).min() > 1e-3, "a constant policy shows nothing"
    assert cli("--resume", run_dir, "--total-timesteps", 256, policy_class=MixturePolicy).status == 0
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 256
