"""The Gaussian twin on MuJoCo Playground: the NFPO script with its policy swapped for a diagonal Gaussian, and nothing
else changed but the entropy bonus that the paper gives PPO here (Sec. A.3).

Run:     python benchmarks/baselines/ppo_playground_jax.py --env-id CartpoleBalance
"""

import math
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nfpo_playground_jax import Args, main, orthogonal  # noqa: E402


class GaussianPolicy(nn.Module):
    """An ELU network for the mean and a state-independent log standard deviation."""

    obs_dim: int
    action_dim: int
    hidden_dims: tuple[int, ...] = (512, 256, 128)

    def setup(self):
        self.layers = [nn.Dense(width, kernel_init=orthogonal()) for width in self.hidden_dims]
        self.mean = nn.Dense(self.action_dim, kernel_init=orthogonal(0.01))
        self.log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))

    def mode(self, obs: jax.Array) -> jax.Array:
        """The mean, which is the deterministic policy. (B, obs_dim) -> (B, action_dim)."""
        for layer in self.layers:
            obs = nn.elu(layer(obs))
        return self.mean(obs)

    def base_log_prob(self, z: jax.Array) -> jax.Array:
        """Log-density of mean + std * z, with z (B, action_dim) standard normal. -> (B,)."""
        return (-0.5 * (jnp.square(z) + math.log(2 * math.pi)) - self.log_std).sum(-1)

    def log_prob(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        """(B, obs_dim), (B, action_dim) -> (B,)."""
        return self.base_log_prob((action - self.mode(obs)) * jnp.exp(-self.log_std))

    __call__ = log_prob

    def sample(self, obs: jax.Array, key: jax.Array, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
        """(B, obs_dim) -> actions (B, action_dim), log-probabilities (B,) of the policy at temperature 1."""
        mean = self.mode(obs)
        z = temperature * jax.random.normal(key, mean.shape)
        return mean + jnp.exp(self.log_std) * z, self.base_log_prob(z)


if __name__ == "__main__":
    main(GaussianPolicy, Args(exp_name="ppo_playground_jax", ent_coef=1e-3))
