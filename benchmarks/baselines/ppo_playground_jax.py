"""The Gaussian twin on MuJoCo Playground: the NFPO script with its policy swapped for a diagonal Gaussian, and nothing
else changed but the entropy bonus that the paper gives PPO here (Sec. A.3).

Run:     python benchmarks/baselines/ppo_playground_jax.py --env-id CartpoleBalance
"""

import math
import sys
from pathlib import Path
from typing import Optional

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nfpo_playground_jax import Args, linear, main  # noqa: E402


class GaussianPolicy(nn.Module):
    """An ELU network for the mean and a state-independent log standard deviation."""

    obs_dim: int
    action_dim: int
    base_std: float = 1.0  # the deviation at the start
    hidden_dims: tuple[int, ...] = (512, 256, 128)

    def setup(self):
        self.layers = [linear(width) for width in self.hidden_dims]
        self.mean_layer = linear(self.action_dim, gain=0.01)
        self.log_std = self.param("log_std", lambda _: jnp.full(self.action_dim, math.log(self.base_std)))

    def mean(self, obs: jax.Array) -> jax.Array:
        """The deterministic policy. (B, obs_dim) -> (B, D)."""
        for layer in self.layers:
            obs = nn.elu(layer(obs))
        return self.mean_layer(obs)

    def base_log_prob(self, z: jax.Array) -> jax.Array:
        """Log-density of mean + std * z, with z (B, D) standard normal. -> (B,)."""
        return (-0.5 * (jnp.square(z) + math.log(2 * math.pi)) - self.log_std).sum(-1)

    def log_prob(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """(B, obs_dim), (B, D) -> (B,)."""
        return self.base_log_prob((action - self.mean(obs)) * jnp.exp(-self.log_std))

    def sample(self, obs: jax.Array, key: Optional[jax.Array], temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
        """(B, obs_dim) -> actions (B, D), log-probabilities (B,) of the policy at temperature 1."""
        mean = self.mean(obs)
        z = jnp.zeros(mean.shape)
        if temperature > 0:
            z = temperature * jax.random.normal(key, mean.shape)
        return mean + jnp.exp(self.log_std) * z, self.base_log_prob(z)


if __name__ == "__main__":
    main(GaussianPolicy, Args(exp_name="ppo_playground_jax", ent_coef=1e-3))
