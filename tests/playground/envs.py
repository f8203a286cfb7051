"""Playground environments for the tests, without physics, so that they compile at once. Importing registers them.

Use as `tests.playground.envs:Lane`."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from ml_collections import config_dict
from mujoco_playground import dm_control_suite
from mujoco_playground._src import mjx_env


class TestEnv(mjx_env.MjxEnv):
    """An environment whose whole physics is an array."""

    __test__ = False  # not a test class
    xml_path, mj_model, mjx_model, _mjx_model = "", SimpleNamespace(ncam=0), None, None
    action_size = 1

    def __init__(self, config, config_overrides=None):
        super().__init__(config, config_overrides)

    def state(self, data, reward=0.0, done=0.0, info=None, **metrics):
        metrics = {name: jnp.asarray(x, None if isinstance(x, int) else jnp.float32) for name, x in metrics.items()}
        obs = self.observe(data, info)
        return mjx_env.State(data, obs, jnp.asarray(reward, jnp.float32), jnp.asarray(done, jnp.float32), metrics, info)


class Lane(TestEnv):
    """Run along a lane: a point in R^3, steered by its velocity, that every careless shortcut fails on.

    The reward is 4 + 2 * speed - 3 * distance to the lane, and only the time limit ends an episode.
    Progress is observed and time is not: whoever takes the time limit for a death learns that progress kills.
    Observations are 5 + position / 10: without their statistics a policy is blind.
    A randomized model is a factor on the speed.
    """

    action_size = 3
    _default_pose = jnp.array([0.1, 0.2, 0.3])

    def reset(self, rng):
        position = jnp.concatenate((jnp.zeros(1), jax.random.uniform(rng, (2,), minval=-1, maxval=1)))
        return self.state(position, info={}, speed=0.0)

    def step(self, state, action):
        speed = (1 + action[0]) / 2 * (1 if self._mjx_model is None else self._mjx_model)
        position = state.data + jnp.array([speed, action[1], action[2]])
        reward = 4 + 2 * speed - 3 * jnp.linalg.norm(position[1:])
        return self.state(position, reward, info=state.info, speed=speed)

    def observe(self, position, info):
        return 5 + 0.1 * position


class Diary(TestEnv):
    """Counts its steps in its observation, beside a number of its own for the episode, and dies at some of them.

    The observation is a dict, and what the critic sees is not what the policy sees.
    """

    def reset(self, rng):
        data = jnp.array([0.0, jax.random.uniform(rng)])
        return self.state(data, info={"rng": rng})

    def step(self, state, action):
        data = state.data + jnp.array([1.0, 0.0])
        rng, now = jax.random.split(state.info["rng"])
        done = jax.random.uniform(now) < 0.1
        return self.state(data, 1 + data[0], done, {**state.info, "rng": rng})

    def observe(self, data, info):
        return {"state": data, "privileged_state": jnp.concatenate((data, -data))}


class Forever(TestEnv):
    """Reward 1 in every step, and observations that tell nothing, not even the time."""

    def reset(self, rng):
        return self.state(jnp.zeros(1), info={"rng": rng})

    def step(self, state, action):
        return self.state(state.data, 1.0, info={**state.info, "rng": jax.random.split(state.info["rng"])[0]})

    def observe(self, data, info):
        return jax.random.normal(info["rng"], (2,))


class Breaks(Lane):
    """A lane whose simulation breaks a few steps after each start, and does not say so: its numbers become
    `config.damage`, and on one half of the lane the reward does not even show it.

    As the tasks of robots do, it keeps a running average that never recovers, a history that it observes, and a count
    of steps of its own, all in `info`; and one of its metrics is an integer.
    """

    def reset(self, rng):
        state = super().reset(rng)
        info = {"average": jnp.asarray(1.0), "history": jnp.ones(2), "_steps": jnp.asarray(0)}
        return self.state(state.data, info=info, speed=0.0, steps=0)

    def step(self, state, action):
        info = state.info
        state = super().step(state, action)
        broken = jnp.where(state.data[0] > 3, float(self._config.damage), 1.0)
        reward = jnp.where(state.data[1] > 0, broken, 1.0) * info["average"] * state.reward
        steps = info["_steps"] + 1
        info = {
            **info,
            "average": info["average"] * broken,
            "history": jnp.stack((broken, info["history"][0])),
            "_steps": jnp.where(steps >= self._config.episode_length, 0, steps),
        }
        return self.state(state.data * broken, reward, info=info, speed=broken, steps=1)

    def observe(self, position, info):
        return jnp.concatenate((super().observe(position, info), info.get("history", jnp.ones(2))))


class Images(Lane):
    """Has what the script cannot use."""

    def observe(self, position, info):
        return {"pixels/view_0": jnp.zeros((8, 8, 3))}


def config(episode_length):
    return lambda: config_dict.create(
        ctrl_dt=0.02,
        sim_dt=0.02,
        episode_length=episode_length,
        action_repeat=1,
        action_scale=0.5,
        impl="jax",
        damage="nan",
    )


for environment, episode_length in ((Lane, 20), (Diary, 12), (Forever, 10), (Breaks, 20), (Images, 10)):
    dm_control_suite.register_environment(environment.__name__, environment, config(episode_length))
