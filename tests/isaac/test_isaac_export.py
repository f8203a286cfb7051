"""Promise: what is exported is the policy, to 1e-5, and a robot needs nothing of ours to run it in time."""

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
    np.testing.assert_allclose(found["actions"], expected, atol=1e-5)
    print(f"{found['milliseconds']:.3f} ms")
    assert found["milliseconds"] < 1.0


def test_onnx(exported):
    """The same actions, one at a time and as a batch."""
    folder, inputs, expected = exported
    session = onnxruntime.InferenceSession(str(folder / "policy.onnx"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"obs": inputs.numpy()})[0], expected, atol=1e-5)
    np.testing.assert_allclose(session.run(None, {"obs": inputs[:1].numpy()})[0], expected[:1], atol=1e-5)


def test_actions_are_not_clipped(tmp_path):
    """Unitree's deploy scripts scale the action themselves: what leaves the policy is what the environment gets."""
    policy = nfpo.FlowPolicy(4, 2)
    for layer in policy.layers:
        layer.out.bias.data[:] = -300.0
    nfpo.export_policy(nfpo.DeployedPolicy(policy, 4, None).eval(), str(tmp_path / "policy.pt"), None)
    assert torch.jit.load(str(tmp_path / "policy.pt"))(torch.zeros(1, 4)).abs().max() > 100


def test_tolerance():
    """Rounding of some 1e-6, as trained policies were seen to have, is none of a wrong export's."""
    torch.manual_seed(1)
    deployed = nfpo.DeployedPolicy(nfpo.FlowPolicy(4, 2), 4, None)
    assert 2e-6 < nfpo.compare_export(deployed, lambda obs: deployed(obs) + 3e-6, "a") < 4e-6
    for wrong in (3e-5, float("nan")):
        with pytest.raises(nfpo.WrongExport, match="1e-5"):
            nfpo.compare_export(deployed, lambda obs: deployed(obs) + wrong, "a")  # noqa: B023


def test_a_wrong_export_is_refused(cli, tmp_path, monkeypatch):
    """A file that is not the policy ends the command with one line, and leaves neither itself nor the other one."""
    run_dir = nfpo.train(small_args(env_id="pointmass", runs_dir=str(tmp_path), total_timesteps=48))["run_dir"]
    to_onnx = nfpo.to_onnx

    def wrong(deployed, path):
        load = to_onnx(deployed, path)
        return lambda obs: load(obs) + 1e-3

    monkeypatch.setattr(nfpo, "to_onnx", wrong)
    status, _, err = cli(f"--evaluate {run_dir} --eval-episodes 0 --export-jit a.pt --export-onnx a.onnx")
    assert status == 1 and len(err.strip().splitlines()) == 1 and "a.onnx would differ" in err and "1e-5" in err, err
    assert [path.name for path in tmp_path.iterdir()] == [nfpo.Path(run_dir).name]


def test_large_actions_are_exported(tmp_path):
    """A trained policy's actions may be far above 1, where float32 rounds to more: they are compared as a share."""
    torch.manual_seed(1)
    policy = nfpo.FlowPolicy(4, 2)
    for layer in policy.layers:
        layer.out.weight.data *= 100
        layer.out.bias.data[1:] = -2000.0  # scale, shift
    deployed = nfpo.DeployedPolicy(policy, 4, None).eval()
    obs = deployed.typical_obs(256)
    assert deployed(obs).abs().max() > 2000
    nfpo.export_policy(deployed, None, str(tmp_path / "policy.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"obs": obs.numpy()})[0] - deployed(obs).detach().numpy()).max() > 1e-5


def test_evaluate_temperature_and_seed(tmp_path):
    """The deterministic policy repeats itself with its seed, noise changes it, and every episode counts once."""
    run_dir = nfpo.train(small_args(env_id="pointmass", runs_dir=str(tmp_path), total_timesteps=4800))["run_dir"]
    play = lambda **flags: nfpo.evaluate(run_dir, eval_episodes=5, device="cpu", **flags)  # noqa: E731
    assert play() == play() != play(seed=2)
    assert play(temperature=1.0) != play()
    assert len(play()) == 5
    noisy, quiet = play(), play(randomize=False)
    assert noisy != quiet


@pytest.mark.parametrize(
    "env_id, names",
    [("cartpole", ["rew_alive", "rew_upright", "max_command_x"]), ("isaacgymenvs:Cartpole", ["distance"])],
)
def test_evaluate_prints_the_terms(env_id, names, tmp_path, monkeypatch, capsys):
    """An evaluation says what the task itself measured, over the episodes that it played: here, what adds up to the
    return."""
    monkeypatch.setattr(nfpo, "check_isaacgymenvs", lambda *_: None)
    run_dir = nfpo.train(small_args(env_id=env_id, runs_dir=str(tmp_path), total_timesteps=48))["run_dir"]
    returns = nfpo.evaluate(run_dir, eval_episodes=1, device="cpu")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The task's own means: ")]
    found = dict(word.split() for word in line.partition(": ")[2].split(", "))
    assert set(names) <= set(found)
    if env_id == "cartpole":  # one episode: its terms, times the longest episode's seconds, are its return, ...
        total = 200 * 0.02 * (float(found["rew_alive"]) + float(found["rew_upright"]))
        assert total - 0.02 == pytest.approx(returns[0], abs=0.003)  # ... and the step that `reset` takes
