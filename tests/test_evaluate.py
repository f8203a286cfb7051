"""Promise: evaluation plays the trained policy with frozen statistics, repeatably, and ONNX holds the same policy."""

import random

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import noisy_obs

import nfpo_continuous_action as nfpo


def play(run_dir, **options) -> list[float]:
    return nfpo.evaluate(run_dir, **{"eval_episodes": 3, **options})


def test_seed_decides(hopper_run):
    """The same seed gives the same returns whatever ran before, another seed others."""
    for temperature in (0.0, 1.0):
        torch.manual_seed(0)
        first = play(hopper_run, seed=3, temperature=temperature)
        torch.manual_seed(1)
        torch.rand(10)
        assert play(hopper_run, seed=3, temperature=temperature) == first
        assert play(hopper_run, seed=4, temperature=temperature) != first
        assert len(set(first)) == 3  # one seed does not replay one episode


def test_leaves_the_world_alone(hopper_run):
    """Neither the checkpoint nor the caller's random numbers change."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    content = (hopper_run / "checkpoint.pt").read_bytes()
    play(hopper_run, temperature=1.0)
    assert (hopper_run / "checkpoint.pt").read_bytes() == content
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_statistics_are_frozen(hopper_run, monkeypatch):
    """No observation of an evaluation enters the statistics."""

    def update(self, batch):
        raise AssertionError("statistics were updated")

    monkeypatch.setattr(nfpo.RunningMeanStd, "update", update)
    play(hopper_run)


def reference_actions(run_dir, obs: np.ndarray, policy: torch.nn.Module) -> np.ndarray:
    """The deterministic policy written once more: normalize in numpy, sample at temperature 0, clip to the Box."""
    checkpoint = nfpo.load_checkpoint(run_dir)
    stats = {name: x.numpy() for name, x in checkpoint["processes"][0]["collector"]["obs_stats"].items()}
    policy.load_state_dict(checkpoint["policy"])
    variance = stats["sum_squares"] / stats["count"]
    normalized = np.clip((obs - stats["mean"]) / np.sqrt(variance + 1e-8), -10, 10).astype(np.float32)
    with torch.no_grad():
        action = policy.sample(torch.from_numpy(normalized), temperature=0.0)[0].numpy()
    space = gym.make(checkpoint["args"]["env_id"]).action_space
    return np.clip(action, space.low, space.high)


def test_temperature(hopper_run, monkeypatch):
    """Temperature 0 plays the mode: one action for one observation; temperature 1 plays the density it trained."""
    played = []
    real = nfpo.ResumableEnv.step

    def step(env, action):
        played.append(action.copy())
        return real(env, action)

    monkeypatch.setattr(nfpo.ResumableEnv, "step", step)
    obs = gym.make("Hopper-v4").reset(seed=5)[0]
    (mode,) = reference_actions(hopper_run, obs[None], nfpo.FlowPolicy(11, 3))
    first = {}
    for temperature in (0.0, 0.5, 1.0):
        played.clear()
        play(hopper_run, seed=5, temperature=temperature, eval_episodes=1)
        first[temperature] = played[0]
    assert np.allclose(first[0.0], mode, atol=1e-6)
    assert not np.allclose(first[0.5], mode, atol=1e-2) and not np.allclose(first[1.0], first[0.5], atol=1e-3)


def test_command_line(cli, hopper_run):
    """--evaluate prints mean and deviation of the returns, and the same seed prints the same."""
    ended = cli("--evaluate", hopper_run, "--eval-episodes", 3, "--temperature", 1, "--seed", 2)
    returns = play(hopper_run, seed=2, temperature=1.0)
    assert ended.status == 0 and f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}" in ended.out
    again = cli("--evaluate", hopper_run / "checkpoint.pt", "--eval-episodes", 3, "--temperature", 1, "--seed", 2)
    assert again.out == ended.out


@pytest.mark.parametrize(
    "env_id, kind, flags",
    [
        ("Hopper-v4", "flow", {}),
        ("InvertedPendulum-v4", "flow", {}),
        ("Pendulum-v1", "flow", {"num_flow_layers": 3, "learned_base_std": True}),
        ("Swimmer-v5", "flow", {"num_flow_layers": 3, "hidden_layers": 2, "scale_fn": "asymmetric"}),
        ("Hopper-v4", "gaussian", {"exp_name": "ppo_continuous_action"}),
    ],
)
def test_onnx_equals_the_policy(env_id, kind, flags, train_small, gaussian, tmp_path):
    """The exported file maps raw observations to clipped actions as the PyTorch policy does, at any batch size."""
    policy_class = gaussian if kind == "gaussian" else nfpo.FlowPolicy
    run_dir = train_small(env_id, policy_class, learning_rate=0.03, **flags)
    path = tmp_path / "policy.onnx"
    nfpo.evaluate(run_dir, policy_class, eval_episodes=1, export_onnx=str(path))

    env = gym.make(env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    policy = nfpo.make_policy(policy_class, obs_dim, action_dim, nfpo.Args(**flags))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 7, 256):
        obs = noisy_obs(run_dir, batch)
        (actions,) = session.run(None, {session.get_inputs()[0].name: obs})
        assert actions.dtype == np.float32 and actions.shape == (batch, action_dim)
        expected = reference_actions(run_dir, obs, policy)
        assert np.abs(actions - expected).max() <= 1e-5
    assert expected.std(0).min() > 1e-3, "a constant policy shows nothing"

    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not {name for name in operators if "Random" in name or name in ("Bernoulli", "Multinomial", "Dropout")}


def test_wrong_export_is_refused(cli, hopper_run, monkeypatch, tmp_path):
    """An exported file that differs from the policy is an error in one line, after the returns, and is deleted."""
    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *args: [real(*args)[0] + 1e-3])
    ended = cli("--evaluate", hopper_run, "--eval-episodes", 1, "--export-onnx", "policy.onnx")
    assert ended.status == 1 and ended.err.startswith("error: policy.onnx differs") and ended.err.count("\n") == 1
    assert "1 episodes of Hopper-v4 at temperature 0: return" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_large_actions_are_exported(tmp_path):
    """Where the Box is wide, actions may be far above 1, where float32 rounds to more than 1e-5."""
    torch.manual_seed(1)
    policy = nfpo.FlowPolicy(4, 2)
    for layer in policy.layers:
        layer.out.weight.data *= 100
        layer.out.bias.data[1:] = -300.0  # scale, shift
    deployed = nfpo.DeployedPolicy(policy, nfpo.RunningMeanStd((4,)), np.full(2, -np.inf), np.full(2, np.inf)).eval()
    obs = torch.randn(64, 4)
    assert 0 < nfpo.to_onnx(deployed, str(tmp_path / "policy.onnx"), obs.numpy()) < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"obs": obs.numpy()})[0] - deployed(obs).detach().numpy()).max() > 1e-5
