"""Promise: the ONNX file acts as the policy does, robots' runtimes read it, and it says what a robot has to know."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from brax.training.acme import running_statistics

import nfpo_playground_jax as nfpo

TASK = SimpleNamespace(dt=0.02, _config={})
ENVS = SimpleNamespace(unwrapped=TASK, action_repeat=1)


def trained_agent(policy):
    """Networks far from their initialization with statistics far from 0 and 1, of a state and a privileged one."""
    obs, action = jnp.zeros((1, policy.obs_dim)), jnp.zeros((1, policy.action_dim))
    variables = jax.jit(lambda key: policy.init(key, obs, action, method="log_prob"))(jax.random.PRNGKey(0))
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * generator.standard_normal(x.shape).astype(np.float32), variables)
    stats = running_statistics.init_state({"state": obs[0], "privileged_state": obs[0]})
    stats = stats.replace(
        mean={"state": jnp.arange(4.0) * 10, "privileged_state": None}, std={"state": jnp.arange(1.0, 5.0)}
    )
    others = dict.fromkeys(("return_stats", "opt_state", "learning_rate", "env_state", "iteration", "key", "critic"))
    return nfpo.Agent(params={"policy": params["params"]}, obs_stats=stats, policy=policy, **others)


@pytest.mark.parametrize(
    "action_dim, flags",
    [
        (1, {}),
        (3, {"scale_fn": "clip", "num_layers": 3}),
        (6, {"hidden_layers": 2, "learned_base_std": True, "base_std": 0.3}),
        (5, {"scale_fn": "asymmetric"}),
    ],
)
def test_exported_policy_is_the_policy(action_dim, flags, tmp_path):
    """The file gives the deterministic actions of raw observations, in batches of any size, in float32 only, in the
    versions that onnxruntime 1.16 reads."""
    agent, path = trained_agent(nfpo.FlowPolicy(4, action_dim, hidden_dim=16, **flags)), tmp_path / "a.onnx"
    obs = np.random.default_rng(0).normal(15, 15, (200, 4)).astype(np.float32)
    expected = np.asarray(jax.jit(lambda obs: agent.act({"state": obs}, None, 0.0)[-1])(obs))
    assert np.abs(expected).max() == 1 and len(np.unique(expected)) > 20, "clipped at the door, and not constant"
    nfpo.to_onnx(agent, str(path), obs[:9], "Lane", ENVS)
    session = onnxruntime.InferenceSession(path)
    for count in (1, 7, 200):
        found = session.run(["continuous_actions"], {"obs": obs[:count]})[0]
        np.testing.assert_allclose(found, expected[:count], rtol=0, atol=1e-4)
    model = onnx.load(path)
    assert [(x.domain, x.version) for x in model.opset_import if x.domain in ("", "ai.onnx")] == [("", 18)]
    assert all(x.domain in ("", "ai.onnx") for x in model.graph.node) and model.ir_version <= 9
    model = onnx.shape_inference.infer_shapes(model)
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    kinds = {x.type.tensor_type.elem_type for x in values} | {x.data_type for x in model.graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds and onnx.TensorProto.DOUBLE not in kinds
    assert [(x.name, x.type.tensor_type.elem_type) for x in (*model.graph.input, *model.graph.output)] == [
        ("obs", onnx.TensorProto.FLOAT),
        ("continuous_actions", onnx.TensorProto.FLOAT),
    ]


def test_a_file_that_acts_otherwise_is_not_written(tmp_path, monkeypatch):
    """It must not reach a robot."""
    agent, obs = trained_agent(nfpo.FlowPolicy(4, 3, hidden_dim=16)), np.ones((2, 4), np.float32)
    other = SimpleNamespace(run=lambda *_: [np.full((2, 3), 0.5, np.float32)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: other)
    with pytest.raises(AssertionError, match="Not equal"):
        nfpo.to_onnx(agent, str(tmp_path / "a.onnx"), obs, "Lane", ENVS)
    assert not list(tmp_path.iterdir())


def test_command_line(cli, lane_run):
    """--evaluate writes the file, with the task, the seconds between actions, and what actions are added to."""
    status, out, err = cli("--evaluate", lane_run, "--eval-episodes", 2, "--export-onnx", "a b.onnx")
    assert status == 0 and "Wrote a b.onnx" in out, err
    said = onnxruntime.InferenceSession("a b.onnx").get_modelmeta().custom_metadata_map
    assert said["env_id"] == "tests.playground.envs:Lane"
    assert json.loads(said["ctrl_dt"]) == 0.02 and json.loads(said["action_scale"]) == 0.5
    np.testing.assert_allclose(json.loads(said["default_pose"]), [0.1, 0.2, 0.3])
    status, _, err = cli("--evaluate", lane_run, "--export-onnx", "a.onnx", "--temperature", 0.3)
    assert status == 2 and "--temperature 0" in err, "the file holds no noise"
