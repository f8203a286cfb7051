"""Promise: what is exported is the policy, to 1e-5, and a robot needs nothing of ours to run it in time."""

import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import nfpo_isaacgym as nfpo
from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

from .conftest import SCRIPT, TWIN, environment, run, small_args

# A robot's side of it: this process may import PyTorch and nothing of this repository.
ROBOT = """
import json, sys, time
import torch
torch.set_num_threads(1)
policy = torch.jit.load("policy.pt")
inputs = torch.load("inputs.pt", weights_only=True)
actions = [policy(obs.unsqueeze(0)).detach().numpy().squeeze(0).tolist() for obs in inputs]
seconds = []
for i in range(1_000):
    start = time.perf_counter()
    action = policy(inputs[i % len(inputs)].unsqueeze(0))
    seconds.append(time.perf_counter() - start)
    assert torch.is_tensor(action) and action.shape == (1, len(actions[0])) and action.dtype == torch.float32
    assert action[0].tolist() == actions[i % len(inputs)]
assert not [name for name in sys.modules if "nfpo" in name or "isaac" in name]
print(json.dumps({"actions": actions, "milliseconds": 1000 * sorted(seconds)[500]}))
"""


@pytest.fixture(
    scope="module",
    params=[(nfpo.FlowPolicy, SCRIPT, True), (nfpo.FlowPolicy, SCRIPT, False), (GaussianPolicy, TWIN, True)],
    ids=["flow, normalized", "flow", "twin"],
)
def exported(request, tmp_path_factory):
    """A folder with a run, its exports, made where no simulator is, and the policy that they should be."""
    policy_class, script, normalize_obs = request.param
    folder = tmp_path_factory.mktemp("export")
    args = small_args(env_id="pointmass", runs_dir=str(folder), normalize_obs=normalize_obs, learned_base_std=True)
    args.total_timesteps = 960
    run_dir = nfpo.train(args, policy_class)["run_dir"]
    names = "--export-jit policy.pt --export-onnx policy.onnx"
    ended = run(script, f"--evaluate {run_dir} --eval-episodes 0 {names}", cwd=folder, simulator=False)
    assert ended.status == 0 and "Wrote policy.pt" in ended.out and "Wrote policy.onnx" in ended.out, ended
    assert "Warning" not in ended.err, ended.err
    agent = nfpo.Agent(args, policy_class, 6, 0, 2)
    nfpo.load_checkpoint(run_dir, agent)

    @torch.no_grad()
    def expected(obs):
        if normalize_obs:  # in float64, as the statistics are
            stats = agent.obs_stats
            obs = ((obs.double() - stats.mean) / (stats.var + 1e-8).sqrt()).clamp(-10, 10).float()
        return agent.policy.sample(obs, temperature=0.0)[0]

    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    torch.save(inputs, folder / "inputs.pt")
    return folder, inputs, expected(inputs)


def test_jit_on_a_robot(exported):
    """Loaded by a process that knows nothing of ours, run 1,000 times: the same actions, in under a millisecond."""
    folder, _, expected = exported
    (folder / "robot.py").write_text(ROBOT)
    out = subprocess.check_output([sys.executable, "robot.py"], cwd=str(folder), env=environment(simulator=False))
    found = json.loads(out)
    np.testing.assert_allclose(found["actions"], expected, atol=1e-5)
    assert found["milliseconds"] < 1.0


def test_onnx_on_a_robot(exported):
    """The same actions, one at a time and as a batch, in the oldest runtime that robots have, from float32 alone."""
    assert onnxruntime.__version__.startswith("1.16.")
    folder, inputs, expected = exported
    model = onnx.load(str(folder / "policy.onnx"))
    assert model.ir_version <= 9 and max(x.version for x in model.opset_import) <= 18
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    assert onnx.TensorProto.DOUBLE not in {tensor.data_type for tensor in tensors}
    casts = [a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute]
    assert onnx.TensorProto.DOUBLE not in casts
    session = onnxruntime.InferenceSession(str(folder / "policy.onnx"), providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("obs", "tensor(float)", ["batch", 6])
    assert (made.name, made.type, made.shape) == ("continuous_actions", "tensor(float)", ["batch", 2])
    np.testing.assert_allclose(session.run(None, {"obs": inputs.numpy()})[0], expected, atol=1e-5)
    np.testing.assert_allclose(session.run(None, {"obs": inputs[:1].numpy()})[0], expected[:1], atol=1e-5)


def make_agent(**flags):
    torch.manual_seed(1)
    return nfpo.Agent(small_args(**flags), nfpo.FlowPolicy, 4, 3, 2).eval().requires_grad_(False)


def test_actions_are_neither_clipped_nor_scaled(tmp_path):
    """Unitree's deploy scripts scale the action themselves: what leaves the policy is what the environment gets. Of
    actions far above 1, where float32 rounds to more, a share of 1e-5 is allowed."""
    agent = make_agent()
    for layer in agent.policy.layers:
        layer.out.bias.data[:] = -3000.0
    nfpo.export(agent, str(tmp_path / "policy.pt"), str(tmp_path / "policy.onnx"))
    assert torch.jit.load(str(tmp_path / "policy.pt"))(torch.zeros(1, 4)).abs().max() > 1000


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_export_is_refused(wrong, tmp_path, monkeypatch):
    """A file that would not be the policy is not written, and the one of before stays."""
    right = torch.jit.trace

    class Wrong(torch.nn.Module):
        def __init__(self, agent):
            super().__init__()
            self.agent = agent

        def forward(self, obs):
            return self.agent(obs) + wrong

    monkeypatch.setattr(torch.jit, "trace", lambda agent, obs: right(Wrong(agent).eval(), obs, check_trace=False))
    (tmp_path / "policy.pt").write_text("before")
    with pytest.raises(FloatingPointError, match="policy.pt would act differently"):
        nfpo.export(make_agent(), str(tmp_path / "policy.pt"), None)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    monkeypatch.setattr(torch.jit, "trace", right)
    nfpo.export(make_agent(), str(tmp_path / "policy.pt"), None)
