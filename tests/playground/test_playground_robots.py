"""The paper's robots load and train, with what is special about them."""

import math

import jax
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import small_args


@pytest.mark.parametrize(
    "env_id, domain_randomization, sizes",
    [("Go1JoystickFlatTerrain", True, (48, 123, 12)), ("G1JoystickRoughTerrain", False, (103, 216, 29))],
)
def test_two_iterations(env_id, domain_randomization, sizes, menagerie, tmp_path):
    """The real task takes two iterations: the policy sees `state`, the critic `privileged_state`."""
    args = small_args(
        env_id=env_id,
        num_steps=4,
        total_timesteps=32,
        domain_randomization=domain_randomization,
        runs_dir=str(tmp_path),
    )
    metrics = nfpo.train(args)
    assert metrics["global_step"] == 32 and math.isfinite(metrics["losses/value_loss"])
    meta = nfpo.load_checkpoint(metrics["run_dir"])
    assert meta["iteration"] == 2 and meta["args"]["domain_randomization"] == domain_randomization
    envs = nfpo.make_envs(args)
    learner = nfpo.make_learner(args, nfpo.FlowPolicy, envs)
    template, _ = nfpo.describe_state(learner, nfpo.make_mesh(args))
    state_dim, privileged_dim, action_dim = sizes
    assert learner.policy.obs_dim == state_dim and learner.policy.action_dim == action_dim
    assert template.params["critic"]["Dense_0"]["kernel"].shape == (privileged_dim, 8)
    if domain_randomization:  # every environment has a model of its own
        model = envs.env.env.env._mjx_model_v
        frictions = jax.device_get(model.geom_friction)
        assert len({x.tobytes() for x in frictions}) == args.num_envs
