"""Promise: the exported file is the deployed policy, and a robot's runtime can load it."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import noisy_obs
from test_evaluate import deterministic_actions

import nfpo_continuous_action as nfpo

RUNS = {  # the policy's flags
    "Pendulum-v1": {"num_flow_layers": 3},  # one action of +-2
    "Humanoid-v4": {"hidden_layers": 2, "scale_fn": "asymmetric"},  # 17 of +-0.4
}
PROGRAMS = []


@pytest.fixture(scope="module", params=RUNS)
def exported(request, train_small, tmp_path_factory):
    """A run and its exported file."""
    flags, export = RUNS[request.param], torch.onnx.export
    run_dir = train_small(request.param, learning_rate=0.03, **flags)
    file = tmp_path_factory.mktemp("onnx") / "policy.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.onnx, "export", lambda *args, **kwargs: (PROGRAMS.append(export(*args, **kwargs)), PROGRAMS[-1])[1]
        )
        nfpo.evaluate(run_dir, eval_episodes=1, export_onnx=str(file))
    env = gym.make(request.param)
    named = {"num_layers": flags.get("num_flow_layers", 4), **flags}
    named.pop("num_flow_layers", None)
    policy = nfpo.FlowPolicy(env.observation_space.shape[0], env.action_space.shape[0], **named)
    return request.param, run_dir, file, policy


def test_equals_the_policy(exported):
    """It maps raw observations to actions in the environment's units as the policy does, at any batch size."""
    env_id, run_dir, file, policy = exported
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 7, 256):
        obs = noisy_obs(run_dir, batch)
        (actions,) = session.run(["continuous_actions"], {"obs": obs})
        expected = deterministic_actions(run_dir, obs, env_id, policy)
        assert actions.dtype == np.float32 and actions.shape == expected.shape
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).min() > 1e-3, "a constant policy shows nothing"


def test_equals_what_reaches_the_environment(exported, monkeypatch):
    """Fed with the observations of an evaluation, it gives the actions that were played in it."""
    _, run_dir, file, _ = exported
    played, step = [], nfpo.Environments.step
    record = lambda envs, action: (played.append((envs.obs, action)), step(envs, action))[1]  # noqa: E731
    monkeypatch.setattr(nfpo.Environments, "step", record)
    nfpo.evaluate(run_dir, eval_episodes=1)
    obs, actions = (torch.cat(parts).float().numpy() for parts in zip(*played[1:]))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"obs": obs})[0], actions, rtol=1e-4, atol=1e-4)


def test_what_robots_can_load(exported):
    """float32 all through, one input and one output, opset and IR version of onnxruntime 1.16, nothing random."""
    env_id, _, file, _ = exported
    model = onnx.load(file)
    onnx.checker.check_model(model)
    assert model.ir_version <= 9
    assert {opset.domain: opset.version for opset in model.opset_import}[""] <= 18
    ends = [*model.graph.input, *model.graph.output]
    assert [end.name for end in ends] == ["obs", "continuous_actions"]
    numbers = [end.type.tensor_type.elem_type for end in ends]
    assert set(numbers) == {onnx.TensorProto.FLOAT}
    constants = {constant.data_type for constant in model.graph.initializer}
    assert constants <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}  # indexes and masks
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    assert onnx.TensorProto.DOUBLE not in {value.type.tensor_type.elem_type for value in inferred}
    operators = {node.op_type for node in model.graph.node}
    assert not {name for name in operators if "Random" in name or name in ("Bernoulli", "Multinomial", "Dropout")}
    assert {entry.key: entry.value for entry in model.metadata_props}["env_id"] == env_id


@pytest.fixture
def program(exported, monkeypatch):
    """The program of the last export, handed out in place of another ten seconds of exporting."""
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: PROGRAMS[-1])


def test_wrong_export_is_refused(cli, exported, program, monkeypatch):
    """A file that differs from the policy is not written, and the user gets one line."""
    real = torch.onnx.ONNXProgram.__call__
    monkeypatch.setattr(torch.onnx.ONNXProgram, "__call__", lambda *inputs: [real(*inputs)[0] + 1e-3])
    ended = cli("--evaluate", exported[1], "--eval-episodes", 1, "--export-onnx", "policy.onnx")
    assert ended.status == 2 and "not close" in ended.err.splitlines()[-1]
    assert list(cli.folder.iterdir()) == []


def test_a_folder_that_is_not_there(cli, exported, program):
    """One line that names the path."""
    ended = cli("--evaluate", exported[1], "--eval-episodes", 1, "--export-onnx", "nowhere/policy.onnx")
    assert ended.status == 2 and "nowhere" in ended.err.splitlines()[-1] and "Traceback" not in ended.err


@pytest.fixture(scope="module")
def old_runtime(tmp_path_factory) -> str:
    """A folder to import onnxruntime 1.16 from, which is from 2023 and needs an older NumPy."""
    folder = str(tmp_path_factory.mktemp("onnxruntime"))
    flags = "-q --no-deps --only-binary :all: --disable-pip-version-check --target".split()
    packages = "onnxruntime==1.16.3", "numpy==1.26.4"
    command = [sys.executable, "-m", "pip", "install", *flags, folder, *packages]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("onnxruntime 1.16 cannot be installed here")
    return folder


def test_onnxruntime_of_robots(exported, old_runtime):
    """onnxruntime 1.16, which robots carry, loads it and gives the same actions."""
    _, run_dir, file, _ = exported
    obs = noisy_obs(run_dir, 7)
    np.save(file.with_suffix(".obs.npy"), obs)
    code = """
import sys, numpy, onnxruntime
assert onnxruntime.__version__.startswith("1.16."), onnxruntime.__version__
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(["continuous_actions"], {"obs": numpy.load(sys.argv[2])})[0])
"""
    paths = [str(file.with_suffix(ending)) for ending in (".onnx", ".obs.npy", ".actions.npy")]
    variables = {**os.environ, "PYTHONPATH": old_runtime}
    ended = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, env=variables)
    assert ended.returncode == 0, ended.stderr
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(np.load(paths[2]), session.run(None, {"obs": obs})[0], rtol=1e-5, atol=1e-6)
