"""Promise: the flow in both PyTorch scripts is the same text, and runs on Python 3.8 and PyTorch 2.4.1."""

import pytest
import torch

import nfpo_isaacgym as nfpo

from .conftest import ROOT, SCRIPT


def flow_of(script):
    """From `FlowPolicy` to `linear`, all that a copy of the flow needs."""
    text = (ROOT / script).read_text()
    return text[text.index("class FlowPolicy") : text.index("class Critic")]


def test_same_text():
    assert flow_of("nfpo_continuous_action.py") == flow_of(SCRIPT.name)


@pytest.mark.parametrize("scale_fn", ["tanh", "clip", "none", "zero", "asymmetric"])
@pytest.mark.parametrize("action_dim", [1, 2, 5])
def test_density_is_autograds(scale_fn, action_dim):
    """log pi(a|o) in float64 against the determinant of autograd's Jacobian, and f against its inverse."""
    torch.manual_seed(1)
    flow = nfpo.FlowPolicy(4, action_dim, scale_fn=scale_fn, base_std=0.5, learned_base_std=True).double()
    for parameter in flow.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    obs, action = torch.randn(1, 4).double(), torch.randn(1, action_dim).double()
    jacobian = torch.autograd.functional.jacobian(lambda a: flow.forward(obs, a)[0][0], action)[:, 0]
    z, log_det = flow.forward(obs, action)
    base = torch.distributions.Normal(0.0, flow.base_log_std.exp())
    expected = base.log_prob(z).sum() + torch.linalg.slogdet(jacobian)[1]
    assert flow.log_prob(obs, action).item() == pytest.approx(expected.item(), abs=1e-10)
    back, back_det = flow.inverse(obs, z)
    assert torch.allclose(back, action, atol=1e-10) and back_det.item() == pytest.approx(-log_det.item(), abs=1e-10)
    action, log_prob = flow.sample(obs)
    assert log_prob.item() == pytest.approx(flow.log_prob(obs, action).item(), abs=1e-9)


def test_flags_reach_the_policies():
    """Every flag of the flow is an argument of the class, and the twin takes the deviation."""
    from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

    args = nfpo.Args(num_flow_layers=3, hidden_dim=8, hidden_layers=2, scale_fn="clip", scale_bound=0.3, base_std=0.7)
    args.learned_base_std = True
    policy = nfpo.Agent(args, nfpo.FlowPolicy, 5, 2, 4).policy
    layer = policy.layers[0]
    assert (len(policy.layers), layer.out.in_features, len(layer.hidden)) == (3, 8, 1)
    assert layer.scale_fn is layer.SCALE_FNS["clip"] and layer.scale_bound == 0.3 and policy.base_log_std.requires_grad
    twin = nfpo.Agent(args, GaussianPolicy, 5, 2, 4).policy
    for log_std in (policy.base_log_std, twin.log_std):
        assert torch.allclose(log_std.exp(), torch.tensor(0.7))
    paper = nfpo.Args()  # the paper's column for Isaac Gym
    assert (paper.base_std, paper.learned_base_std, paper.num_envs, paper.num_steps) == (1.0, False, 4096, 24)
