"""The tasks, with the habits of legged_gym's base classes."""

import numpy as np
import torch
from standin_physics import CartPole, PointMass

from legged_gym.utils import task_registry


class EnvCfg:
    """What the script reads or changes of a task's configuration."""

    class env:
        num_envs = 4096

    class init_state:
        default_joint_angles = {"pole": 0.0}

    class control:
        action_scale = 0.25

    class noise:
        add_noise = True

    class domain_rand:
        randomize_friction = True
        push_robots = True
        push_interval_s = 5


class TrainCfg:
    seed = 1


class StandInTask:
    physics_class = None

    def __init__(self, cfg, sim_device, headless):
        self.cfg, self.device, self.num_envs = cfg, sim_device, cfg.env.num_envs
        cfg.domain_rand.push_interval = np.ceil(cfg.domain_rand.push_interval_s / 0.02)  # NumPy's, as in the real one
        self.physics = self.physics_class(self.num_envs, self.device)
        self.num_obs, self.num_actions = self.physics.num_obs, self.physics.num_actions
        self.num_privileged_obs = self.physics.num_privileged_obs
        self.max_episode_length = float(self.physics.max_episode_length)  # the real one is np.ceil's
        size = {"device": self.device}
        self.obs_buf = torch.zeros(self.num_envs, self.num_obs, **size)
        self.privileged_obs_buf = None
        if self.num_privileged_obs is not None:
            self.privileged_obs_buf = torch.zeros(self.num_envs, self.num_privileged_obs, **size)
        self.rew_buf = torch.zeros(self.num_envs, **size)
        self.reset_buf = torch.ones(self.num_envs, dtype=torch.long, **size)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, **size)
        self.time_out_buf = torch.zeros(self.num_envs, dtype=torch.bool, **size)
        self.episode_sums = {name: torch.zeros(self.num_envs, **size) for name in self.physics.rewards()}
        self.command_ranges, self.common_step_counter = {"lin_vel_x": [-1.0, 1.0]}, 0
        self.extras = {}

    def reset(self):
        self.reset_idx(torch.arange(self.num_envs, device=self.device))
        return self.step(torch.zeros(self.num_envs, self.num_actions, device=self.device))[:2]

    def step(self, actions):
        assert actions.dtype == torch.float32 and actions.is_contiguous() and not actions.requires_grad
        self.physics.step(actions.clamp(-100.0, 100.0))
        self.episode_length_buf += 1
        self.common_step_counter += 1
        self.time_out_buf = self.episode_length_buf > self.max_episode_length
        self.reset_buf = self.physics.failed() | self.time_out_buf
        self.rew_buf[:] = 0.0
        for name, term in self.physics.rewards().items():
            self.rew_buf += term
            self.episode_sums[name] += term
        self.reset_idx(self.reset_buf.nonzero().flatten())
        self.obs_buf[:] = self.physics.obs()
        if self.cfg.noise.add_noise:
            self.obs_buf += 0.01 * (2 * torch.rand_like(self.obs_buf) - 1)
        if self.privileged_obs_buf is not None:
            self.privileged_obs_buf[:] = self.physics.privileged_obs()
        return self.obs_buf, self.privileged_obs_buf, self.rew_buf, self.reset_buf, self.extras

    def reset_idx(self, indexes):
        if len(indexes) == 0:
            return
        self.physics.reset(indexes)
        self.episode_length_buf[indexes] = 0
        self.reset_buf[indexes] = 1
        self.extras["episode"] = {}
        seconds = self.max_episode_length * self.physics.dt
        for name, sums in self.episode_sums.items():
            self.extras["episode"]["rew_" + name] = sums[indexes].mean() / seconds
            sums[indexes] = 0.0
        # As in `update_command_curriculum`, which leaves NumPy's numbers.
        self.command_ranges["lin_vel_x"][1] = np.clip(self.command_ranges["lin_vel_x"][1], 0.0, 3.0)
        self.extras["episode"]["max_command_x"] = self.command_ranges["lin_vel_x"][1]
        self.extras["time_outs"] = self.time_out_buf


class CartPoleTask(StandInTask):
    physics_class = CartPole


class PointMassTask(StandInTask):
    physics_class = PointMass


task_registry.register("cartpole", CartPoleTask, EnvCfg(), TrainCfg())
task_registry.register("pointmass", PointMassTask, EnvCfg(), TrainCfg())
