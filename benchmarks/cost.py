"""What does one decision cost? Size, arithmetic and latency of the three policies, and of the critic apart.

Run:     python benchmarks/cost.py --env-ids Humanoid-v4 HalfCheetah-v4 g1
Needs:   pip install -r requirements.txt

Everything is measured on freshly initialized networks at the script's default sizes: what they have learned does not
change what they cost. (On g1 the paper's Gaussian is [96, 96, 64] and has more parameters than the flow; here it is the
twin with its [64, 64].) A decision is what a robot runs (the script's `Agent` at temperature 0): a raw observation in,
an action within its limits out, both numpy arrays with a batch of 1. The critic, which no decision needs, is called in
the same way. Called back to back, a decision finds its weights in the processor's caches; the rows `every 20 ms` call
it at a robot's rate instead. The training row is the policy's share of training: `sample` and then `log_prob` with its
gradient, on a batch as large as the paper's number of environments. Simulator, critic and optimizer are not in it, so
its ratio is not to be compared with the paper's 1.19 for whole runs (Table S2); `speed.py` measures whole runs.

All in one process on one thread, contenders in turn A B C A B C ... and all runtimes within a round, so that a busy
machine slows all of them alike. Ratios to the Gaussian are taken within a round and their median is reported; the times
beside them are medians too.
"""

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime
import torch
import torch.nn as nn
import tyro
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.baselines.ppo_continuous_action import GaussianPolicy  # noqa: E402
from benchmarks.baselines.ppo_mixture import MixturePolicy  # noqa: E402
from nfpo_continuous_action import Agent, Args, FlowPolicy, compile_functions, make_envs  # noqa: E402

POLICIES = {"nfpo": FlowPolicy, "ppo": GaussianPolicy, "ppo_mixture": MixturePolicy}
BASELINE = "ppo"  # what ratios are taken to


@dataclasses.dataclass
class CostArgs:
    env_ids: tuple[str, ...] = ("Humanoid-v4", "HalfCheetah-v4", "g1")
    """whose sizes are taken: Gymnasium environments, and g1, the paper's robot, of which there are only sizes here"""
    runtimes: tuple[Literal["eager", "compiled", "onnx"], ...] = ("eager", "compiled", "onnx")
    """how networks are run: PyTorch, compiled as the script does it, ONNX Runtime (decisions only)"""
    rounds: int = 100
    """rounds of decisions; one more comes first and is thrown away"""
    calls: int = 21
    """decisions of each contender in a round"""
    period: float = 0.02
    """seconds between two decisions of the rows that imitate a control loop, 50 Hz"""
    paced_rounds: int = 5
    """rounds of those"""
    paced_calls: int = 100
    """decisions of each contender in such a round"""
    train_rounds: int = 20
    """rounds of the training row, one batch each"""
    batch: int = 4096
    """size of a training batch; the default is the paper's number of environments on g1 (Table S1)"""
    csv: Path = ROOT / "benchmarks" / "results" / "cost.csv"
    """file to write"""


class Task(NamedTuple):
    """The sizes a policy is made for."""

    env_id: str
    obs_dim: int
    low: np.ndarray  # (action_dim,)
    high: np.ndarray  # (action_dim,)

    @property
    def action_dim(self) -> int:
        return len(self.low)


def make_task(env_id: str) -> Task:
    """A Gymnasium environment's sizes, or those of Unitree RL Gym's g1: 47 observations, 12 actions."""
    if env_id == "g1":
        return Task(env_id, 47, -np.ones(12), np.ones(12))
    envs = make_envs(Args(env_id=env_id), 1, seed=1)
    return Task(env_id, envs.obs.shape[1], envs.low, envs.high)


def agents(task: Task) -> dict[str, Agent]:
    """Each contender with policy and critic, fresh; what a robot runs of it is the agent's `forward`."""
    torch.manual_seed(1)
    sizes = {"obs": torch.zeros(1, task.obs_dim), "low": task.low, "high": task.high}
    envs = SimpleNamespace(policy_obs=slice(None), critic_obs=slice(None), **sizes)
    return {name: Agent(Args(), kind, envs).eval() for name, kind in POLICIES.items()}


def num_parameters(module: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def num_bytes(module: nn.Module) -> int:
    """Memory of parameters and buffers."""
    return sum(tensor.nbytes for tensor in itertools.chain(module.parameters(), module.buffers()))


def num_flops(function: Callable, obs_dim: int) -> int:
    """Floating-point operations of one decision's matrix products, 2 for each multiply-add, as PyTorch counts them.

    It counts what eager PyTorch runs. Biases, tanh, exp and other elementwise operations are not counted.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(torch.zeros(1, obs_dim))
    return counter.get_total_flops()


def counts(agent: Agent, obs_dim: int) -> dict[str, tuple[int, int]]:
    """{what: (of a deployed policy with its observation statistics and limits, of the critic alone)}."""
    deployed = num_bytes(agent.policy) + agent.low.nbytes + agent.high.nbytes
    deployed += agent.obs_stats.mean.nbytes + agent.obs_stats.var.nbytes
    return {
        "parameters": (num_parameters(agent.policy), num_parameters(agent.critic)),
        "bytes": (deployed, num_bytes(agent.critic)),
        "flops": (num_flops(agent, obs_dim), num_flops(agent.critic, obs_dim)),
    }


def compiled(agent: Agent, function: Callable, gradient: Callable, obs: torch.Tensor) -> tuple[Callable, Callable]:
    """`function` (observations to observations and actions) and `gradient` (of these) compiled as the script does it,
    both for batches like `obs`. Raises RuntimeError where no compiler works: eager mode under its name is no result."""
    args = SimpleNamespace(num_envs=len(obs), num_steps=1, num_minibatches=1)  # a minibatch is as large as `obs`
    with torch.no_grad():
        function(obs)  # what fails here is not the compiler
    both = compile_functions(agent, args, obs, function, lambda obs, actions, *others: gradient(obs, actions))
    if both[0] is function:
        raise RuntimeError("PyTorch's compiler does not work here; --runtimes eager onnx leaves it out")
    others = torch.zeros(4, len(obs)).unbind()
    return both[0], lambda obs, actions: both[1](obs, actions, *others)


def decision(agent: Agent, module: nn.Module, runtime: str, obs_dim: int, folder: str) -> Callable[[], np.ndarray]:
    """A function that takes one decision with `module`, the agent or its critic: an observation (1, obs_dim), raw for
    the agent, to an action (1, action_dim), float32."""
    obs = np.random.default_rng(1).standard_normal((8, obs_dim)).astype(np.float32)
    one = obs[:1]
    if runtime == "onnx":
        path, module = str(Path(folder, "policy.onnx")), copy.deepcopy(module).float()
        shapes = ({0: torch.export.Dim("batch")},)
        with contextlib.redirect_stdout(io.StringIO()):  # as `evaluate` exports it, but it says where nobody will look
            program = torch.onnx.export(
                module,
                (torch.from_numpy(obs),),
                input_names=["obs"],
                dynamic_shapes=shapes,
                opset_version=18,
                dynamo=True,
            )
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"obs": one})[0]

    def act(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return obs.clone(), module(obs)

    if runtime == "compiled":
        act, _ = compiled(agent, act, lambda obs, actions: (actions.sum(),), torch.from_numpy(one))

    def decide() -> np.ndarray:
        with torch.no_grad():
            return act(torch.from_numpy(one))[1].numpy()

    return decide


def train_step(agent: Agent, runtime: str, obs: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that samples actions for `obs` (B, obs_dim), normalized ones, and takes the gradient of their mean
    log-probability."""
    policy = agent.policy

    def sample(obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return obs.clone(), *policy.sample(obs)

    def gradient(obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, ...]:
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        return torch.autograd.grad(policy.log_prob(obs, action).mean(), trained)

    # Two functions, as in training: in one, the compiler would share the features of `obs` between the two.
    if runtime == "compiled":
        sample, gradient = compiled(agent, sample, gradient, obs)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            action = sample(obs)[1]
        return gradient(obs, action)

    return step


def in_turn(
    functions: dict[Hashable, Callable], rounds: int, calls: int = 1, period: float = 0.0
) -> dict[Hashable, np.ndarray]:
    """Microseconds of every call of each function, (rounds, calls), each call `period` seconds after the one before.

    A first round, which may compile, is left out.
    """
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            taken = []
            for _ in range(calls):
                if period:
                    time.sleep(period)
                start = time.perf_counter()
                function()
                taken.append(1e6 * (time.perf_counter() - start))
            times[name].append(taken)
    return {name: np.array(values[1:]) for name, values in times.items()}


def a_round(times: dict[Hashable, np.ndarray], share: float = 0.5) -> dict[Hashable, list[float]]:
    """One number a round: this quantile of its calls. The median hides a call that another process interrupted."""
    return {name: np.quantile(values, share, axis=1).tolist() for name, values in times.items()}


def measure(task: Task, args: CostArgs) -> dict[tuple[str, str], list[float]]:
    """{(what is measured, contender): its values, one for each round}; what needs no rounds has one value."""
    contenders, obs, found = agents(task), torch.randn(args.batch, task.obs_dim), {}
    modules = {name: (agent, agent) for name, agent in contenders.items()}
    modules["critic"] = contenders[BASELINE], contenders[BASELINE].critic
    for name, agent in contenders.items():
        for what, (of_policy, of_critic) in counts(agent, task.obs_dim).items():
            found[what, name], found[what, "critic"] = [of_policy], [of_critic]
    with tempfile.TemporaryDirectory() as folder:
        decisions = {
            (runtime, name): decision(agent, module, runtime, task.obs_dim, folder)
            for runtime in args.runtimes
            for name, (agent, module) in modules.items()
        }
    steps = {
        (f"training, {runtime} (µs)", name): train_step(agent, runtime, obs)
        for runtime in args.runtimes
        for name, agent in contenders.items()
        if runtime != "onnx"
    }
    for (runtime, name), values in a_round(in_turn(decisions, args.rounds, args.calls)).items():
        found[f"decision, {runtime} (µs)", name] = values
    found |= a_round(in_turn(steps, args.train_rounds))
    # What a control loop sees: between two decisions others have had the caches.
    deployed = {key: function for key, function in decisions.items() if key[0] != "eager"}
    paced = in_turn(deployed, args.paced_rounds, args.paced_calls, args.period)
    for title, share in (("median", 0.5), ("99th percentile", 0.99)):
        for (runtime, name), values in a_round(paced, share).items():
            found[f"decision every {1e3 * args.period:g} ms, {runtime}, {title} (µs)", name] = values
    return found


def summarize(found: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], tuple[float, float]]:
    """{(what, contender): (median, median ratio to the Gaussian of the same round)}, rounded as the file holds them."""
    summary = {}
    for (what, name), values in found.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(values, found[what, BASELINE]))
        summary[what, name] = round(statistics.median(values), 1), round(ratio, 3)
    return summary


def markdown(task: Task, summary: dict[tuple[str, str], tuple[float, float]]) -> str:
    """The table of one task: a row for each quantity, a column for each contender."""
    whats, names = (list(dict.fromkeys(key[i] for key in summary)) for i in (0, 1))
    title = f"{task.env_id}: {task.obs_dim} observations, {task.action_dim} actions"
    lines = [f"| {title} | " + " | ".join(names) + " |", "|-" * (len(names) + 1) + "|"]
    for what in whats:
        cells = []
        for name in names:
            value, ratio = summary.get((what, name), (None, None))
            cells.append("" if value is None else f"{value:,.0f} ({ratio:.2f} x)")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = tyro.cli(CostArgs, description=__doc__.split("\n")[0])
    torch.set_num_threads(1)
    rows = []
    for env_id in args.env_ids:
        task = make_task(env_id)
        summary = summarize(measure(task, args))
        print(markdown(task, summary), end="\n\n", flush=True)
        sizes = env_id, task.obs_dim, task.action_dim
        rows += [(*sizes, name, what, *numbers) for (what, name), numbers in summary.items()]
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("env_id", "obs_dim", "action_dim", "contender", "what", "value", f"relative_to_{BASELINE}"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
