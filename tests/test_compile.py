"""Promise: compiled or eager, the results are the same, and where there is no compiler it says so and runs eagerly."""

from functools import partial

import pytest
import torch
from conftest import SMALL, make_agent, run, run_folders, scalars
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import nfpo_continuous_action as nfpo

ARGS = {"num_envs": 6, "num_steps": 4, "num_minibatches": 3}
RUN = {"env_id": "Hopper-v4", "num_flow_layers": 2, "ent_coef": 0.01}  # each layer costs the compiler seconds
VARIANTS = {
    "flow": {},
    "entropy": {"ent_coef": 0.1, "clip_vloss": False, "norm_adv": False},
    "deep": {"hidden_layers": 2, "num_flow_layers": 3, "learned_base_std": False},
    "clip": {"scale_fn": "clip"},
    "asymmetric": {"scale_fn": "asymmetric"},
    "gaussian": {},
    "mixture": {},
}


class Case:
    """An agent, its two functions and the same as graphs or compiled."""

    def __init__(self, agent, eager, compiled):
        self.agent, self.eager, self.compiled, self.obs_dim = agent, eager, compiled, agent.obs_stats.mean.numel()
        assert compiled[0] is not eager[0] and compiled[1] is not eager[1], "it was given up"

    def obs(self) -> torch.Tensor:
        return torch.randn(self.num_envs, self.obs_dim, dtype=torch.float64)

    def minibatch(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Samples near the policy's own, each of the six tensors another one."""
        torch.manual_seed(seed)
        obs = torch.randn(self.size, self.obs_dim)
        with torch.no_grad():
            actions, log_probs = self.agent.policy.sample(obs)
        numbers = torch.randn(4, self.size) * torch.tensor([[0.2], [1.0], [2.0], [3.0]])
        return obs, actions, log_probs + numbers[0], *numbers[1:].unbind()


@pytest.fixture(scope="module")
def mixture() -> type:
    from benchmarks.baselines.ppo_mixture import MixturePolicy

    return MixturePolicy


@pytest.fixture(scope="module", params=VARIANTS)
def graph(request, gaussian, mixture) -> Case:
    """The graphs that the compiler gets, run as they are: they are nearly all that can be wrong, and cost no time."""
    args = nfpo.Args(**ARGS, **VARIANTS[request.param])
    policy_class = {"gaussian": gaussian, "mixture": mixture}.get(request.param, nfpo.FlowPolicy)
    agent = make_agent(5, 3, policy_class, size=0.1, **VARIANTS[request.param])
    vector = parameters_to_vector(agent.trained()).detach()
    vector_to_parameters(vector, agent.trained())  # as in training: views of one vector
    eager = agent.act, partial(nfpo.ppo_gradient, agent, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "standalone_compile", lambda graph, inputs, options: graph)
        found = nfpo.compile_functions(agent, args, torch.randn(6, 5, dtype=torch.float64), *eager)
    case = Case(agent, eager, found)
    case.num_envs, case.size = 6, 8
    return case


@pytest.fixture(scope="module")
def compiled_run(train_small) -> tuple:
    """A short run with the compiler, and its functions."""
    cases, compile_functions = [], nfpo.compile_functions

    def keep(agent, args, raw_obs, *eager):
        found = compile_functions(agent, args, raw_obs, *eager)
        cases.append(Case(agent, eager, found))
        cases[0].num_envs, cases[0].size = len(raw_obs), args.num_envs * args.num_steps // args.num_minibatches
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nfpo, "compile_functions", keep)
        run_dir = train_small(**RUN, compile=True)
    return run_dir, cases[0]


@pytest.fixture(scope="module")
def eager_run(train_small):
    return train_small(**RUN)


def same(function, compiled_function, *inputs) -> None:
    torch.manual_seed(7)
    with torch.enable_grad():
        expected = function(*inputs)
    torch.manual_seed(7)
    found = compiled_function(*inputs)
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check(case: Case) -> None:
    """Random inputs, each tensor another; then new parameters and statistics, changed in place as training does it."""
    (act, gradient_fn), (compiled_act, compiled_gradient_fn) = case.eager, case.compiled
    for seed in range(3):
        obs = case.obs()
        with torch.no_grad():
            same(act, compiled_act, obs)
        same(gradient_fn, compiled_gradient_fn, *case.minibatch(seed))
        before = [torch.cat([part.flatten() for part in f]) for f in outputs(case, obs)]
        with torch.no_grad():
            for parameter in case.agent.trained():
                parameter += 0.1 * torch.randn_like(parameter)
            case.agent.obs_stats.update(case.obs() * 3 + 1)
        after = [torch.cat([part.flatten() for part in f]) for f in outputs(case, obs)]
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(after, before))

    inputs = case.minibatch(0)  # a tensor that was taken for another, or for a constant, would not show in the gradient
    gradient = outputs(case, obs)[1][0]
    for i in range(len(inputs)):
        changed = [*inputs]
        changed[i] = inputs[i] + 0.1 * torch.randn_like(inputs[i])
        torch.manual_seed(7)
        assert not torch.equal(case.compiled[1](*changed)[0], gradient) or (i == 5 and "old values need clip_vloss"), i
    assert not torch.equal(case.compiled[0](obs)[1], case.compiled[0](obs)[1]), "its noise is part of it"


def outputs(case: Case, obs: torch.Tensor) -> tuple:
    torch.manual_seed(7)
    return case.compiled[0](obs), case.compiled[1](*case.minibatch(0))


def test_graphs(graph):
    """What is handed to the compiler computes what PyTorch does, for each policy and loss."""
    check(graph)


def test_training(eager_run, compiled_run):
    """Two iterations give the same losses and parameters whichever way they run."""
    run_dir, _ = compiled_run
    eager, compiled = (nfpo.load_checkpoint(path)["agent"] for path in (eager_run, run_dir))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    ours, theirs = scalars(run_dir), scalars(eager_run)
    for name in theirs.keys() - {"charts/SPS"}:
        assert [step for step, _ in ours[name]] == [step for step, _ in theirs[name]], name
        values = [[value for _, value in points[name]] for points in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-4, rel=1e-4), name


def test_compiled(compiled_run):
    """The compiled functions compute what PyTorch does, with the parameters of the moment."""
    check(compiled_run[1])


def test_no_compiler(eager_run, tmp_path):
    """Without a compiler one line says so, and the run equals an eager one bit for bit."""
    flags = [flag for flag in SMALL if flag != "--no-compile"]
    variables = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags += ["--env-id", "Hopper-v4", "--num-flow-layers", 2, "--ent-coef", 0.01]
    ended = run(*flags, cwd=tmp_path, **variables)
    assert ended.status == 0 and "Traceback" not in ended.err, ended
    lines = [line for line in ended.out.splitlines() if "compiler does not work here" in line]
    assert len(lines) == 1 and "eager" in lines[0]
    ours, eager = (nfpo.load_checkpoint(run_dir)["agent"] for run_dir in (run_folders(tmp_path)[0], eager_run))
    for name, tensor in eager.items():
        assert torch.equal(ours[name], tensor), name


class LaplacePolicy(torch.nn.Module):
    """A reader's own policy, made of torch.distributions, which validates what it is given."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()
        self.net, self.log_scale = torch.nn.Linear(obs_dim, action_dim), torch.nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, obs, action):
        return torch.distributions.Laplace(self.net(obs), self.log_scale.exp()).log_prob(action).sum(-1)

    def sample(self, obs, temperature=1.0):
        action = torch.distributions.Laplace(self.net(obs), self.log_scale.exp()).sample()
        return action, self.log_prob(obs, action)


def test_what_cannot_be_compiled_runs(capsys, monkeypatch):
    """A policy that no graph can hold costs a line at most, and never a run."""
    args, agent = nfpo.Args(**ARGS), make_agent(5, 3, LaplacePolicy)
    eager = agent.act, partial(nfpo.ppo_gradient, agent, args)
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda graph, inputs, options: graph)
    act, gradient_fn = nfpo.compile_functions(agent, args, torch.randn(6, 5, dtype=torch.float64), *eager)
    said = capsys.readouterr().out
    assert (act is eager[0]) == ("eager" in said) and said.count("\n") <= 1
    case = Case(agent, (None, None), (act, gradient_fn))
    case.num_envs, case.size = 6, 8
    same(eager[1], gradient_fn, *case.minibatch(0))
