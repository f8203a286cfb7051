"""Promise: the flow around a mean is the density it claims to be, and it contains and starts as the Gaussian twin."""

import inspect
import math

import torch
from conftest import ROOT, run, run_folders

import nfpo_continuous_action as nfpo
from benchmarks.baselines.nfpo_mean import MeanFlowPolicy
from benchmarks.baselines.ppo_continuous_action import GaussianPolicy

OBS = torch.randn(4, 5, dtype=torch.float64)


def policy(scale: float = 0.5, **options) -> MeanFlowPolicy:
    """One far from its initialization."""
    torch.manual_seed(0)
    made = MeanFlowPolicy(5, 3, **options).double()
    for parameter in made.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return made


def test_density():
    """log_prob is N(f(a)) plus the determinant that autograd finds, and sampling is its inverse."""
    flow = policy(base_std=0.5, learned_base_std=True)
    action, log_prob = flow.sample(OBS)
    torch.testing.assert_close(flow.log_prob(OBS, action), log_prob)
    for i in range(len(OBS)):
        jacobian = torch.autograd.functional.jacobian(
            lambda a, i=i: flow.forward(OBS[i : i + 1], a[None])[0][0], action[i]
        )
        z, _ = flow.forward(OBS[i : i + 1], action[i : i + 1])
        sigma = flow.base_log_std.exp()
        normal = torch.distributions.Normal(torch.zeros_like(sigma), sigma).log_prob(z[0]).sum()
        torch.testing.assert_close(normal + torch.linalg.slogdet(jacobian).logabsdet, log_prob[i])


def test_contains_the_gaussian():
    """With couplings that do nothing it is the twin, of the same mean and deviation."""
    flow, twin = policy(base_std=0.5), GaussianPolicy(5, 3, base_std=0.5).double()
    for layer in flow.layers:
        layer.out.weight.data.zero_()
        layer.out.bias.data.zero_()
    twin.mean.load_state_dict(flow.mean.state_dict())
    twin.log_std.data.copy_(flow.base_log_std)
    action = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(OBS, action), twin.log_prob(OBS, action))
    torch.testing.assert_close(flow.sample(OBS, temperature=0.0)[0], twin.sample(OBS, temperature=0.0)[0])


def test_starts_as_the_gaussian():
    """Nearly: the couplings' last layers start small."""
    torch.manual_seed(0)
    flow = MeanFlowPolicy(5, 3, base_std=0.5).double()
    action = flow.mean(OBS) + 0.5 * torch.randn(4, 3, dtype=torch.float64)
    normal = torch.distributions.Normal(flow.mean(OBS), 0.5)
    torch.testing.assert_close(flow.log_prob(OBS, action), normal.log_prob(action).sum(-1), atol=0.2, rtol=0)
    assert math.isclose(flow.base_log_std.exp()[0].item(), 0.5, rel_tol=1e-6)


def test_takes_the_flows_options():
    """`train` hands it what FlowPolicy takes."""
    assert inspect.signature(MeanFlowPolicy).parameters.keys() == inspect.signature(nfpo.FlowPolicy).parameters.keys()


def test_trains_and_plays(tmp_path):
    """By the script's own command line."""
    script = ROOT / "benchmarks" / "baselines" / "nfpo_mean.py"
    small = "--env-id Pendulum-v1 --num-envs 4 --num-steps 16 --num-minibatches 2 --total-timesteps 128 --no-compile"
    assert run(*small.split(), cwd=tmp_path, script=script).status == 0
    (folder,) = run_folders(tmp_path)
    ended = run("--evaluate", folder, "--eval-episodes", 1, cwd=tmp_path, script=script)
    assert ended.status == 0 and "1 episodes" in ended.out
