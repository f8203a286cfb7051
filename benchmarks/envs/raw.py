"""Humanoid-v4 with raw actions: what the policy samples is clipped to the box of ±0.4, as the first edition did it.

Run:     python nfpo_continuous_action.py --env-id benchmarks.envs.raw:RawHumanoid-v4

The script rescales a finite box to the policy's [-1, 1] and lets actions of an unbounded one pass. Gymnasium's
`ClipAction` says that the box is unbounded, and clips.
"""

import gymnasium as gym

gym.register(
    "RawHumanoid-v4",
    "gymnasium.envs.mujoco.humanoid_v4:HumanoidEnv",
    max_episode_steps=1000,
    additional_wrappers=(gym.wrappers.ClipAction.wrapper_spec(),),
)
