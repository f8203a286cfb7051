"""The whole script learns, and a threshold notices the mistakes that cost other scripts their result."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import ROOT, SCRIPT, small_args

# Best possible: 6 in each of 20 steps, 120. Standing still on the lane: 80.
LANE_RETURN = 105


def command(name: str) -> list[str]:
    """A command of the README, by the environment that it trains on."""
    text = (ROOT / "README.md").read_text()
    (found,) = set(re.findall(rf"python nfpo_playground_jax\.py (--env-id {name} .*)", text))
    return found.split()


def as_a_user_does(*flags, cwd: Path) -> str:
    """Run the script without what conftest.py asks of XLA for the sake of fast compilation; returns what it printed."""
    variables = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    command = [sys.executable, SCRIPT, *flags]
    return subprocess.run(command, cwd=cwd, env=variables, check=True, capture_output=True, text=True).stdout


# Untrained policies: 460, 12 and 9. The limit is in seconds, of the clock or of the processor, whichever is less: alone
# on a machine the clock is, and on a busy one the processor time bounds what the clock would show.
@pytest.mark.parametrize(
    "name, expected, limit",
    [("CartpoleBalance", 950, 120), ("CartpoleSwingup", 700, None), ("AcrobotSwingup", 25, None)],
)
def test_readme_command_learns(name, expected, limit, tmp_path):
    """The README's command reaches its return, compilation included, in the time that it promises."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    as_a_user_does(*command(name), cwd=tmp_path)
    after, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    seconds = min(clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    (run_dir,) = (tmp_path / "runs").iterdir()
    out = as_a_user_does("--evaluate", run_dir, "--eval-episodes", "100", cwd=tmp_path)
    mean = float(re.search(r"100 episodes .* return ([\d.]+) ±", out)[1])
    print(f"{name}: {mean:.0f} in {seconds:.0f} s")
    assert mean >= expected
    assert limit is None or seconds < limit


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
    z, log_det = self(obs, action)
    return self.base_log_prob(z) - log_det


def mortal_compute_gae(rewards, values, next_values, terminated, done, *factors, right=nfpo.compute_gae):
    return right(rewards, values, next_values, done, done, *factors)


@pytest.mark.parametrize(
    "mistake",
    [
        (nfpo.FlowPolicy, "log_prob", wrong_log_prob),
        (nfpo, "compute_gae", mortal_compute_gae),
        (nfpo, "normalize_obs", lambda stats, obs: obs),
    ],
    ids=["sign of the log-det", "time limit as termination", "no statistics"],
)
def test_threshold_notices(mistake, tmp_path, monkeypatch):
    """A wrong sign, time limits as deaths, blindness: each stays below the threshold."""
    monkeypatch.setattr(*mistake)
    found = learn(tmp_path)
    print(f"{found:.1f}")
    assert found < LANE_RETURN


def test_runs_folder_is_what_the_readme_says(lane_run):
    """Events, arguments and checkpoint are where tools look for them."""
    assert {path.name.split(".")[0] for path in Path(lane_run).iterdir()} == {"args", "checkpoint", "events"}
    assert lane_run.name.startswith("tests.playground.envs-Lane__nfpo_playground_jax__1__")
