"""Promise: a rollout holds what happened, whatever habits the simulator's packages have."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nfpo_isaacgym as nfpo

from .conftest import make, small_args

LEGGED = ("cartpole", "pointmass")
ISAACGYMENVS = ("isaacgymenvs:Cartpole", "isaacgymenvs:Pointmass", "isaacgymenvs:Anymal")
NAMES = "obs actions log_probs rewards values next_values terminated done resetting".split()


class Truth:
    """Notes about every step of a stand-in's task, taken from its own state and not from what it hands out."""

    def __init__(self, env, monkeypatch):
        self.reward, self.done, self.time_out, self.obs, self.stale = [], [], [], [], 0
        step = env.step

        def noted(actions):
            result = step(actions)
            self.reward.append(env.rew_buf.clone())
            self.done.append(env.reset_buf.bool().clone())
            if hasattr(env, "progress_buf"):
                self.time_out.append((env.progress_buf >= env.max_episode_length - 1) & self.done[-1])
                privileged = env.states_buf if env.num_states else None
            else:
                self.time_out.append(env.time_out_buf & env.reset_buf.bool())
                self.stale += int((result[-1].get("time_outs", self.done[-1]) & ~self.done[-1]).sum())
                privileged = env.privileged_obs_buf
            self.obs.append(env.obs_buf.clone() if privileged is None else torch.cat((env.obs_buf, privileged), 1))
            return result

        monkeypatch.setattr(env, "step", noted)

    def stacked(self):
        return [torch.stack(x) for x in (self.reward, self.done, self.time_out, self.obs)]


def collect(env_id, monkeypatch, rollouts=4, num_steps=60, num_envs=64, **flags):
    """Several rollouts as one, and the truth about them."""
    args = small_args(env_id=env_id, num_steps=num_steps, num_envs=num_envs, **flags)
    envs, agent = make(args)
    envs.reset(args.random_initial_steps)
    first_obs = envs.obs.clone()
    truth = Truth(envs.env, monkeypatch)
    parts = [nfpo.collect_rollout(agent, envs, agent.act, args) for _ in range(rollouts)]
    joined = SimpleNamespace(**{name: torch.cat(x) for name, x in zip(NAMES, zip(*parts))})
    return joined, truth, agent, first_obs, envs


@pytest.mark.parametrize("env_id", LEGGED + ISAACGYMENVS)
def test_rollout_is_what_happened(env_id, monkeypatch):
    """Observations, rewards and ends are those of their own step, though the environment overwrites all its buffers."""
    rollout, truth, agent, first_obs, envs = collect(env_id, monkeypatch)
    reward, done, time_out, obs = truth.stacked()
    assert done.any() and time_out.any() and (truth.stale > 0 or env_id != "pointmass"), "nothing to get wrong"
    assert torch.equal(rollout.rewards, reward.masked_fill(rollout.resetting, 0.0))
    assert torch.equal(rollout.done, done) and torch.equal(rollout.terminated, done & ~time_out)
    assert torch.equal(rollout.obs[0], first_obs) and torch.equal(rollout.obs[1:], obs[:-1])
    num_obs, num_privileged, _ = envs.sizes
    assert rollout.obs[..., agent.policy_obs].shape[-1] == num_obs
    assert rollout.obs[..., agent.critic_obs].shape[-1] == (num_privileged or num_obs)


def test_policy_and_critic_see_their_own(monkeypatch):
    """The critic's values depend on the privileged observations, the actions do not."""
    rollout, _, agent, *_ = collect("cartpole", monkeypatch, rollouts=1)
    other = rollout.obs.clone()
    other[..., 5:] += 1.0
    with torch.no_grad():
        for obs, is_same in ((rollout.obs, True), (other, False)):
            assert torch.allclose(agent.critic(obs[..., agent.critic_obs]), rollout.values, atol=1e-5) == is_same
            log_probs = agent.policy.log_prob(obs[..., agent.policy_obs], rollout.actions)
            assert torch.allclose(log_probs, rollout.log_probs, atol=1e-4)


@pytest.mark.parametrize("env_id", LEGGED)
def test_time_limit_bootstraps_within_step(env_id, monkeypatch):
    """Where environments reset within the step: advantages as by rsl_rl's rule, reward + gamma V(s_t) at a time-out and
    a trace cut at every end, in plain loops."""
    rollout, truth, agent, *_ = collect(env_id, monkeypatch, rollouts=1, num_steps=240)
    reward, done, time_out, obs = truth.stacked()
    values, following = rollout.values.double().numpy(), agent.critic(obs[-1:, :, agent.critic_obs]).detach().double()
    following = np.concatenate((values[1:], following))
    gamma, gae_lambda = 0.9, 0.8
    advantages = nfpo.compute_gae(
        rollout.rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.done, gamma, gae_lambda
    )
    reward, done, time_out = reward.double().numpy(), done.numpy(), time_out.numpy()
    expected = np.zeros_like(values)
    for n in range(values.shape[1]):
        trace = 0.0
        for t in reversed(range(len(values))):
            paid = reward[t, n] + gamma * values[t, n] * time_out[t, n]
            trace = paid + (1 - done[t, n]) * gamma * (following[t, n] + gae_lambda * trace) - values[t, n]
            expected[t, n] = trace
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("env_id", ISAACGYMENVS)
def test_time_limit_bootstraps_next_step(env_id, monkeypatch):
    """Where environments reset in the next step: bootstrapped from the true last observation, and the step that only
    resets is marked, also where it is the first of a rollout."""
    for rollouts, num_steps in ((1, 240), (80, 3)):
        rollout, truth, agent, *_ = collect(env_id, monkeypatch, rollouts=rollouts, num_steps=num_steps)
        _, done, _, obs = truth.stacked()
        with torch.no_grad():
            np.testing.assert_allclose(rollout.next_values, agent.critic(obs[..., agent.critic_obs]), atol=1e-6)
        assert done[num_steps - 1 :: num_steps][:-1].any() or rollouts == 1, "nothing to get wrong"
        assert not rollout.resetting[0].any() and torch.equal(rollout.resetting[1:], done[:-1])


@pytest.mark.parametrize("env_id", LEGGED + ISAACGYMENVS)
def test_episodes(env_id, monkeypatch):
    """Returns and lengths are those of the episodes that ended, without the steps that only reset; where such a step is
    done once more, it was no episode."""
    rollout, truth, *_, envs = collect(env_id, monkeypatch)
    reward, done, *_ = truth.stacked()
    expected = []
    for n in range(reward.shape[1]):
        total, length = 0.0, 0
        for t in range(len(reward)):
            if not rollout.resetting[t, n]:
                total, length = total + reward[t, n].item(), length + 1
                if done[t, n]:
                    expected.append((total, length))
                    total, length = 0.0, 0
    assert (done & rollout.resetting).any() == (env_id == "isaacgymenvs:Anymal"), "nothing to get wrong"
    episodes, _ = envs.pop()
    np.testing.assert_allclose(sorted(map(tuple, episodes)), sorted(expected), atol=1e-4)
    assert len(expected) > 0 and envs.broken_episodes == 0


def test_terms_of_the_task(monkeypatch):
    """The task's own terms are means over the episodes that were reset: one that was left to lie since the last reset
    is not counted again."""
    envs, agent = make(small_args(env_id="pointmass", num_envs=16))
    envs.reset(True)
    ended, reset_idx = [], envs.env.reset_idx

    def noted(indexes):
        reset_idx(indexes)
        if len(indexes):
            ended.append((len(indexes), envs.env.extras["episode"]["rew_near"].item()))

    monkeypatch.setattr(envs.env, "reset_idx", noted)
    nfpo.collect_rollout(agent, envs, agent.act, small_args(num_steps=150))
    counts, terms = zip(*ended)
    assert len(ended) < 140, "nothing to get wrong"
    means = envs.pop()[1]
    assert means["episode/rew_near"] == pytest.approx(np.average(terms, weights=counts), rel=1e-5)
    assert means["episode/max_command_x"] == 1.0  # a plain number, not a tensor
    *_, envs = collect("isaacgymenvs:Cartpole", monkeypatch, rollouts=1)
    assert envs.pop()[1]["episode/distance"] > 0


def test_random_initial_steps():
    """The first episodes end at different times with it, and together without."""
    ends = []
    for random in (True, False):
        args = small_args(env_id="pointmass", num_envs=64, num_steps=61)
        envs, agent = make(args)
        envs.reset(random)
        done = nfpo.collect_rollout(agent, envs, agent.act, args)[NAMES.index("done")]
        ends.append(done.any(1).sum().item())
    assert ends[0] > 20 and ends[1] == 1


@pytest.mark.parametrize("env_id", ["pointmass", "isaacgymenvs:Pointmass"])
def test_seed_reaches_the_environment(env_id):
    """`make_env` takes its seed from the task's configuration, and IsaacGymEnvs' `make` takes it nowhere."""
    found = []
    for seed in (1, 1, 2):
        envs = nfpo.make_envs(small_args(env_id=env_id), 4, seed)
        envs.reset(False)
        found.append(envs.obs)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Watch(TorchDispatchMode):
    """Notes operations that make the host wait for the device, outside of the environment's own step."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "item", "unique2")

    def __init__(self):
        super().__init__()
        self.found, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            if func.overloadpacket.__name__ in self.waits:
                self.found.append(str(func))
            indexes = args[1] if "index" in str(func) and len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
            if any(torch.is_tensor(x) and x.dtype == torch.bool for x in indexes):
                self.found.append(f"{func} with a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("env_id", LEGGED + ISAACGYMENVS)
def test_rollout_does_not_wait_for_the_device(env_id, monkeypatch):
    """No number travels to the host within a rollout, but for what the environment does itself."""
    args = small_args(env_id=env_id, normalize_obs=True, num_steps=100)
    envs, agent = make(args)
    envs.reset(True)
    watch, step = Watch(), envs.env.step

    def paused(actions):
        watch.paused = True
        result = step(actions)
        watch.paused = False
        return result

    monkeypatch.setattr(envs.env, "step", paused)
    with watch:
        nfpo.collect_rollout(agent, envs, agent.act, args)
        assert watch.found == []
        envs.obs.sum().item()  # and the watch notices one
        envs.obs[envs.obs > 0]
    assert len(watch.found) >= 2


def test_normalized_observations(monkeypatch):
    """What is stored has been normalized by the statistics of the stream so far, which stay float64 and exact."""
    rollout, truth, agent, first_obs, envs = collect("cartpole", monkeypatch, rollouts=1, normalize_obs=True)
    stream = torch.cat((first_obs[None], truth.stacked()[3][:-1])).double()
    stats = agent.obs_stats
    assert stats.count.item() == pytest.approx(64 * 60, abs=1e-3) and stats.mean.dtype == torch.float64
    np.testing.assert_allclose(stats.mean, stream.flatten(0, 1).mean(0), atol=1e-6)
    np.testing.assert_allclose(stats.var, stream.flatten(0, 1).var(0, unbiased=False), atol=1e-6)
    expected = ((stream[-1] - stats.mean) / (stats.var + 1e-8).sqrt()).clamp(-10, 10)
    np.testing.assert_allclose(rollout.obs[-1], expected, atol=1e-4)
    plain = nfpo.Agent(small_args(), nfpo.FlowPolicy, *envs.sizes)
    assert torch.equal(plain.normalize(first_obs), first_obs)


def test_reward_scale(monkeypatch):
    """It scales what is trained on, and not the returns that are logged."""
    plain, *_, envs = collect("pointmass", monkeypatch)
    scaled, *_, other = collect("pointmass", monkeypatch, reward_scale=0.01)
    np.testing.assert_allclose(scaled.rewards, 0.01 * plain.rewards, rtol=1e-5)
    assert envs.pop() == other.pop()
