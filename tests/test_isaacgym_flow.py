"""The Isaac Gym script on today's Python and PyTorch: its mathematics is the reference script's."""

import pytest
import torch

import nfpo_continuous_action as reference
import nfpo_isaacgym as nfpo


@pytest.mark.parametrize("flags", [{}, {"scale_fn": "clip", "num_layers": 3, "hidden_layers": 2}], ids=str)
def test_same_start_and_same_function(flags):
    """The same seed draws the same weights, which give the same numbers."""
    flows = []
    for script in (nfpo, reference):
        torch.manual_seed(0)
        flows.append(script.FlowPolicy(5, 3, **flags))
    assert flows[0].state_dict().keys() == flows[1].state_dict().keys()
    for name, tensor in flows[0].state_dict().items():
        assert torch.equal(tensor, flows[1].state_dict()[name]), name
    obs, action = torch.randn(9, 5), torch.randn(9, 3)
    assert torch.equal(*(flow.log_prob(obs, action) for flow in flows))
    for temperature in (0.0, 1.0):
        torch.manual_seed(3)
        found = flows[0].sample(obs, temperature)
        torch.manual_seed(3)
        assert all(torch.equal(*pair) for pair in zip(found, flows[1].sample(obs, temperature)))


def test_parameters_are_as_many_as_the_paper_says():
    """On g1 (47 observations, 12 actions): 16.9 k, beside 20.9 k of PPO's [96, 96, 64]."""
    from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

    policies = nfpo.FlowPolicy(47, 12), GaussianPolicy(47, 12)
    counts = [sum(p.numel() for p in policy.parameters() if p.requires_grad) for policy in policies]
    assert [round(count / 1000, 1) for count in counts] == [16.9, 20.9]


def test_gae_is_the_references():
    torch.manual_seed(0)
    values = torch.randn(3, 20, 4)
    done, died = torch.rand(2, 20, 4) < 0.3
    found = nfpo.compute_gae(*values, died & done, done, 0.97, 0.9)
    assert torch.equal(found, reference.compute_gae(*values, died & done, done, 0.97, 0.9))


@pytest.mark.parametrize("dims", [3, 1])
def test_running_statistics_are_the_references(dims):
    """float64 sums of the same data give the same mean and variance."""
    found, wanted = nfpo.RunningMeanStd(dims), reference.RunningMeanStd(dims)
    torch.manual_seed(0)
    for _ in range(5):
        batch = 3 + 2 * torch.randn(6, dims, dtype=torch.float64)
        found.update(batch)
        wanted.update(batch)
    torch.testing.assert_close(found.mean.double(), wanted.mean)
    torch.testing.assert_close(found.var.double(), wanted.var)


def test_without_the_simulator_it_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """Here there is no Isaac Gym: the script can be imported, and says in one line what training would need."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["nfpo_isaacgym.py", "--device", "cpu", "--no-compile"])
    with pytest.raises(SystemExit) as ended:
        nfpo.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "isaac" in err.lower() and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
