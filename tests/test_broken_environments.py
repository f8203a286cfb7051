"""Promise: one simulation of many whose numbers break costs its own episode, and nothing else."""

import math

import pytest
import torch
from conftest import make_agent, scalars

import nfpo_continuous_action as nfpo

NAN, INF = float("nan"), float("inf")
BAD = [(what, value) for what in ("reward", "observation") for value in (NAN, INF, -INF, 1e20)]


def make(num_envs: int = 3, env_id: str = "Broken-v0", **kwargs) -> nfpo.Environments:
    return nfpo.make_envs(nfpo.Args(env_id=f"tests.envs:{env_id}", env_kwargs=kwargs), num_envs, seed=1)


@pytest.mark.parametrize("what, value", BAD)
def test_its_episode_ends_there_and_the_others_go_on(what, value, capfd):
    """Reward 0, done but not terminated, the last good observation as final one; nobody else notices."""
    # one step was made to see whether the environment works
    envs, twin = make(what=what, value=value, every=6), make(what=what, value=value, every=10**6)
    actions = torch.zeros(3, 1)
    for _ in range(4):
        before = envs.obs.clone()
        for found, expected in zip(envs.step(actions), twin.step(actions)):
            assert torch.equal(found, expected)
    before = envs.obs.clone()
    reward, terminated, done, final_obs = envs.step(actions)
    expected_reward, *_ = twin.step(actions)
    assert reward.tolist() == [expected_reward[0], 0.0, expected_reward[2]]
    assert done.tolist() == [False, True, False] and not terminated.any()
    assert torch.equal(final_obs, before[1:2]), "what the bootstrap sees must be a state that was"
    assert envs.obs.isfinite().all() and (envs.obs.abs() <= 1).all()
    assert torch.equal(envs.obs[[0, 2]], twin.obs[[0, 2]])
    assert envs.broken_episodes.item() == 1
    assert len(envs.episodes) == 1 and envs.episodes[0][1] == 5 and math.isfinite(envs.episodes[0][0])
    said = "".join(capfd.readouterr())
    assert said.count("tests.envs:Broken-v0") == 1 and "[1]" in said and "finite" in said


def test_all_at_once():
    """Every environment may break in one step."""
    envs = make(culprit=1, num_envs=1, every=2)
    _, terminated, done, final_obs = envs.step(torch.zeros(1, 1))
    assert done.all() and not terminated.any() and len(final_obs) == 1 and envs.obs.isfinite().all()


@pytest.mark.parametrize("what, value", BAD)
def test_training_goes_on(what, value, train_small):
    """The run ends as planned, all parameters and statistics are finite and of the size of the good numbers, and
    charts/broken_episodes counts."""
    run_dir = train_small("tests.envs:Broken-v0", num_envs=4, env_kwargs={"what": what, "value": value})
    agent = nfpo.load_checkpoint(run_dir)["agent"]
    assert all(tensor.isfinite().all() for tensor in agent.values())
    assert agent["obs_stats.var"] < 1 and agent["return_stats.var"] < 100
    points = scalars(run_dir)
    assert [value for _, value in points["charts/broken_episodes"]] == [3.0]  # 1 + 32 steps: 11, 22 and 33


def test_good_environments_break_nothing(train_small):
    """And the count of a good run is 0."""
    points = scalars(train_small("tests.envs:Target-v0"))
    assert {value for _, value in points["charts/broken_episodes"]} == {0.0}


def test_large_numbers_that_simulators_mean():
    """A cost of a million is no broken simulation."""
    envs = make(value=-1e6, every=2, culprit=1, num_envs=1)
    reward, _, done, _ = envs.step(torch.zeros(1, 1))
    assert reward.item() == -1e6 and not done.any() and envs.broken_episodes.item() == 0


def test_rollout_is_clean():
    """The buffer that PPO learns from holds no broken number, and no value of a broken observation."""
    envs, args = make(4, what="observation"), nfpo.Args(num_envs=4, num_steps=40)
    agent = make_agent(1, 1)
    rollout = nfpo.collect_rollout(agent, envs, agent.act, args)
    assert all(part.isfinite().all() for part in rollout if part.is_floating_point())
    assert envs.broken_episodes.item() == 3


@pytest.mark.parametrize("value", [NAN, INF, 1e20])
def test_first_observations_may_break_too(value, train_small):
    """What a reset returns is an observation like any other: it reaches neither the statistics nor the networks."""
    run_dir = train_small("tests.envs:Broken-v0", num_envs=4, env_kwargs={"what": "reset", "value": value})
    agent = nfpo.load_checkpoint(run_dir)["agent"]
    assert all(tensor.isfinite().all() for tensor in agent.values())
    assert agent["obs_stats.var"] < 1


@pytest.mark.parametrize("async_envs", [False, True])
def test_an_environment_may_use_one_array_for_all_its_observations(async_envs):
    """A final observation is what it was at the episode's end, 10, and not the first one that the array holds next."""
    args = nfpo.Args(env_id="tests.envs:Reuse-v0", async_envs=async_envs)
    envs, seen = nfpo.make_envs(args, 2, seed=1), []
    for _ in range(9):
        envs.step(torch.zeros(2, 1))
        seen.append(envs.obs)
    _, terminated, done, final_obs = envs.step(torch.zeros(2, 1))
    assert done.all() and not terminated.any()
    assert final_obs.tolist() == [[10.0]] * 2 and envs.obs.tolist() == [[0.0]] * 2
    assert [obs[0].item() for obs in seen] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    envs.envs.close()
