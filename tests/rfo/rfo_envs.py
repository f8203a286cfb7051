"""Small differentiable environments with Rewarped's interface, whose right answers are known."""

from types import SimpleNamespace

import torch


class Batch:
    """What the script asks of a Rewarped environment. A subclass has `start`, `dynamics` and `reward`.

    The state is one tensor (N, state_dim) under the name `x`, kept and given back by `state` as Rewarped does it.
    """

    state_tensors_names = ("x",)
    state_dim, num_actions, episode_length = 1, 1, 8

    def __init__(self, num_envs, device="cpu", no_grad=False, seed=0, dtype="float32", episode_length=None):
        self.num_envs, self.num_acts, self.dtype = num_envs, self.num_actions, getattr(torch, dtype)
        self.episode_length = episode_length or self.episode_length
        self.progress = torch.zeros(num_envs, dtype=torch.int64)
        self.x = torch.zeros(num_envs, self.state_dim, dtype=self.dtype)

    @property
    def state(self):
        def assign(name, tensor):
            self.x = tensor

        return SimpleNamespace(x=self.x, assign=assign)

    def compute_observations(self):
        self.obs_buf = self.x.clone()

    def initialize_trajectory(self):
        self.x = self.x.detach()
        self.compute_observations()

    def reset(self, env_ids=None):
        """As Rewarped: a new tensor, whose other rows hold the old numbers without their history."""
        ids = torch.arange(self.num_envs) if env_ids is None else env_ids
        x = self.x.detach().clone()
        x[ids] = self.start(len(ids)).to(x)
        self.x = x
        self.progress[ids] = 0
        self.compute_observations()

    def terminal(self):
        return torch.zeros(self.num_envs, dtype=torch.bool)

    def step(self, action):
        reward = self.reward(self.x, action)
        self.x = self.dynamics(self.x, action)
        self.progress += 1
        self.compute_observations()
        terminated, truncated = self.terminal(), self.progress >= self.episode_length
        done = terminated | truncated
        if done.any():
            self.reset(done.nonzero().flatten())
        return self.obs_buf, reward, done, {"terminated": terminated, "truncated": truncated & ~terminated}


class Linear(Batch):
    """A double integrator with quadratic costs: its best linear controller solves a Riccati equation."""

    state_dim, num_actions, episode_length = 2, 1, 10**6
    A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[0.0], [0.1]], dtype=torch.float64)
    Q, R = torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)), 0.1

    def start(self, n):
        return torch.randn(n, 2)

    def dynamics(self, x, action):
        return x @ self.A.T.to(x) + action @ self.B.T.to(x)

    def reward(self, x, action):
        return -((x @ self.Q.to(x)) * x).sum(-1) - self.R * action.square().sum(-1)


class Fixed(Linear):
    """The same, but every episode is as long as a rollout and starts in one place: nothing of the simulator is carried
    from one rollout to the next."""

    episode_length = 8

    def start(self, n):
        return torch.ones(n, 2)


class Falls(Linear):
    """The same, but environment 0 falls at every third step, and environment 1 meets a time limit there."""

    episode_length = 10**6

    def terminal(self):
        fallen = torch.zeros(self.num_envs, dtype=torch.bool)
        fallen[0] = self.progress[0] == 3
        self.progress[1] += (self.progress[1] == 3) * 10**6
        return fallen


class Explodes(Linear):
    """The same, but the reward of one step in the second rollout is not a number."""

    steps = 0

    def reward(self, x, action):
        self.steps += 1
        return super().reward(x, action) * (float("nan") if self.steps == 12 else 1.0)


class Wordless(Linear):
    """Fails without a word."""

    def step(self, action):
        raise RuntimeError


class Dictionary(Linear):
    """Observations in a dictionary, of different shapes."""

    def compute_observations(self):
        self.obs_buf = {"pose": self.x[:, :1], "twist": self.x[:, None, 1:].expand(-1, 2, 1)}
