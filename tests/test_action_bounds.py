"""Promise: policies act in [-1, 1], every finite Box is learned alike, and its bounds are never passed."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_agent

import nfpo_continuous_action as nfpo

BOXES = {
    "one": {},
    "tiny": {"low": -0.01, "high": 0.01},
    "far": {"low": 30.0, "high": 1017.0},
    "double": {"low": -0.1, "high": 0.1, "dtype": "float64"},  # float32's 0.1 is above float64's
}
INF = math.inf


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_every_finite_box_is_learned_alike(box, tmp_path):
    """2,048 steps reach -0.5 of 0 per episode, where a policy that knows nothing loses 3 at least."""
    args = nfpo.Args(
        env_id="tests.envs:Target-v0",
        env_kwargs={**box, "strict": True},
        total_timesteps=2048,
        num_envs=16,
        num_minibatches=4,
        learning_rate=3e-3,
        gamma=0.5,
        compile=False,
        runs_dir=str(tmp_path),
    )
    run_dir = nfpo.train(args)["run_dir"]
    returns = nfpo.evaluate(run_dir, eval_episodes=20)
    print(f"return {np.mean(returns):.3f}")
    assert np.mean(returns) > -0.5
    untrained = nfpo.evaluate(run_dir, eval_episodes=20, temperature=1000.0)  # noise that only the Box holds back
    assert np.mean(untrained) < -3


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_what_reaches_the_environment(box):
    """It is in the Box and of its type, both bounds are reached and never passed, and -1 and 1 mean the bounds."""
    args = nfpo.Args(env_id="tests.envs:Target-v0", env_kwargs={**box, "strict": True})
    envs = nfpo.make_envs(args, 2, seed=1)
    agent = nfpo.Agent(nfpo.Args(base_std=2.0), nfpo.FlowPolicy, envs)
    _, actions, *_ = nfpo.collect_rollout(agent, envs, agent.act, nfpo.Args(num_steps=100, num_envs=64))
    space = envs.space
    low, high = space.low[0].item(), space.high[0].item()
    for i, env in enumerate(envs.envs.envs):
        played = np.concatenate(env.unwrapped.actions[-100:])
        assert played.dtype == space.dtype and played.min() == low and played.max() == high
        expected = np.clip(low + (high - low) * (actions[:, i, 0].double().numpy() + 1) / 2, low, high)
        np.testing.assert_allclose(played, expected, atol=(high - low) * 1e-4)
    assert actions.abs().max() > 1.5, "what is learned from is the action before the clip"


@pytest.mark.parametrize(
    "low, high", [(-INF, INF), (0.0, INF), (-INF, 0.25), (-3.4e38, 3.4e38)], ids=["unbounded", "below", "above", "huge"]
)
def test_boxes_without_a_size_pass_actions_through(low, high):
    """Nothing is rescaled where there is no size to rescale to; a bound that is there still holds."""
    agent = make_agent(5, 3, low=low, high=high, base_std=3.0)
    _, action, _, boxed = agent.act(torch.randn(100, 5))
    assert torch.equal(boxed, action.clamp(low, high)) and boxed.isfinite().all()
    assert action.abs().max() > 3


def test_dimensions_are_rescaled_each_by_itself():
    """A Box may be finite in one dimension and unbounded in the next."""
    agent = make_agent(5, 3)
    agent.low, agent.high = torch.tensor([-0.4, -INF, 10.0]), torch.tensor([0.4, INF, 30.0])
    agent.policy.sample = lambda obs, temperature: (torch.tensor([[0.5, 7.0, -0.5]]), torch.zeros(1))
    torch.testing.assert_close(agent.act(torch.zeros(1, 5))[-1], torch.tensor([[0.2, 7.0, 15.0]]))


def test_actions_of_any_shape_keep_their_order():
    """A Box of (2, 3) gets its six numbers row by row."""
    envs = nfpo.make_envs(nfpo.Args(env_id="tests.envs:MatrixAction-v0"), 2, seed=1)
    seen = []
    step = envs.envs.step
    envs.envs.step = lambda action: (seen.append(action), step(action))[1]
    envs.step(torch.arange(12).view(2, 6) / 12)
    np.testing.assert_allclose(seen[0], np.arange(12).reshape(2, 2, 3) / 12, rtol=1e-6)


@pytest.mark.parametrize("env_id", ["Humanoid-v4", "Pendulum-v1"])
def test_known_tasks(env_id):
    """Humanoid's joints take +-0.4, Pendulum's +-2: what the policy calls 1 is all of it."""
    envs = nfpo.make_envs(nfpo.Args(env_id=env_id), 1, seed=1)
    agent = nfpo.Agent(nfpo.Args(), nfpo.FlowPolicy, envs)
    bound = gym.make(env_id).action_space.high
    agent.policy.sample = lambda obs, temperature: (torch.ones(1, len(bound)), torch.zeros(1))
    np.testing.assert_allclose(agent.act(envs.obs)[-1][0], bound, rtol=1e-6)
