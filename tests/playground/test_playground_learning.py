"""The whole script learns, and a threshold notices the mistakes that cost other scripts their result."""

import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import small_args

# Best possible: 6 in each of 20 steps, 120. Standing still on the lane: 80. Untrained: below 60.
LANE_RETURN = 105


def learn(runs_dir) -> float:
    """Train on the lane for 61k steps; returns the mean return without noise."""
    flags = {"num_envs": 32, "num_steps": 32, "num_minibatches": 4, "update_epochs": 8, "learning_rate": 2e-3}
    flags |= {"hidden_dim": 32, "num_flow_layers": 4, "critic_hidden_dims": (64, 64), "checkpoint_interval": 1000}
    flags |= {"gamma": 0.95, "gae_lambda": 0.6, "total_timesteps": 61_440, "anneal_lr": True}
    run_dir = nfpo.train(small_args(runs_dir=str(runs_dir), **flags))["run_dir"]
    return float(np.mean(nfpo.evaluate(run_dir, eval_episodes=30)))


def test_lane_is_learned(tmp_path):
    """61k steps come near the best possible return."""
    found = learn(tmp_path)
    print(f"{found:.1f}")
    assert found > LANE_RETURN


def wrong_log_prob(self, obs, action):
    z, log_det = self.forward(obs, action)
    return self.base_log_prob(z) - log_det


def mortal_compute_gae(rewards, values, next_values, terminated, done, *factors, right=nfpo.compute_gae):
    return right(rewards, values, next_values, done, done, *factors)


@pytest.mark.parametrize(
    "mistake",
    [
        (nfpo.FlowPolicy, "log_prob", wrong_log_prob),
        (nfpo, "compute_gae", mortal_compute_gae),
        (nfpo.Agent, "normalize", lambda self, obs: obs),
    ],
    ids=["sign of the log-det", "time limit as termination", "no statistics"],
)
def test_threshold_notices(mistake, tmp_path, monkeypatch):
    """A wrong sign, time limits as deaths, blindness: each stays below the threshold."""
    monkeypatch.setattr(*mistake)
    found = learn(tmp_path)
    print(f"{found:.1f}")
    assert found < LANE_RETURN
