"""Promise: the cost table counts what it says it counts, and every number in it is measured."""

import csv
import sys

import numpy as np
import pytest
import torch

from benchmarks import cost

HIDDEN = 64  # the width of every network here
RUNTIMES = ("eager", "compiled", "onnx")


def mlp(obs_dim: int, out_dim: int) -> int:
    """Weights of the Gaussian twin's network of two hidden layers."""
    return obs_dim * HIDDEN + HIDDEN * HIDDEN + HIDDEN * out_dim


def by_hand(obs_dim: int, action_dim: int) -> dict[str, tuple[int, int]]:
    """Weights in matrix products, and other parameters (biases, log standard deviations), of each contender."""
    # Four coupling layers keep each dimension twice and transform it twice, to a scale and a shift. The base has a
    # deviation per dimension.
    flow = 4 * obs_dim * HIDDEN + 2 * action_dim * HIDDEN + 2 * HIDDEN * 2 * action_dim
    return {
        "nfpo": (flow, 4 * HIDDEN + 2 * 2 * action_dim + action_dim),
        "ppo": (mlp(obs_dim, action_dim), 2 * HIDDEN + 2 * action_dim),
        # Five means and a weight for each component, and five log standard deviations for each dimension.
        "ppo_mixture": (mlp(obs_dim, 5 * action_dim + 5), 2 * HIDDEN + 5 * action_dim + 5 + 5 * action_dim),
        "critic": (mlp(obs_dim, 1), 2 * HIDDEN + 1),
    }


@pytest.mark.parametrize("obs_dim, action_dim", [(376, 17), (47, 12), (4, 1)])
def test_counts_are_those_by_hand(obs_dim, action_dim):
    """Parameters, memory and floating-point operations follow from the layers' sizes."""
    task = cost.Task("any", obs_dim, -np.ones(action_dim), np.ones(action_dim))
    agents, expected = cost.agents(task), by_hand(obs_dim, action_dim)
    found = {
        name: {what: both[0] for what, both in cost.counts(agent, obs_dim).items()} for name, agent in agents.items()
    }
    found["critic"] = {what: both[1] for what, both in cost.counts(agents["ppo"], obs_dim).items()}
    assert found.keys() == expected.keys()
    for name, (weights, others) in expected.items():
        # Beside float32 parameters: mean and variance of observations in float64, limits, the flow's int64 order.
        buffers = 0 if name == "critic" else 2 * 8 * obs_dim + 2 * 4 * action_dim + 8 * action_dim * (name == "nfpo")
        sizes = {"parameters": weights + others, "bytes": 4 * (weights + others) + buffers, "flops": 2 * weights}
        assert found[name] == sizes, name


def test_sizes_are_the_environments():
    """A Gymnasium environment's sizes and limits are its own, g1's the paper's."""
    humanoid, g1 = cost.make_task("Humanoid-v4"), cost.make_task("g1")
    assert (humanoid.obs_dim, humanoid.action_dim) == (376, 17)
    assert humanoid.low.tolist() == pytest.approx([-0.4] * 17) and humanoid.high.tolist() == pytest.approx([0.4] * 17)
    assert (g1.obs_dim, g1.action_dim) == (47, 12)


def test_contenders_take_turns(monkeypatch):
    """A B A B, a number for each round, the first thrown away; an interrupted call does not show in its round."""
    called, now = [], [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def contender(name, seconds):
        def call():
            called.append(name)
            slow = len(called) <= 6 or len(called) == 8  # the first round, and one call of the second
            now[0] += 100 if slow else seconds

        return call

    times = cost.in_turn({"a": contender("a", 2e-6), "b": contender("b", 3e-6)}, rounds=2, calls=3)
    assert "".join(called) == "aaabbb" * 3
    medians = cost.a_round(times)
    assert medians["a"] == pytest.approx([2, 2], rel=1e-3) and medians["b"] == pytest.approx([3, 3], rel=1e-3)
    assert cost.a_round(times, 1.0)["a"] == pytest.approx([1e8, 2], rel=1e-3)  # and a high quantile shows it


def test_paced_calls(monkeypatch):
    """The period passes before every call and is not counted as part of it."""
    now, slept = [0.0], []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    def call():
        now[0] += 5e-6

    monkeypatch.setattr(cost.time, "sleep", sleep)
    times = cost.in_turn({"a": call, "b": call}, rounds=1, calls=2, period=0.02)
    assert slept == [0.02] * 8
    assert times["a"].ravel() == pytest.approx([5, 5], rel=1e-3)


def test_ratios_are_taken_within_a_round():
    """The ratio is the median of the rounds' ratios, not the ratio of the medians."""
    found = {("x", "nfpo"): [2.0, 30.0, 400.0], ("x", "ppo"): [1.0, 20.0, 100.0]}
    assert cost.summarize(found) == {("x", "nfpo"): (30.0, 2.0), ("x", "ppo"): (20.0, 1.0)}


@pytest.fixture(scope="module")
def agent():
    """The flow's, with actions that reach the limits."""
    agent = cost.agents(cost.make_task("g1"))["nfpo"]
    with torch.no_grad():
        for layer in agent.policy.layers:
            layer.out.bias.uniform_(-2, 2)
    return agent


def test_every_runtime_decides_the_same(agent, tmp_path):
    """What is timed is the same decision in PyTorch, compiled or not, and in ONNX Runtime, within the limits."""
    eager, compiled, onnx = (cost.decision(agent, agent, runtime, 47, str(tmp_path))() for runtime in RUNTIMES)
    assert eager.dtype == np.float32 and eager.shape == (1, 12)
    assert np.abs(eager - onnx).max() < 1e-5 and np.abs(eager - compiled).max() < 1e-5
    assert np.abs(eager).max() == 1 and np.abs(eager).min() < 1


@pytest.mark.parametrize("runtime", ["eager", "compiled"])
def test_training_step_differentiates_the_samples_log_prob(agent, runtime):
    """The training row's gradient is that of the mean log-probability, every parameter's in turn."""
    policy, obs = agent.policy, torch.randn(16, 47)
    step = cost.train_step(agent, runtime, obs)
    torch.manual_seed(3)
    gradients = step()
    torch.manual_seed(3)
    with torch.no_grad():
        action, _ = policy.sample(obs)
    policy.zero_grad()
    policy.log_prob(obs, action).mean().backward()
    for gradient, (name, parameter) in zip(gradients, policy.named_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, msg=name)


def test_no_compiler(agent, monkeypatch):
    """Eager mode is not measured under the compiler's name."""
    monkeypatch.setattr(cost, "compile_functions", lambda agent, args, obs, *functions: functions)
    with pytest.raises(RuntimeError, match="--runtimes eager onnx"):
        cost.train_step(agent, "compiled", torch.randn(16, 47))


@pytest.mark.parametrize("tasks, runtimes", [(("g1", "HalfCheetah-v4"), ("eager",)), (("g1",), ("onnx",))])
def test_command_line(tasks, runtimes, tmp_path, monkeypatch, capsys):
    """Every contender gets every row, with positive numbers, in the file and in the table."""
    decision = cost.decision  # an export takes seconds, and another test compares the runtimes
    monkeypatch.setattr(cost, "decision", lambda agent, module, _, *others: decision(agent, module, "eager", *others))
    path = tmp_path / "cost.csv"
    flags = "--rounds 3 --calls 2 --train-rounds 2 --batch 64 --paced-rounds 1 --paced-calls 2".split()
    flags += ["--csv", str(path), "--runtimes"]
    monkeypatch.setattr(sys, "argv", ["cost.py", *flags, *runtimes, "--env-ids", *tasks])
    cost.main()
    table = capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    decisions = ["parameters", "bytes", "flops", *(f"decision, {runtime} (µs)" for runtime in runtimes)]
    paced = [runtime for runtime in runtimes if runtime != "eager"]
    for title in ("median", "99th percentile"):
        decisions += [f"decision every 20 ms, {runtime}, {title} (µs)" for runtime in paced]
    expected = {
        (task, *{"g1": ("47", "12"), "HalfCheetah-v4": ("17", "6")}[task], name, what)
        for task in tasks
        for name in ("nfpo", "ppo", "ppo_mixture", "critic")
        for what in [*decisions, *(["training, eager (µs)"] if name != "critic" and "eager" in runtimes else [])]
    }
    keys = [(row["env_id"], row["obs_dim"], row["action_dim"], row["contender"], row["what"]) for row in rows]
    assert set(keys) == expected and len(keys) == len(expected)
    for row in rows:
        value, ratio = float(row["value"]), float(row["relative_to_ppo"])
        assert value > 0 and ratio > 0 and (row["contender"] != "ppo" or ratio == 1)
        assert f"{value:,.0f} ({ratio:.2f} x)" in table
    assert table.count("\n| ") + 1 == len(tasks) * (1 + len(decisions) + ("eager" in runtimes))
