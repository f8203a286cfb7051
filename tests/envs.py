"""Environments for the tests, small enough to be learned in seconds. Use as `tests.envs:PointMass-v0`."""

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

Box = gym.spaces.Box


class PointMass(gym.Env):
    """Run along a lane: a point in R^3, steered by its velocity, that every careless shortcut fails on.

    The reward is 4 + 2 * speed - 3 * distance to the lane, and only the time limit ends an episode.
    Progress is observed and time is not: whoever takes the time limit for a death learns that progress kills.
    Observations are 5 + position / 10: without their statistics a policy is blind.
    The lane is narrow: a policy that cannot reduce its noise keeps stumbling off it.
    """

    observation_space = Box(-np.inf, np.inf, (3,))
    action_space = Box(-1.0, 1.0, (3,))

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


class Target(gym.Env):
    """Say the number that is observed, where the Box's lower bound means -1 and its upper +1. Reward: minus the squared
    error, at best 0. A policy that knows nothing loses a third per step, and more the wider it acts."""

    observation_space = Box(-9, 9, (1,))

    def __init__(self, low=-1.0, high=1.0, dtype="float32", strict=False, render_mode=None):
        self.action_space, self.strict, self.actions = Box(low, high, (1,), np.dtype(dtype)), strict, []
        self.render_mode = render_mode

    def observe(self):
        self.target = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.target

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.seed = seed
        return self.observe(), {}

    def step(self, action):
        assert not self.strict or self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.actions.append(action.copy())
        low, high = (float(bound[0]) for bound in (self.action_space.low, self.action_space.high))
        meant = 2 * (float(action[0]) - low) / (high - low) - 1 if np.isfinite(high - low) else float(action[0])
        error = meant - float(self.target[0])
        return self.observe(), -(error**2), False, False, {}


class Broken(Target):
    """The environment that was seeded with `culprit` gives one number that means nothing, at each `every`th step."""

    def __init__(self, what="reward", value=float("nan"), culprit=2, every=11, **kwargs):
        super().__init__(**kwargs)
        self.what, self.value, self.culprit, self.every, self.age = what, float(value), culprit, every, 0

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return np.full(1, self.value, np.float32) if self.what == "reset" and self.seed == self.culprit else obs, info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.age += 1
        if self.seed == self.culprit and self.age % self.every == 0:
            reward = self.value if self.what == "reward" else reward
            obs = np.full(1, self.value, np.float32) if self.what == "observation" else obs
        return obs, reward, *rest


class Reuse(gym.Env):
    """Counts its steps in one array, which every observation is. An episode's last observation is 10, its first 0."""

    action_space, observation_space = Box(-1, 1, (1,)), Box(0, 10, (1,))

    def __init__(self):
        self.buffer = np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        self.buffer[:] = 0
        return self.buffer, {}

    def step(self, action):
        self.buffer += 1
        return self.buffer, 1.0, False, False, {}


class Faulty(Target):
    """Does one thing that no environment may do."""

    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault
        if fault == "raises nothing":
            raise NotImplementedError

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs if self.fault == "old reset" else (obs, info)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.fault == "four values":
            return obs, reward, terminated, info
        reward = {"no reward": None, "two rewards": np.array([reward, reward]), "a word": "good"}.get(
            self.fault, reward
        )
        if self.fault == "two observations":
            obs = np.concatenate([obs, obs])
        return obs, reward, terminated, truncated, info


class Spaces(gym.Env):
    """Any observation and any action."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space, self.action_space = observation_space, action_space or Box(-1, 1, (2,))
        self.observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.observation_space.sample(), 0.0, False, False, {}


IMAGE, BOX = Box(0, 255, (8, 8, 3), np.uint8), Box(-1, 1, (3,))
for name, spaces in {
    "Image-v0": {"observation_space": IMAGE},
    "DictOfImages-v0": {"observation_space": gym.spaces.Dict(left=IMAGE, right=IMAGE)},
    "DiscreteObs-v0": {"observation_space": gym.spaces.Discrete(5)},
    "DictWithDiscrete-v0": {"observation_space": gym.spaces.Dict(a=BOX, b=gym.spaces.Discrete(5))},
    "DictOfBoxes-v0": {"observation_space": gym.spaces.Dict(a=BOX, b=gym.spaces.Tuple([BOX, BOX]))},
    "TupleOfBoxes-v0": {"observation_space": gym.spaces.Tuple([BOX, Box(-1, 1, (2, 2))])},
    "MatrixAction-v0": {"observation_space": BOX, "action_space": Box(-1, 1, (2, 3))},
    "IntegerAction-v0": {"observation_space": BOX, "action_space": Box(0, 4, (1,), np.int32)},
    "DictAction-v0": {"observation_space": BOX, "action_space": gym.spaces.Dict(a=BOX)},
}.items():
    gym.register(name, lambda spaces=spaces: Spaces(**spaces), max_episode_steps=3)

gym.register("PointMass-v0", PointMass, max_episode_steps=20)
gym.register("Target-v0", Target, max_episode_steps=10)
gym.register("Endless-v0", Target)
gym.register("Broken-v0", Broken, max_episode_steps=10)
gym.register("Reuse-v0", Reuse, max_episode_steps=10)
gym.register("Faulty-v0", Faulty, max_episode_steps=10)
gym.register("FaultyEndless-v0", Faulty)
gym.register("CommandedHopper-v0", CommandedHopper, max_episode_steps=1000)
STACKED = gym.wrappers.FrameStackObservation.wrapper_spec(stack_size=2)
gym.register("WrappedHopper-v0", HopperEnv, max_episode_steps=1000, additional_wrappers=(STACKED,))
