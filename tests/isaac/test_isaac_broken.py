"""Promise: a simulation whose numbers break ends its own episode, says so by its number, and training goes on."""

import pytest
import torch

import nfpo_isaacgym as nfpo

from .conftest import make, small_args

NAMES = "obs actions log_probs rewards values next_values terminated done resetting".split()
TASKS = ("cartpole", "pointmass", "isaacgymenvs:Cartpole", "isaacgymenvs:Pointmass")
WHO, WHEN = 3, 5  # the environment that breaks, and the step


def break_once(env, monkeypatch, what, value, when=WHEN):
    """Let the simulator hand out one bad number, and note the observations that it ought to have handed out."""
    step, calls, seen = env.step, [], []

    def broken(actions):
        result = list(step(actions))
        obs = result[0]["obs"] if isinstance(result[0], dict) else result[0]
        seen.append(obs.clone())
        if len(calls) == when:
            reward = result[1] if isinstance(result[0], dict) else result[2]
            privileged = result[0].get("states") if isinstance(result[0], dict) else result[1]
            {"obs": obs, "reward": reward[:, None], "privileged": privileged}[what][WHO, -1] = value
        calls.append(1)
        return tuple(result)

    monkeypatch.setattr(env, "step", broken)
    return seen


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e20])
@pytest.mark.parametrize(
    "env_id, what",
    [*((env_id, what) for env_id in TASKS for what in ("obs", "reward"))]
    + [(env_id, "privileged") for env_id in TASKS[::2]],
)
def test_one_bad_number(env_id, what, value, monkeypatch, capsys):
    """The step pays nothing and ends its episode like a time limit; the next one only resets; the others go on."""
    args = small_args(env_id=env_id, num_steps=20, normalize_obs=True)
    envs, agent = make(args)
    envs.reset(random_initial_steps=False)
    seen = break_once(envs.env, monkeypatch, what, value)
    raw, step = [envs.obs.clone()], envs.step
    monkeypatch.setattr(envs, "step", lambda action: (step(action), raw.append(envs.obs.clone()))[0])
    rollout = dict(zip(NAMES, nfpo.collect_rollout(agent, envs, agent.act, args)))
    assert all(x.isfinite().all() for x in rollout.values())
    assert all(x.isfinite().all() and x.abs().max() < 1e3 for x in agent.obs_stats.buffers())

    mine = {name: rollout[name][:, WHO] for name in NAMES}
    assert mine["rewards"][WHEN] == 0 and mine["done"][WHEN] and not mine["terminated"][WHEN]
    assert torch.equal(raw[WHEN + 1][WHO], raw[WHEN][WHO])  # the last good observation stays
    # Bootstrapped from it; the statistics have seen two more batches in between.
    assert mine["next_values"][WHEN] == pytest.approx(mine["values"][WHEN].item(), abs=0.2)
    assert mine["resetting"].nonzero().flatten()[0] == WHEN + 1 and mine["rewards"][WHEN + 1] == 0
    num_obs = envs.sizes[0]
    assert torch.equal(raw[WHEN + 2][WHO, :num_obs], seen[WHEN + 1][WHO])  # the new episode's first
    assert not torch.equal(raw[WHEN + 2][WHO], raw[WHEN + 1][WHO])
    steps = envs.env.progress_buf if hasattr(envs.env, "progress_buf") else envs.env.episode_length_buf
    assert steps[WHO] < 20 - WHEN  # it was really reset
    for n in (0, 7):
        assert torch.equal(raw[WHEN + 1][n, :num_obs], seen[WHEN][n])
        assert mine["rewards"][WHEN] == 0 and rollout["rewards"][WHEN, n] != 0

    episodes, _ = envs.pop()
    assert envs.broken_episodes == 1 and [6.0] == [length for _, length in episodes if length <= WHEN + 1]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "broken" in line]
    assert env_id in line and f"[{WHO}]" in line
    assert envs.pop.__self__.broken.sum() == 0


@pytest.mark.parametrize("env_id", ["cartpole", "isaacgymenvs:Cartpole"])
def test_training_goes_on(env_id, tmp_path, monkeypatch):
    """A state that is NaN until its reset is one broken episode in the log, and the networks stay finite."""
    envs = []
    right = nfpo.make_envs

    def noted(*args):
        envs.append(right(*args))
        step, calls = envs[0].env.step, []

        def broken(actions):
            calls.append(1)
            if len(calls) == 9:
                envs[0].env.physics.state[WHO] = float("nan")
            return step(actions)

        monkeypatch.setattr(envs[0].env, "step", broken)
        return envs[0]

    monkeypatch.setattr(nfpo, "make_envs", noted)
    args = small_args(env_id=env_id, runs_dir=str(tmp_path), total_timesteps=48 * 5, normalize_obs=True)
    metrics = nfpo.train(args)
    assert metrics["charts/broken_episodes"] == 1 and envs[0].env.physics.state.isfinite().all()
    state = nfpo.load_checkpoint(metrics["run_dir"])
    assert state["global_step"] == 240 and all(x.isfinite().all() for x in state["agent"].values())
    assert all(value == value for value in metrics.values())  # no NaN in the log, the task's own terms included


def test_everything_broken(cli, tmp_path, monkeypatch):
    """A simulator that gives NaN for ever ends the run with status 3 and one line that names the simulation; the
    checkpoint before it is kept."""
    import legged_gym.envs

    step, calls = legged_gym.envs.CartPoleTask.step, []

    def broken(self, actions):
        calls.append(1)
        result = step(self, actions)
        if len(calls) > 10:
            self.obs_buf[:] = float("nan")
        return result

    monkeypatch.setattr(legged_gym.envs.CartPoleTask, "step", broken)
    flags = "--device cpu --no-compile --num-envs 8 --num-steps 6 --num-minibatches 2 --hidden-dim 8"
    status, _, err = cli("--env-id cartpole", flags, "--total-timesteps 480")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 3 and "simulation of every environment is broken" in line
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert nfpo.load_checkpoint(run_dir)["global_step"] == 48


def test_parameters_that_break(cli, tmp_path, monkeypatch):
    """What a hyperparameter did is said to be the parameters', and the last checkpoint is finite."""
    right = nfpo.ppo_gradient

    def overflow(*args):
        gradient, stats = right(*args)
        return gradient * float("inf"), stats

    flags = "--device cpu --no-compile --num-envs 8 --num-steps 6 --num-minibatches 2 --hidden-dim 8"
    monkeypatch.setattr(nfpo, "ppo_gradient", overflow)
    status, _, err = cli("--env-id cartpole", flags, "--total-timesteps 480")
    assert status == 3 and "parameters" in err and "not finite" in err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert not (run_dir / "checkpoint.pt").exists()  # none of the broken ones was saved
