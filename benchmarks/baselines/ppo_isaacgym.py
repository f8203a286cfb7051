"""The Gaussian twin on Isaac Gym: the NFPO script with its policy swapped for a diagonal Gaussian, and nothing else
changed but the entropy bonus that the paper gives PPO here (Sec. A.3).

Run:     python benchmarks/baselines/ppo_isaacgym.py --env-id g1                      # PPO-fixed of the paper
         python benchmarks/baselines/ppo_isaacgym.py --env-id g1 --desired-kl 0.01    # PPO-adaptive
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nfpo_isaacgym import Args, linear, main  # noqa: E402, I001  # before PyTorch, since it imports Isaac Gym

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402


class GaussianPolicy(nn.Module):
    """An ELU network for the mean and a state-independent log standard deviation, `base_std` at first."""

    def __init__(
        self, obs_dim: int, action_dim: int, hidden_dims: tuple[int, ...] = (96, 96, 64), base_std: float = 1.0
    ):
        super().__init__()
        layers = []
        for in_dim, out_dim in zip((obs_dim, *hidden_dims), hidden_dims):
            layers += [linear(in_dim, out_dim), nn.ELU()]
        self.mean = nn.Sequential(*layers, linear(hidden_dims[-1], action_dim, gain=0.01))
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(base_std)))

    def base_log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Log-density of mean + std * z, with z (B, action_dim) standard normal. -> (B,)."""
        return (-0.5 * (z.square() + math.log(2 * math.pi)) - self.log_std).sum(-1)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """(B, obs_dim), (B, action_dim) -> (B,)."""
        return self.base_log_prob((action - self.mean(obs)) * (-self.log_std).exp())

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, obs_dim) -> actions (B, action_dim), log-probabilities (B,) of the policy at temperature 1."""
        mean = self.mean(obs)
        z = temperature * torch.randn_like(mean) if temperature > 0 else torch.zeros_like(mean)
        return mean + self.log_std.exp() * z, self.base_log_prob(z)


if __name__ == "__main__":
    main(GaussianPolicy, Args(exp_name="ppo_isaacgym", ent_coef=1e-3))
