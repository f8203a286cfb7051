"""Promise: the paper's robots load and train, with what is special about them."""

import math

import jax
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import small_args


@pytest.mark.parametrize("env_id, sizes", [("Go1JoystickFlatTerrain", (48, 123, 12))])
def test_a_robot_trains(env_id, sizes, menagerie, tmp_path):
    """The real task takes an iteration on randomized models: the policy sees `state`, the critic `privileged_state`."""
    args = small_args(env_id=env_id, num_steps=4, total_timesteps=16, domain_randomization=True, runs_dir=str(tmp_path))
    metrics = nfpo.train(args)
    assert metrics["global_step"] == 16 and math.isfinite(metrics["losses/value_loss"])
    envs = nfpo.make_envs(args)
    agent = jax.eval_shape(lambda: nfpo.make_agent(args, nfpo.FlowPolicy, envs))
    state_dim, privileged_dim, action_dim = sizes
    assert (agent.policy.obs_dim, agent.policy.action_dim) == (state_dim, action_dim)
    assert agent.params["critic"]["Dense_0"]["kernel"].shape == (privileged_dim, 8)
    frictions = jax.device_get(envs.env.env._mjx_model_v.geom_friction)  # every environment has a model of its own
    assert len({x.tobytes() for x in frictions}) == args.num_envs
