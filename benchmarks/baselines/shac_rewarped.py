"""SHAC: the RFO script with its flow policy swapped for a Gaussian, without the two flow-matching losses, and nothing
else changed ("Accelerated Policy Learning with Parallel Differentiable Simulation", Xu et al., 2022).

Run:     python benchmarks/baselines/shac_rewarped.py --env-id Cartpole
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rfo_rewarped import Args, main, mlp  # noqa: E402


class GaussianPolicy(nn.Module):
    """A network for the mean and a state-independent log standard deviation, squashed by tanh and differentiated by the
    reparameterization trick. `action_chunk` actions are drawn at once, as by the flow."""

    def __init__(self, obs_dim: int, action_dim: int, action_chunk: int = 1):
        super().__init__()
        self.shape = (action_chunk, action_dim)
        self.mean = mlp(obs_dim, action_chunk * action_dim, gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(action_chunk * action_dim))

    def sample(self, obs: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, obs_dim) -> actions in [-1, 1] (B, action_chunk, action_dim), and what tanh makes them of, flat."""
        x = self.mean(obs)
        if temperature > 0:
            x = x + temperature * self.log_std.exp() * torch.randn_like(x)
        return torch.tanh(x).unflatten(-1, self.shape), x


if __name__ == "__main__":
    main(GaussianPolicy, Args(exp_name="shac_rewarped", past_coef=0, uniform_coef=0))
