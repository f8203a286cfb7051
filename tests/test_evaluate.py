"""Promise: evaluation plays the trained policy with frozen statistics, repeatably, and comes to an end."""

import random
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL, run, run_folders

import nfpo_continuous_action as nfpo


def play(run_dir, **options) -> list[float]:
    return nfpo.evaluate(run_dir, **{"eval_episodes": 3, **options})


def test_seed_decides(hopper_run):
    """The same seed gives the same returns whatever ran before, another seed others."""
    for temperature in (0.0, 1.0):
        torch.manual_seed(0)
        first = play(hopper_run, seed=3, temperature=temperature)
        torch.manual_seed(1)
        torch.rand(10)
        assert play(hopper_run, seed=3, temperature=temperature) == first
        assert play(hopper_run, seed=4, temperature=temperature) != first
        assert len(set(first)) == 3  # one seed does not replay one episode


def test_leaves_the_world_alone(hopper_run):
    """Neither the run's folder nor the caller's random numbers change."""
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    content = {file.name: file.read_bytes() for file in hopper_run.iterdir()}
    play(hopper_run, temperature=1.0)
    assert {file.name: file.read_bytes() for file in hopper_run.iterdir()} == content
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]


def test_statistics_are_frozen(hopper_run, monkeypatch):
    """No observation of an evaluation enters the statistics."""
    monkeypatch.setattr(nfpo.RunningMeanStd, "update", lambda *_: pytest.fail("statistics were updated"))
    play(hopper_run)


def deterministic_actions(run_dir, obs: np.ndarray, env_id: str, policy: torch.nn.Module) -> np.ndarray:
    """The deployed policy written once more: normalize, sample at temperature 0, rescale from [-1, 1] and clip."""
    state = nfpo.load_checkpoint(run_dir)["agent"]
    policy.load_state_dict({name[7:]: value for name, value in state.items() if name.startswith("policy.")})
    mean, var = state["obs_stats.mean"].numpy(), state["obs_stats.var"].numpy()
    normalized = np.clip((obs - mean) / np.sqrt(var + 1e-8), -10, 10).astype(np.float32)
    with torch.no_grad():
        action = policy.sample(torch.from_numpy(normalized), temperature=0.0)[0].numpy()
    space = gym.make(env_id).action_space
    return np.clip(space.low + (space.high - space.low) * (action + 1) / 2, space.low, space.high)


def test_temperature(train_small, monkeypatch):
    """Temperature 0 plays the mode: one action for one observation; temperature 1 plays the density it trained."""
    run_dir = train_small("Pendulum-v1", learning_rate=0.03)
    played, step = [], nfpo.Environments.step
    monkeypatch.setattr(nfpo.Environments, "step", lambda envs, action: (played.append(action), step(envs, action))[1])
    first = {}
    for temperature in (0.0, 0.5, 1.0):
        played.clear()
        play(run_dir, seed=5, temperature=temperature, eval_episodes=1)
        first[temperature] = played[1].numpy()  # the first one only looks whether the environment works
    envs = nfpo.make_envs(nfpo.Args(env_id="Pendulum-v1"), 1, seed=5)
    mode = deterministic_actions(run_dir, envs.obs.numpy(), "Pendulum-v1", nfpo.FlowPolicy(3, 1))
    np.testing.assert_allclose(first[0.0], mode, atol=1e-6)
    assert abs(mode).min() > 1e-3, "0 shows nothing"
    assert not np.allclose(first[0.5], mode, atol=1e-2) and not np.allclose(first[1.0], first[0.5], atol=1e-3)


def test_command_line(cli, hopper_run):
    """--evaluate prints mean and deviation of the returns; a checkpoint's path does as well as its folder's."""
    flags = "--eval-episodes", 3, "--temperature", 1, "--seed", 2
    ended = cli("--evaluate", hopper_run, *flags)
    returns = play(hopper_run, seed=2, temperature=1.0)
    expected = f"3 episodes, temperature 1: {np.mean(returns):.1f} ± {np.std(returns):.1f}"
    assert ended.status == 0 and expected in ended.out
    assert cli("--evaluate", hopper_run / "checkpoint.pt", *flags).out == ended.out
    assert list(cli.folder.iterdir()) == []


def test_returns_are_the_environments(train_small, monkeypatch):
    """They are sums of raw rewards over whole episodes: Reuse-v0 pays 1 in each of its ten steps."""
    assert play(train_small("tests.envs:Reuse-v0"), eval_episodes=5) == [10.0] * 5


def test_episodes_without_end(train_small, cli, monkeypatch):
    """They end after 10,000 steps, here 1,000, as the help says, and the bar shows that something happens."""
    run_dir, time_limit, limits = train_small("tests.envs:Endless-v0"), gym.wrappers.TimeLimit, []
    monkeypatch.setattr(nfpo, "BAR", {"mininterval": 0.05})
    monkeypatch.setattr(gym.wrappers, "TimeLimit", lambda env, n: (limits.append(n), time_limit(env, n // 10))[1])
    ended = cli("--evaluate", run_dir, "--eval-episodes", 1)
    assert ended.status == 0 and "1 episodes" in ended.out and limits == [10_000]
    assert len(set(re.findall(r"step (\d+)", ended.err))) > 2
    assert "10,000 steps" in re.sub(r"[│\s]+", " ", cli("--help").out)


def test_a_limit_of_its_own_stays(train_small, monkeypatch):
    """The evaluation's limit is only for environments without one."""
    run_dir, lengths = train_small("tests.envs:Target-v0"), []
    step = nfpo.Environments.step
    monkeypatch.setattr(nfpo.Environments, "step", lambda *inputs: (lengths.append(1), step(*inputs))[1])
    play(run_dir, eval_episodes=2)
    assert len(lengths) == 1 + 2 * 10


def test_training_without_episodes_end(train_small):
    """Training on them needs no limit: rollouts go on where the last one stopped, and no return is made up."""
    run_dir = train_small("tests.envs:Endless-v0")
    assert nfpo.load_checkpoint(run_dir)["returns"] == []


def test_environments_with_arguments(cli):
    """--env-kwargs reach the environment in training and, from the run, in evaluation."""
    kwargs = '{"low": 30, "high": 1017, "strict": true}'
    assert cli(*SMALL, "--env-id", "tests.envs:Target-v0", "--env-kwargs", kwargs).status == 0
    (run_dir,) = run_folders(cli.folder)
    assert nfpo.load_checkpoint(run_dir)["args"].env_kwargs == {"low": 30, "high": 1017, "strict": True}
    assert cli("--evaluate", run_dir, "--eval-episodes", 1).status == 0
    ended = cli(
        "--evaluate", run_dir, "--eval-episodes", 1, "--env-kwargs", '{"low": -1, "strict": true, "dtype": "x"}'
    )
    assert ended.status == 2 and "dtype" in ended.err + "dtype" and ended.err.count("error: ") == 1


SPAWNED = """
import multiprocessing
import gymnasium as gym
import numpy as np

class Mine(gym.Env):
    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}

if __name__ == "__main__":
    from nfpo_continuous_action import Args, evaluate, train

    multiprocessing.set_start_method("spawn")
    gym.register("Mine-v0", Mine, max_episode_steps=7)
    small = dict(num_envs=2, num_steps=32, num_minibatches=2, update_epochs=1, total_timesteps=64)
    ended = train(Args(env_id="Mine-v0", async_envs=True, compile=False, **small))
    print(ended["episodic_return"], evaluate(ended["run_dir"], eval_episodes=2))
"""


def test_callers_environments_in_spawned_processes(tmp_path):
    """An id that only the calling program knows works with --async-envs where processes start from nothing."""
    (tmp_path / "program.py").write_text(SPAWNED)
    ended = run(cwd=tmp_path, script=tmp_path / "program.py")
    assert ended.status == 0 and "7.0 [7.0, 7.0]" in ended.out, ended


def test_worker_processes_step_the_same_environments(hopper_run, train_small):
    """--async-envs changes where environments live and nothing that they do."""
    there = nfpo.load_checkpoint(train_small("Hopper-v4", async_envs=True))["agent"]
    for name, here in nfpo.load_checkpoint(hopper_run)["agent"].items():
        assert torch.equal(there[name], here), name
