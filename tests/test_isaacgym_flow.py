"""The Isaac Gym script's mathematics on today's Python and PyTorch: its flow and GAE are the reference script's."""

import numpy as np
import pytest
import torch

import nfpo_continuous_action as reference
import nfpo_isaacgym as nfpo

FLAGS = [
    *({"scale_fn": name} for name in ("tanh", "clip", "none", "zero", "asymmetric")),
    {"num_layers": 3, "hidden_layers": 2},
    {"scale_bound": 1.5, "learned_base_std": True, "hidden_dim": 16},
]


def perturbed(policy, size=0.3):
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return policy


def same(found, wanted):
    """Up to float64's rounding: the batch lies along another dimension, and sums add up in another order."""
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("action_dim", [1, 2, 5, 12])
def test_same_function_as_the_reference(flags, action_dim, monkeypatch):
    """With the reference's activation and the same weights, every method gives the same numbers."""
    flow = perturbed(nfpo.FlowPolicy(7, action_dim, **flags), 0.15)
    expected = reference.FlowPolicy(7, action_dim, **flags)
    expected.load_state_dict(flow.state_dict())
    flow, expected = flow.double(), expected.double()
    obs, action = torch.randn(9, 7).double(), torch.randn(9, action_dim).double()
    with_elu = flow.log_prob(obs, action)
    monkeypatch.setattr(torch.nn.functional, "elu", torch.tanh)
    same(flow.log_prob(obs, action), expected.log_prob(obs, action))
    for name in ("forward", "inverse"):
        for found, wanted in zip(getattr(flow, name)(obs, action), getattr(expected, name)(obs, action)):
            same(found, wanted)
    for temperature in (0.0, 0.5, 1.0):
        torch.manual_seed(3)
        found = flow.sample(obs, temperature)
        torch.manual_seed(3)
        wanted = expected.sample(obs, temperature)
        same(found[0], wanted[0])
        same(found[1], wanted[1])
    assert flow.diagnostics(obs, action) == pytest.approx(expected.diagnostics(obs, action))
    assert not torch.allclose(with_elu, expected.log_prob(obs, action))  # and ELU is another function


def test_same_start_as_the_reference():
    """The same seed draws the same weights."""
    torch.manual_seed(0)
    found = nfpo.FlowPolicy(5, 3).state_dict()
    torch.manual_seed(0)
    wanted = reference.FlowPolicy(5, 3).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("action_dim", [1, 2, 5])
def test_log_determinant_is_autograds(flags, action_dim):
    """log|det df/da| in float64 against the determinant of autograd's Jacobian, and f against its inverse."""
    flow = perturbed(nfpo.FlowPolicy(4, action_dim, **flags), 0.15).double()  # unbounded scales overflow soon
    obs, action = torch.randn(1, 4).double(), torch.randn(1, action_dim).double()
    jacobian = torch.autograd.functional.jacobian(lambda a: flow.forward(obs, a)[0][0], action)[:, 0]
    z, log_det = flow.forward(obs, action)
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-10)
    back, back_det = flow.inverse(obs, z)
    np.testing.assert_allclose(back.detach(), action, atol=1e-10)
    assert back_det.item() == pytest.approx(-log_det.item(), abs=1e-10)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_sample_knows_its_log_prob(flags):
    flow = perturbed(nfpo.FlowPolicy(4, 3, **flags), 0.15).double()
    obs = torch.randn(50, 4).double()
    action, log_prob = flow.sample(obs)
    np.testing.assert_allclose(log_prob.detach(), flow.log_prob(obs, action).detach(), atol=1e-9)


def test_parameters_are_as_many_as_the_paper_says():
    """On g1 (47 observations, 12 actions): 16.9 k, beside 20.9 k of PPO's [96, 96, 64]."""
    from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

    counts = [sum(p.numel() for p in cls(47, 12).parameters()) for cls in (nfpo.FlowPolicy, GaussianPolicy)]
    assert [round(count / 1000, 1) for count in counts] == [16.9, 20.9]


def test_gae_is_the_references():
    torch.manual_seed(0)
    values = torch.randn(3, 20, 4)
    done, died = torch.rand(2, 20, 4) < 0.3
    found = nfpo.compute_gae(*values, died & done, done, 0.97, 0.9)
    assert torch.equal(found, reference.compute_gae(*values, died & done, done, 0.97, 0.9))


@pytest.mark.parametrize("dims", [3, 1])
def test_running_statistics_are_the_references(dims):
    """PyTorch's on the device against NumPy's."""
    found, wanted = nfpo.RunningMeanStd(dims, torch.device("cpu")), reference.RunningMeanStd((dims,))
    rng = np.random.default_rng(0)
    for _ in range(5):
        batch = 3 + 2 * rng.standard_normal((6, dims))
        found.update(torch.from_numpy(batch))
        wanted.update(batch)
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, wanted.std, rtol=1e-12)
    np.testing.assert_allclose(found.normalize(torch.from_numpy(batch)), reference.normalize_obs(wanted, batch))


def test_without_the_simulator_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """Here there is no Isaac Gym: the script can be imported, and says in one line what training would need."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nfpo_isaacgym.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        nfpo.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Isaac Gym" in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
