"""Promise: a rollout holds what happened, whatever habits the simulator's packages have."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nfpo_isaacgym as nfpo

from .conftest import make_collector, make_networks, small_args

LEGGED = ("cartpole", "pointmass")
ISAACGYMENVS = ("isaacgymenvs:Cartpole", "isaacgymenvs:Pointmass", "isaacgymenvs:Anymal")


class Truth:
    """Notes about every step of a stand-in's task, taken from its own state and not from what it hands out."""

    def __init__(self, env, monkeypatch):
        self.reward, self.done, self.time_out, self.obs, self.critic_obs, self.stale = [], [], [], [], [], 0
        step = env.step

        def noted(actions):
            resets = env.reset_buf.bool().clone() if hasattr(env, "progress_buf") else None
            result = step(actions)
            self.reward.append(env.rew_buf.clone())
            self.done.append(env.reset_buf.bool().clone())
            infos = result[-1]
            if resets is None:
                self.time_out.append(env.time_out_buf & env.reset_buf.bool())
                self.stale += int((infos.get("time_outs", self.done[-1]) & ~self.done[-1]).sum())
                privileged = env.privileged_obs_buf
            else:
                self.time_out.append((env.progress_buf >= env.max_episode_length - 1) & self.done[-1])
                privileged = env.states_buf if env.num_states else None
            self.obs.append(env.obs_buf.clone())
            self.critic_obs.append((env.obs_buf if privileged is None else privileged).clone())
            return result

        monkeypatch.setattr(env, "step", noted)

    def stacked(self):
        return [torch.stack(x) for x in (self.reward, self.done, self.time_out, self.obs, self.critic_obs)]


def collect(env_id, monkeypatch, rollouts=4, num_steps=60, num_envs=64, **flags):
    """Several rollouts as one, and the truth about them."""
    args = small_args(env_id=env_id, num_steps=num_steps, num_envs=num_envs, **flags)
    collector = make_collector(args)
    policy, critic = make_networks(collector)
    first_obs = collector.obs.clone()
    truth = Truth(collector.envs.env, monkeypatch)
    parts = [nfpo.collect_rollout(collector, policy.sample, critic, num_steps) for _ in range(rollouts)]
    joined = nfpo.Rollout(*(torch.cat([part[i] for part in parts]) for i in range(len(nfpo.Rollout._fields))))
    return joined, truth, critic, first_obs, collector


@pytest.mark.parametrize("env_id", LEGGED + ISAACGYMENVS)
def test_rollout_is_what_happened(env_id, monkeypatch):
    """Observations, rewards and ends are those of their own step, though the environment overwrites all of them."""
    rollout, truth, _, first_obs, collector = collect(env_id, monkeypatch)
    reward, done, time_out, obs, critic_obs = truth.stacked()
    assert done.any() and time_out.any() and (truth.stale > 0 or env_id != "pointmass"), "nothing to get wrong"
    assert torch.equal(rollout.rewards, reward)
    assert torch.equal(rollout.done, done)
    assert torch.equal(rollout.terminated, done & ~time_out)
    assert torch.equal(rollout.obs[0], first_obs) and torch.equal(rollout.obs[1:], obs[:-1])
    assert torch.equal(rollout.critic_obs[1:], critic_obs[:-1])
    assert rollout.critic_obs.shape[-1] == (collector.envs.critic_obs_dim or collector.envs.obs_dim)


@pytest.mark.parametrize("env_id", LEGGED)
def test_time_limit_bootstraps_within_step(env_id, monkeypatch):
    """Where environments reset within the step: advantages as by rsl_rl's rule, reward + gamma V(s_t) at a time-out and
    a trace cut at every end, in plain loops."""
    rollout, truth, critic, *_ = collect(env_id, monkeypatch, rollouts=1, num_steps=240)
    reward, done, time_out, obs, critic_obs = (x.double().numpy() for x in truth.stacked())
    with torch.no_grad():
        values = critic(rollout.critic_obs).double().numpy()
        last = critic(torch.from_numpy(critic_obs[-1]).float()).double().numpy()
    gamma, gae_lambda = 0.9, 0.8
    advantages = nfpo.compute_gae(
        rollout.rewards, rollout.values, rollout.next_values, rollout.terminated, rollout.done, gamma, gae_lambda
    )
    expected = np.zeros_like(values)
    for n in range(values.shape[1]):
        trace = 0.0
        for t in reversed(range(len(values))):
            following = last[n] if t + 1 == len(values) else values[t + 1, n]
            paid = reward[t, n] + gamma * values[t, n] * time_out[t, n]
            trace = paid + (1 - done[t, n]) * gamma * (following + gae_lambda * trace) - values[t, n]
            expected[t, n] = trace
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("env_id", ISAACGYMENVS)
def test_time_limit_bootstraps_next_step(env_id, monkeypatch):
    """Where environments reset in the next step: bootstrapped from the true last observation, and the step that only
    resets is marked, and is the one whose action was chosen for the old episode."""
    rollout, truth, critic, *_ = collect(env_id, monkeypatch, rollouts=1, num_steps=240)
    _, done, time_out, _, critic_obs = truth.stacked()
    with torch.no_grad():
        np.testing.assert_allclose(rollout.next_values, critic(critic_obs), atol=1e-6)
    assert torch.equal(rollout.terminated, done & ~time_out)
    assert not rollout.resetting[0].any() and torch.equal(rollout.resetting[1:], done[:-1])


def test_resetting_crosses_rollouts(monkeypatch):
    """An episode that ends with a rollout is reset in the first step of the next one."""
    rollout, truth, *_ = collect("isaacgymenvs:Cartpole", monkeypatch, rollouts=80, num_steps=3)
    done = truth.stacked()[1]
    assert done[2::3].any() and torch.equal(rollout.resetting[1:], done[:-1])


@pytest.mark.parametrize("env_id", LEGGED + ISAACGYMENVS)
def test_episode_means(env_id, monkeypatch):
    """Returns and lengths are those of the episodes that ended, without the steps that only reset; where such a step is
    done once more, it was no episode."""
    rollout, truth, *_, collector = collect(env_id, monkeypatch)
    reward, done, _, _, _ = truth.stacked()
    returns, lengths = [], []
    for n in range(reward.shape[1]):
        total, length = 0.0, 0
        for t in range(len(reward)):
            if not rollout.resetting[t, n]:
                total, length = total + reward[t, n].item(), length + 1
            if done[t, n] and not rollout.resetting[t, n]:
                returns.append(total)
                lengths.append(length)
                total, length = 0.0, 0
    assert (done & rollout.resetting).any() == (env_id == "isaacgymenvs:Anymal"), "nothing to get wrong"
    episodes, means = collector.means.pop()
    assert episodes == len(returns) > 0 and min(lengths) > 0
    np.testing.assert_allclose(means["charts/episodic_return"], np.mean(returns), rtol=1e-4)
    np.testing.assert_allclose(means["charts/episodic_length"], np.mean(lengths), rtol=1e-4)
    assert collector.means.pop() == (0, {})


def test_environment_terms_are_not_stale():
    """The environment's own terms are weighted by the episodes that they are means of, and by none where none ended."""
    means = nfpo.EpisodeMeans()
    for count, value in ((2, 1.0), (0, 1.0), (0, 1.0), (1, 4.0)):  # written in a reset, then left to lie
        means.add(torch.tensor(count), {"episode/rew": torch.tensor(value) * count, "episode/float": 0.5 * count})
    assert means.pop()[1] == {"episode/rew": 2.0, "episode/float": 0.5}


@pytest.mark.parametrize("env_id, name", [("cartpole", "rew_alive"), ("isaacgymenvs:Cartpole", "distance")])
def test_environment_terms_are_logged(env_id, name, monkeypatch):
    *_, collector = collect(env_id, monkeypatch)
    assert collector.means.pop()[1]["episode/" + name] > 0


def test_random_initial_steps():
    """The first episodes end at different times with it, and together without."""
    ends = []
    for random in (True, False):
        args = small_args(env_id="pointmass", num_envs=64, random_initial_steps=random, num_steps=61)
        collector = make_collector(args)
        policy, critic = make_networks(collector)
        done = nfpo.collect_rollout(collector, policy.sample, critic, 61).done
        ends.append(done.any(1).sum().item())
    assert ends[0] > 20 and ends[1] == 1


def test_seed_reaches_the_environment():
    """`make_env` takes its seed from the task's configuration, not from where the script is called."""
    first, again, other = (nfpo.make_envs("pointmass", 4, seed, "cpu").reset()[0].clone() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    nfpo.import_simulator("isaacgymenvs:Pointmass")
    first, again, other = (
        nfpo.make_envs("isaacgymenvs:Pointmass", 4, seed, "cpu").reset()[0].clone() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


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
@pytest.mark.parametrize("normalize_obs", [False, True])
def test_rollout_does_not_wait_for_the_device(env_id, normalize_obs, monkeypatch):
    """No number travels to the host within a rollout, but for what the environment does itself."""
    args = small_args(env_id=env_id, normalize_obs=normalize_obs)
    collector = make_collector(args)
    policy, critic = make_networks(collector)
    watch, step = Watch(), collector.envs.env.step

    def paused(actions):
        watch.paused = True
        result = step(actions)
        watch.paused = False
        return result

    monkeypatch.setattr(collector.envs.env, "step", paused)
    with watch:
        nfpo.collect_rollout(collector, policy.sample, critic, 100)
        assert watch.found == []
        collector.obs.sum().item()  # and the watch notices one
        collector.obs[collector.obs > 0]
    assert len(watch.found) >= 2


def test_normalized_observations():
    """The policy sees the stream with zero mean and unit variance, and the critic its own."""
    args = small_args(normalize_obs=True, num_envs=64, num_steps=50)
    collector = make_collector(args)
    policy, critic = make_networks(collector)
    raw, step = [], collector.envs.step

    def noted(action):
        result = step(action)
        raw.append((result.obs.double().clone(), result.critic_obs.double().clone()))
        return result

    before = [x["count"].item() for x in collector.stats()]
    collector.envs.step = noted
    nfpo.collect_rollout(collector, policy.sample, critic, 50)
    for stats, stream, count in zip(collector.all_stats(), zip(*raw), before):
        assert stats.count.item() == pytest.approx(count + 64 * 50)
        stream = torch.cat(stream)
        assert (stats.mean - stream.mean(0)).abs().max() < 0.02
        np.testing.assert_allclose(stats.std[:3], stream.std(0)[:3], rtol=0.1)
    last = raw[-1][0]
    expected = ((last - collector.obs_stats.mean) / collector.obs_stats.std).clamp(-10, 10)
    np.testing.assert_allclose(collector.obs, expected, atol=1e-6)


def test_reward_scale(monkeypatch):
    """It scales what is trained on, and not the returns that are logged."""
    plain, _, *_, collector = collect("pointmass", monkeypatch)
    scaled, _, *_, other = collect("pointmass", monkeypatch, reward_scale=0.01)
    np.testing.assert_allclose(scaled.rewards, 0.01 * plain.rewards, rtol=1e-5)
    assert collector.means.pop() == other.means.pop()


def test_environment_terms_are_of_the_episodes_that_ended(monkeypatch):
    """A term that was left to lie since the last reset is not counted again."""
    collector = make_collector(small_args(env_id="pointmass", num_envs=16))
    policy, critic = make_networks(collector)
    env, ended = collector.envs.env, []
    reset_idx = env.reset_idx

    def noted(indexes):
        reset_idx(indexes)
        if len(indexes):
            ended.append((len(indexes), env.extras["episode"]["rew_near"].item()))

    monkeypatch.setattr(env, "reset_idx", noted)
    nfpo.collect_rollout(collector, policy.sample, critic, 150)
    counts, terms = zip(*ended)
    assert len(ended) < 140  # some steps reset nothing
    expected = np.average(terms, weights=counts)
    np.testing.assert_allclose(collector.means.pop()[1]["episode/rew_near"], expected, rtol=1e-5)
