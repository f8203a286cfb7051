"""Environments for the tests, small enough to be learned in seconds. Use as `tests.envs:PointMass-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv


class PointMass(gym.Env):
    """Run along a lane: a point in R^3, steered by its velocity, that every careless shortcut fails on.

    The reward is 4 + 2 * speed - 3 * distance to the lane, and only the time limit ends an episode.
    Progress is observed and time is not: whoever takes the time limit for a death learns that progress kills.
    Observations are 5 + position / 10: without their statistics a policy is blind.
    The lane is narrow: a policy that cannot reduce its noise keeps stumbling off it.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1.0, 1.0, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = np.append(0.0, self.np_random.uniform(-1, 1, 2))
        return self.observe(), {}

    def step(self, action):
        speed = (1 + float(action[0])) / 2
        self.position += speed, *action[1:]
        reward = 4 + 2 * speed - 3 * float(np.linalg.norm(self.position[1:]))
        return self.observe(), reward, False, False, {}

    def observe(self):
        return (5 + 0.1 * self.position).astype(np.float32)


class CommandedHopper(HopperEnv):
    """Follows a command that is drawn at each reset, and that the simulator knows nothing of."""

    def reset_model(self):
        self.command = self.np_random.uniform(0, 2)
        return super().reset_model()

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, -abs(self.data.qvel[0] - self.command), *rest


gym.register("PointMass-v0", PointMass, max_episode_steps=20)
gym.register("CommandedHopper-v0", CommandedHopper, max_episode_steps=1000)
STACKED = gym.wrappers.FrameStackObservation.wrapper_spec(stack_size=2)
gym.register("WrappedHopper-v0", HopperEnv, max_episode_steps=1000, additional_wrappers=(STACKED,))
