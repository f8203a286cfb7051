"""Promise: an evaluation plays the policy that was trained, one episode in each environment, and says what it found."""

import numpy as np
import pytest

import nfpo_isaacgym as nfpo

from .conftest import small_args


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    args = small_args(env_id="pointmass", runs_dir=str(folder), total_timesteps=4800, normalize_obs=True)
    return nfpo.train(args)["run_dir"]


def test_temperature_seed_and_noise(run_dir):
    """The deterministic policy repeats itself with its seed; another seed, noise of the policy or none of the task are
    other episodes; the statistics stay as they are."""
    play = lambda **flags: nfpo.evaluate(run_dir, eval_episodes=5, **flags)  # noqa: E731
    first = play()
    assert first == play() and len(first) == 5
    for flags in ({"seed": 2}, {"temperature": 1.0}, {"randomize": False}):
        assert play(**flags) != first
    assert play(temperature=1.0) != play(temperature=0.5)


def test_every_environment_plays_one_episode(tmp_path, capsys):
    """A short episode counts as much as a long one, and the terms that the task measures are printed."""
    args = small_args(env_id="cartpole", runs_dir=str(tmp_path), total_timesteps=48)
    run_dir = nfpo.train(args)["run_dir"]
    returns = nfpo.evaluate(run_dir, eval_episodes=20)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("20 episodes of cartpole")]
    assert f"return {np.mean(returns):.2f} ± {np.std(returns):.2f}" in line
    assert "episode/rew_alive" in line and "temperature 0:" in line
    assert len(set(returns)) > 10
    (single,) = nfpo.evaluate(run_dir, eval_episodes=1)
    words = capsys.readouterr().out.replace(",", "").split()
    # One episode: its terms, times the longest episode's seconds, are its return; it pays 0.02 a step at most.
    terms = [float(words[words.index(f"episode/{name}") + 1]) for name in ("rew_alive", "rew_upright")]
    assert 200 * 0.02 * sum(terms) == pytest.approx(single, abs=0.003)
    assert single < 0.02 * float(words[words.index("length") + 1]) + 1e-6


def test_evaluation_survives_a_broken_simulation(run_dir, monkeypatch):
    """An episode that breaks ends there, with what it had; no evaluation waits for it for ever."""
    right, whole = nfpo.make_envs, nfpo.evaluate(run_dir, eval_episodes=5)

    def make_envs(*args):
        envs = right(*args)
        step, calls = envs.env.step, []

        def broken(actions):
            result = step(actions)
            calls.append(1)
            if len(calls) > 10:
                envs.env.obs_buf[3] = float("nan")  # for ever
            return result

        monkeypatch.setattr(envs.env, "step", broken)
        return envs

    monkeypatch.setattr(nfpo, "make_envs", make_envs)
    returns = nfpo.evaluate(run_dir, eval_episodes=5)
    assert np.isfinite(returns).all() and returns[3] < whole[3]
