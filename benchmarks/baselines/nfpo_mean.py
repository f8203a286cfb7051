"""NFPO around a mean: a = mu(o) + f^-1(z; o), where mu is the Gaussian twin's own network. Such a flow contains the
Gaussian, and starts as one.

Run:     python benchmarks/baselines/nfpo_mean.py --env-id Humanoid-v4
"""

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import nfpo_continuous_action as nfpo  # noqa: E402
from benchmarks.baselines import ppo_continuous_action as ppo  # noqa: E402


class MeanFlowPolicy(nfpo.FlowPolicy):
    """The flow of actions less a mean. A shift by a function of the observation leaves the determinant as it is."""

    @functools.wraps(nfpo.FlowPolicy.__init__)  # `train` reads what a policy can be given from its signature
    def __init__(self, obs_dim: int, action_dim: int, *args, **kwargs):
        super().__init__(obs_dim, action_dim, *args, **kwargs)
        self.mean = ppo.GaussianPolicy(obs_dim, action_dim).mean

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D) to latents (B, D) and log|det dz/da| (B,)."""
        return super().forward(obs, action - self.mean(obs))

    def inverse(self, obs: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, D) to actions (B, D) and log|det da/dz| (B,)."""
        action, log_det = super().inverse(obs, z)
        return action + self.mean(obs), log_det


if __name__ == "__main__":
    nfpo.main(MeanFlowPolicy, nfpo.Args(exp_name="nfpo_mean"))
