"""Promise: what is exported is the policy, to 1e-6, and a robot needs nothing of ours to run it in time."""

import json
import subprocess
import sys

import numpy as np
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
for i in range(10_000):
    start = time.perf_counter()
    action = policy(inputs[i % len(inputs)].unsqueeze(0))
    seconds.append(time.perf_counter() - start)
    assert torch.is_tensor(action) and action.shape == (1, len(actions[0])) and action.dtype == torch.float32
    assert action[0].tolist() == actions[i % len(inputs)]
assert not [name for name in sys.modules if "nfpo" in name or "isaac" in name]
print(json.dumps({"actions": actions, "milliseconds": 1000 * sorted(seconds)[5_000]}))
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
    flags = {"hidden_dim": 64, "learned_base_std": True} if policy_class is nfpo.FlowPolicy else {"hidden_dim": 64}
    args = small_args(
        env_id="pointmass", runs_dir=str(folder), normalize_obs=normalize_obs, total_timesteps=960, **flags
    )
    run_dir = nfpo.train(args, policy_class)["run_dir"]
    names = "--export-jit policy.pt --export-onnx policy.onnx"
    ended = run(script, f"--evaluate {run_dir} --eval-episodes 0 {names}", cwd=folder, simulator=False)
    assert ended.status == 0, ended
    state = nfpo.load_checkpoint(run_dir)
    policy = nfpo.make_policy(policy_class, 6, 2, args)
    policy.load_state_dict(state["policy"])
    stats = nfpo.RunningMeanStd(6, torch.device("cpu"))
    stats.load_state_dict(state["processes"][0]["collector"]["stats"][0])

    @torch.no_grad()
    def expected(obs):
        if normalize_obs:
            obs = ((obs.double() - stats.mean) / stats.std).clamp(-10, 10).float()
        return policy.sample(obs, temperature=0.0)[0]

    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    torch.save(inputs, folder / "inputs.pt")
    return folder, inputs, expected(inputs)


def test_jit_on_a_robot(exported):
    """Loaded by a process that knows nothing of ours, run 10,000 times: the same actions, in under a millisecond."""
    folder, _, expected = exported
    (folder / "robot.py").write_text(ROBOT)
    out = subprocess.check_output([sys.executable, "robot.py"], cwd=str(folder), env=environment(simulator=False))
    found = json.loads(out)
    np.testing.assert_allclose(found["actions"], expected, atol=1e-6)
    print(f"{found['milliseconds']:.3f} ms")
    assert found["milliseconds"] < 1.0


def test_onnx(exported):
    """The same actions, one at a time and as a batch."""
    folder, inputs, expected = exported
    session = onnxruntime.InferenceSession(str(folder / "policy.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"obs": inputs.numpy()})[0], expected, atol=1e-6)
    np.testing.assert_allclose(session.run(None, {"obs": inputs[:1].numpy()})[0], expected[:1], atol=1e-6)


def test_actions_are_not_clipped(tmp_path):
    """Unitree's deploy scripts scale the action themselves: what leaves the policy is what the environment gets."""
    policy = nfpo.FlowPolicy(4, 2)
    for layer in policy.layers:
        layer.out.bias.data[:] = -300.0
    nfpo.to_jit(nfpo.DeployedPolicy(policy, 4, None).eval(), str(tmp_path / "policy.pt"))
    assert torch.jit.load(str(tmp_path / "policy.pt"))(torch.zeros(1, 4)).abs().max() > 100


def test_a_wrong_export_is_refused(tmp_path):
    """A file that is not the policy does not stay."""
    policy = nfpo.FlowPolicy(4, 2)
    deployed, temporary = nfpo.DeployedPolicy(policy, 4, None), tmp_path / "a.tmp"
    temporary.write_text("")
    with pytest.raises(RuntimeError, match="1e-6"):
        nfpo.finish_export(
            deployed, lambda obs: deployed(obs) + 1e-5, torch.randn(3, 4), str(temporary), str(tmp_path / "a")
        )
    assert list(tmp_path.iterdir()) == []


def test_large_actions_are_exported(tmp_path):
    """A trained policy's actions may be far above 1, where float32 rounds to more than 1e-6."""
    torch.manual_seed(1)
    policy = nfpo.FlowPolicy(4, 2)
    for layer in policy.layers:
        layer.out.weight.data *= 100
        layer.out.bias.data[1:] = -20.0  # scale, shift
    deployed = nfpo.DeployedPolicy(policy, 4, None).eval()
    obs = deployed.typical_obs(256)
    assert deployed(obs).abs().max() > 20
    assert 1e-8 < nfpo.to_onnx(deployed, str(tmp_path / "policy.onnx")) <= 1e-6
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"obs": obs.numpy()})[0] - deployed(obs).detach().numpy()).max() > 1e-6


def test_evaluate_temperature_and_seed(tmp_path):
    """The deterministic policy repeats itself with its seed, noise changes it, and every episode counts once."""
    run_dir = nfpo.train(small_args(env_id="pointmass", runs_dir=str(tmp_path), total_timesteps=4800))["run_dir"]
    play = lambda **flags: nfpo.evaluate(run_dir, eval_episodes=5, device="cpu", **flags)  # noqa: E731
    assert play() == play() != play(seed=2)
    assert play(temperature=1.0) != play()
    assert len(play()) == 5
    noisy, quiet = play(), play(randomize=False)
    assert noisy != quiet
