"""Promise: compiled or eager, the results are the same, and where there is no compiler it says so and runs eagerly."""

import pytest
import torch
from conftest import SMALL, run, run_folders, scalars

import nfpo_continuous_action as nfpo


@pytest.fixture(scope="module")
def eager_run(train_small):
    return train_small("Hopper-v4", num_flow_layers=2)


def test_compiled_equals_eager(eager_run, train_small):
    """Two iterations give the same losses and weights whichever way they run."""
    compiled_run = train_small("Hopper-v4", num_flow_layers=2, compile=True)
    eager, compiled = nfpo.load_checkpoint(eager_run), nfpo.load_checkpoint(compiled_run)
    for network in ("policy", "critic"):
        for name, weight in eager[network].items():
            torch.testing.assert_close(compiled[network][name], weight, atol=1e-4, rtol=0, msg=name)
    ours, theirs = scalars(compiled_run), scalars(eager_run)
    assert len(ours["charts/episodic_return"]) == len(theirs["charts/episodic_return"])
    for name in theirs.keys() - {"charts/SPS"}:
        for (step, value), (other_step, other) in zip(ours[name], theirs[name]):
            assert step == other_step and value == pytest.approx(other, abs=1e-4, rel=1e-4), name


def test_no_compiler(eager_run, tmp_path):
    """Without a compiler one line says so, and the run equals an eager one bit for bit."""
    flags = [flag for flag in SMALL if flag != "--no-compile"]
    variables = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = run(*flags, "--env-id", "Hopper-v4", "--num-flow-layers", 2, cwd=tmp_path, **variables)
    assert ended.status == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "compiler does not work here" in line]
    assert len(lines) == 1 and "eager" in lines[0]
    ours, eager = nfpo.load_checkpoint(run_folders(tmp_path)[0]), nfpo.load_checkpoint(eager_run)
    for name, weight in eager["policy"].items():
        assert torch.equal(ours["policy"][name], weight), name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled libraries."""
    monkeypatch.setattr(nfpo, "cache_dir", lambda: str(tmp_path))
    return tmp_path


def compile_sample(policy, obs):
    with torch.no_grad():
        return nfpo.compile_ahead(policy.sample, (policy,), (obs,))


def test_library_sees_new_weights_and_is_kept(cache, monkeypatch):
    """What is compiled computes with the weights of the moment, and a second start finds it."""
    policy, obs = nfpo.FlowPolicy(5, 3, num_layers=2, learned_base_std=True), torch.randn(4, 5)
    compile_sample(policy, obs)
    assert len(list(cache.glob("*.pt2"))) == 1
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: pytest.fail("compiled again"))
    vector = nfpo.flatten_parameters(list(policy.parameters()))
    sample = compile_sample(policy, obs)
    with torch.no_grad():
        vector += 0.1 * torch.randn_like(vector)  # as the optimizer does
        torch.manual_seed(5)
        found = sample(obs)
        torch.manual_seed(5)
        torch.testing.assert_close(tuple(found), policy.sample(obs))


def test_other_constants_are_another_library(cache):
    """Same shapes, other bound: not the library of before."""
    obs = torch.randn(4, 5)
    for bound in (0.5, 1.0):
        policy = nfpo.FlowPolicy(5, 3, num_layers=1, scale_bound=bound)
        torch.nn.init.normal_(policy.layers[0].out.weight)
        compile_sample(policy, obs)  # compares both with PyTorch
    assert len(list(cache.glob("*.pt2"))) == 2


class Shifted(nfpo.FlowPolicy):
    """A reader's policy with a tensor that is neither parameter nor buffer."""

    def sample(self, obs, temperature=1.0):
        actions, log_probs = super().sample(obs, temperature)
        return actions + self.shift, log_probs


def test_other_tensor_is_another_library(cache):
    """Same graph, other numbers in a tensor that the graph holds: not the library of before."""
    for shift in (0.0, 1.0):
        policy = Shifted(5, 3, num_layers=1)
        policy.shift = torch.full((3,), shift)
        compile_sample(policy, torch.randn(4, 5))  # compares with PyTorch
    assert len(list(cache.glob("*.pt2"))) == 2


def test_other_processor_is_another_library(cache, monkeypatch):
    """A library made for one processor may hold instructions that the next one does not know."""
    policy, obs = nfpo.FlowPolicy(5, 3, num_layers=1), torch.randn(4, 5)
    compile_sample(policy, obs)
    other = {**torch.cpu.get_capabilities(), "cpu_name": "another one"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: other)
    compile_sample(policy, obs)
    assert len(list(cache.glob("*.pt2"))) == 2


class Drifting(nfpo.FlowPolicy):
    """Computes something else at each call, which no compiled function can."""

    calls = 0

    def sample(self, obs, temperature=1.0):
        Drifting.calls += 1
        return obs[:, : self.action_dim] + Drifting.calls, obs[:, 0]


def test_wrong_library_is_not_used(cache, capsys):
    """Where compiled and eager disagree, training goes on eagerly and says why."""
    policy, critic, args = Drifting(5, 3), nfpo.Critic(5), nfpo.Args(num_steps=8, num_minibatches=1)
    sample, gradient = nfpo.compile_functions(policy, critic, args, 5, 3, torch.device("cpu"))
    assert sample == policy.sample and gradient is nfpo.minibatch_gradient
    assert "eager" in capsys.readouterr().out


class LaplacePolicy(torch.nn.Module):
    """A reader's own policy, made of torch.distributions."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net, self.log_scale = torch.nn.Linear(obs_dim, action_dim), torch.nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, obs, action):
        return torch.distributions.Laplace(self.net(obs), self.log_scale.exp()).log_prob(action).sum(-1)

    def sample(self, obs, temperature=1.0):
        action = torch.distributions.Laplace(self.net(obs), self.log_scale.exp()).sample()
        return action, self.log_prob(obs, action)


def test_own_policy_compiles(cache, monkeypatch):
    """torch.distributions validates values, which no graph knows: compilation need not be given up for that."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # or torch.compile has it off
    policy, critic, args = LaplacePolicy(5, 3), nfpo.Critic(5), nfpo.Args(num_steps=8, num_minibatches=1)
    sample, gradient = nfpo.compile_functions(policy, critic, args, 5, 3, torch.device("cpu"))
    assert sample != policy.sample and gradient is not nfpo.minibatch_gradient
    with pytest.raises(ValueError):  # and afterwards it validates as before
        torch.distributions.Laplace(torch.zeros(1), -torch.ones(1))
