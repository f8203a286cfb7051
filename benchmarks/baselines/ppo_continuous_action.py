"""The Gaussian twin: the NFPO script with its policy swapped for CleanRL's diagonal Gaussian, and nothing else changed.

Run:     python benchmarks/baselines/ppo_continuous_action.py --env-id Humanoid-v4
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nfpo_continuous_action import Args, linear, main  # noqa: E402

FLOW_FLAGS = "--num-flow-layers", "--hidden-layers", "--scale-fn", "--scale-bound", "--learned-base-std"


class GaussianPolicy(nn.Module):
    """A tanh network for the mean and a state-independent log standard deviation, as in CleanRL's PPO, where
    `base_std`, the standard deviation at the start, is 1."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_dim: int = 64, base_std: float = 1.0):
        super().__init__()
        self.mean = nn.Sequential(
            linear(obs_dim, hidden_dim),
            nn.Tanh(),
            linear(hidden_dim, hidden_dim),
            nn.Tanh(),
            linear(hidden_dim, action_dim, gain=0.01),
        )
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


def refuse_flow_flags() -> None:
    """Exit with one line where the command line sets what only the flow has: it would do nothing here."""
    given = (x.split("=")[0].replace("_", "-").replace("--no-", "--") for x in sys.argv[1:] if x.startswith("--"))
    if wrong := set(given).intersection(FLOW_FLAGS):
        print(f"error: {', '.join(sorted(wrong))}: only the flow has this, {sys.argv[0]} does not", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    refuse_flow_flags()
    main(GaussianPolicy, Args(exp_name="ppo_continuous_action"))
