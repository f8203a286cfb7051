"""The tasks, with the habits of IsaacGymEnvs' VecTask."""

import torch
from standin_physics import CartPole, PointMass


class StandInTask:
    physics_class, has_states, feels_old_contacts = None, False, False

    def __init__(self, cfg, rl_device):
        self.cfg, self.rl_device = cfg, rl_device
        self.num_envs = num_envs = cfg["env"]["numEnvs"]
        self.physics = self.physics_class(num_envs, rl_device)
        self.num_obs, self.num_acts = self.physics.num_obs, self.physics.num_actions
        self.num_states = self.physics.num_privileged_obs if self.has_states else 0
        self.max_episode_length = self.physics.max_episode_length
        self.obs_buf = torch.zeros(num_envs, self.num_obs, device=rl_device)
        self.states_buf = torch.zeros(num_envs, self.num_states, device=rl_device)
        self.rew_buf = torch.zeros(num_envs, device=rl_device)
        self.reset_buf = torch.ones(num_envs, dtype=torch.long, device=rl_device)
        self.progress_buf = torch.zeros(num_envs, dtype=torch.long, device=rl_device)
        self.obs_dict, self.extras, self.curriculum = {}, {}, 0

    def get_env_state(self):
        return {"curriculum": self.curriculum}

    def set_env_state(self, env_state):
        self.curriculum = env_state["curriculum"]

    def reset(self):
        """Nothing is reset here, and the observations are the buffers' zeros: the first step does it."""
        self.obs_dict["obs"] = self.obs_buf
        if self.num_states:
            self.obs_dict["states"] = self.states_buf
        return self.obs_dict

    def step(self, actions):
        assert actions.dtype == torch.float32 and actions.is_contiguous() and not actions.requires_grad
        self.physics.step(actions.clamp(-1.0, 1.0))
        self.progress_buf += 1
        failed = self.physics.failed()
        indexes = self.reset_buf.nonzero().flatten()
        if len(indexes):
            self.physics.reset(indexes)
            self.progress_buf[indexes] = 0
            self.reset_buf[indexes] = 0
            self.extras["episode"] = {"resets": torch.tensor(1.0)}
            self.curriculum += len(indexes)
        self.obs_buf[:] = self.physics.obs()
        if self.num_states:
            self.states_buf[:] = self.physics.privileged_obs()
        self.rew_buf[:] = sum(self.physics.rewards().values())
        timed_out = self.progress_buf >= self.max_episode_length - 1
        if not self.feels_old_contacts:
            failed = self.physics.failed()
        self.reset_buf[:] = (failed | timed_out).long()
        self.extras["time_outs"] = timed_out & (self.reset_buf != 0)
        self.extras["distance"] = self.obs_buf.norm(dim=1).mean()
        return self.reset(), self.rew_buf, self.reset_buf, self.extras


class Cartpole(StandInTask):
    physics_class, has_states = CartPole, True


class Pointmass(StandInTask):
    physics_class = PointMass


class Anymal(StandInTask):
    """In the step that resets a fallen robot, its contacts are still those of the fall: it is done once more."""

    physics_class, feels_old_contacts = CartPole, True


isaacgym_task_map = {"Cartpole": Cartpole, "Pointmass": Pointmass, "Anymal": Anymal}
