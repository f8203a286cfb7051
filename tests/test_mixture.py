"""Promise: the mixture baseline is the density it claims to be, and runs wherever the other policies run."""

import math

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, SMALL, differences, noisy_obs, run, run_folders

import nfpo_continuous_action as nfpo
from benchmarks.baselines.ppo_mixture import MixturePolicy

OBS_DIM = 5
SCRIPT = ROOT / "benchmarks" / "baselines" / "ppo_mixture.py"


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


@pytest.mark.parametrize("num_components", [1, 2, 5])
def test_starts_apart_and_as_wide_as_the_twin(num_components):
    """At initialization no two components lie together, and the mixture has mean 0 and variance 1 nearly."""
    torch.manual_seed(0)
    mixture = reference(MixturePolicy(OBS_DIM, 6, num_components=num_components), observations(64).float())
    assert mixture.mean.abs().max() < 0.1 and (mixture.variance - 1).abs().max() < 0.1
    means = mixture.component_distribution.mean[0]
    assert num_components == 1 or torch.pdist(means).min() > 0.5


def test_compiled():
    """The compiler takes sampling and the whole gradient, forward and backward, and computes what PyTorch does."""
    torch.manual_seed(0)
    policy, critic = MixturePolicy(OBS_DIM, 3), nfpo.Critic(OBS_DIM)
    args = nfpo.Args(num_envs=8, num_steps=1, num_minibatches=1)
    sample, gradient = nfpo.compile_functions(policy, critic, args, OBS_DIM, 3, torch.device("cpu"))
    assert sample != policy.sample and gradient is not nfpo.minibatch_gradient  # not given up
    obs = observations(8).float()
    action, log_prob = policy.sample(obs)
    minibatch = obs, action.detach(), log_prob.detach(), *torch.randn(3, 8)
    expected, _ = nfpo.minibatch_gradient(policy, critic, args, *minibatch)
    found, _ = gradient(policy, critic, args, *minibatch)
    torch.testing.assert_close(found, expected)
    assert sample(obs)[0].shape == (8, 3)


def test_command_line(cli, tmp_path, monkeypatch):
    """The script trains; stopped after its first iteration it resumes bit for bit; it is evaluated and exported."""
    ended = run(*SMALL, "--env-id", "Hopper-v4", "--learning-rate", 0.03, cwd=tmp_path, script=SCRIPT)
    assert ended.status == 0, ended.err
    (folder,) = run_folders(tmp_path)
    assert folder.name.startswith("Hopper-v4__ppo_mixture__1__")
    whole = nfpo.load_checkpoint(folder, MixturePolicy)
    assert whole["iteration"] == 2

    class Stopped(Exception):
        pass

    def save_and_stop(path, checkpoint):
        save_checkpoint(path, checkpoint)
        raise Stopped

    save_checkpoint = nfpo.save_checkpoint
    same = {name: value for name, value in whole["args"].items() if name != "exp_name"}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(nfpo, "save_checkpoint", save_and_stop)
        nfpo.train(nfpo.Args(exp_name="stopped", **same), MixturePolicy)
    stopped = next(path for path in run_folders(tmp_path) if path != folder)
    assert nfpo.load_checkpoint(stopped)["iteration"] == 1
    ended = cli("--resume", stopped, policy_class=MixturePolicy)
    assert ended.status == 0, ended.err
    resumed = nfpo.load_checkpoint(stopped)
    for part in ("iteration", "policy", "critic", "optimizer", "recent_returns", "processes"):
        assert differences(resumed[part], whole[part]) == [], part

    ended = cli("--evaluate", folder, "--eval-episodes", 1, "--export-onnx", "policy.onnx", policy_class=MixturePolicy)
    assert ended.status == 0 and "1 episodes of Hopper-v4 at temperature 0" in ended.out, ended.err
    policy = MixturePolicy(11, 3)
    policy.load_state_dict(whole["policy"])
    stats = nfpo.RunningMeanStd()
    stats.load_state_dict(whole["processes"][0]["collector"]["obs_stats"])
    deployed = nfpo.DeployedPolicy(policy, stats, -np.ones(3), np.ones(3))
    session = onnxruntime.InferenceSession("policy.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7, 256):
        obs = noisy_obs(folder, batch)
        with torch.no_grad():
            expected = deployed(torch.from_numpy(obs)).numpy()
        assert np.abs(session.run(None, {"obs": obs})[0] - expected).max() <= 1e-5
    assert expected.std(0).min() > 1e-3, "a constant policy shows nothing"
