"""Promise: training, resuming, evaluating and exporting work as in the reference, and bad input gets one line."""

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from shac_rewarped import GaussianPolicy

from rfo.conftest import ROOT, SMALL, cli, make, rfo, run, scalars, small_args  # noqa: F401  (a fixture)

TWIN = {"past_coef": 0.0, "uniform_coef": 0.0}


def test_logs(tmp_path):
    """What a reader looks for, at every iteration."""
    metrics = rfo.train(small_args(runs_dir=str(tmp_path), env_kwargs={"episode_length": 5}))
    logged = scalars(metrics["run_dir"])
    assert [step for step, _ in logged["losses/actor_loss"]] == [32, 64, 96]
    assert {"losses/value_loss", "losses/grad_norm", "flow/saturation", "charts/SPS", "charts/reward"} <= set(logged)
    assert "losses/flow_matching_past" in logged and {value for _, value in logged["charts/episodic_length"]} == {5.0}
    assert metrics["global_step"] == 96 and np.isfinite(metrics["episodic_return"])


@pytest.mark.parametrize("policy_class, flags", [(rfo.FlowPolicy, {}), (GaussianPolicy, TWIN)])
def test_resumed_is_never_stopped(tmp_path, policy_class, flags):
    """Where the simulator carries nothing from rollout to rollout, a resumed run ends bit for bit as one that was never
    stopped: parameters, statistics, optimizers, noise and the rollouts that flow matching remembers."""
    args = small_args(env_id="rfo_envs:Fixed", total_timesteps=160, checkpoint_interval=1, **flags)
    rates = {"final_learning_rate": args.learning_rate}  # the schedule of the shorter run is another one
    whole = rfo.train(dataclasses.replace(args, runs_dir=str(tmp_path / "a"), seed=2, **rates), policy_class)["run_dir"]
    short = dataclasses.replace(args, runs_dir=str(tmp_path / "b"), seed=2, total_timesteps=96, **rates)
    cut = rfo.train(short, policy_class)["run_dir"]
    assert rfo.train(dataclasses.replace(short, total_timesteps=160, resume=cut), policy_class)["run_dir"] == cut
    first, second = (torch.load(f"{folder}/checkpoint.pt", weights_only=True) for folder in (whole, cut))
    for key in ("agent", "actor", "critic", "random", "past", "global_step", "dropped"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
    steps = [step for step, _ in scalars(cut)["losses/actor_loss"]]
    assert steps == [32, 64, 96, 128, 160]


def test_rollout_without_a_finite_gradient_is_dropped(tmp_path, capsys):
    """No parameter moves, it is counted, and training goes on."""
    args = small_args(env_id="rfo_envs:Explodes", runs_dir=str(tmp_path), checkpoint_interval=1, total_timesteps=64)
    metrics = rfo.train(args)
    assert metrics["charts/dropped_rollouts"] == 1 and "rollout 1 is not finite" in capsys.readouterr().out
    after = rfo.load_checkpoint(metrics["run_dir"])["agent"]
    one = rfo.train(dataclasses.replace(args, total_timesteps=32, runs_dir=str(tmp_path / "one")))
    # The learning rate of the only iteration is the same, since it starts at `learning_rate`.
    torch.testing.assert_close(rfo.load_checkpoint(one["run_dir"])["agent"], after, rtol=0, atol=0)
    longer = rfo.train(dataclasses.replace(args, total_timesteps=128, runs_dir=str(tmp_path / "more")))
    assert longer["charts/dropped_rollouts"] == 1
    assert all(x.isfinite().all() for x in rfo.load_checkpoint(longer["run_dir"])["agent"].values())


def test_learns_a_linear_problem(tmp_path):
    """Twenty rollouts on the double integrator: at least twice as good as before, and better than no action."""
    flags = {"total_timesteps": 20 * 1024, "critic_epochs": 8, "learning_rate": 2e-3, "runs_dir": str(tmp_path)}
    args = small_args(env_kwargs={"episode_length": 32}, num_envs=32, horizon=32, **flags)
    run_dir = rfo.train(args)["run_dir"]
    rewards = [value for _, value in scalars(run_dir)["charts/reward"]]
    envs, _ = make(args)
    torch.manual_seed(0)
    idle = torch.stack([envs.step(torch.zeros(32, 1))[0] for _ in range(32)]).mean().item()
    assert np.mean(rewards[-3:]) > 0.5 * rewards[0] and np.mean(rewards[-3:]) > 0.6 * idle, (rewards, idle)


def test_cartpole_trains_resumes_evaluates_and_exports(cli, tmp_path):  # noqa: F811
    """The commands of the documentation on a real task."""
    ended = cli("--env-id", "Cartpole", *SMALL, "--action-chunk", "2")
    assert ended.status == 0 and "Play it: python" in ended.out, ended
    (folder,) = (tmp_path / "runs").iterdir()
    assert cli("--resume", folder, "--total-timesteps", 128).status == 0
    assert rfo.load_checkpoint(folder)["global_step"] == 128
    ended = cli("--evaluate", folder, "--eval-episodes", 3, "--export-onnx", "policy.onnx")
    assert ended.status == 0 and "3 episodes, temperature 0: " in ended.out and "Wrote policy.onnx" in ended.out, ended
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx")
    args = rfo.load_checkpoint(folder)["args"]
    agent = rfo.Agent(args, rfo.FlowPolicy, rfo.make_envs(args, 1))
    rfo.load_checkpoint(folder, agent)
    obs = torch.randn(7, 5)
    (actions,) = session.run(["continuous_actions"], {"obs": obs.numpy()})
    assert actions.shape == (7, 2, 1)
    torch.testing.assert_close(torch.from_numpy(actions), agent(obs).detach(), rtol=1e-5, atol=1e-5)


def test_evaluation_plays_the_trained_policy(tmp_path, capsys):
    """One whole episode per environment, undiscounted, the same for the same seed, another for another temperature."""
    args = small_args(env_kwargs={"episode_length": 6}, runs_dir=str(tmp_path), reward_scale=0.1)
    run_dir = rfo.train(args)["run_dir"]
    returns = rfo.evaluate(run_dir, eval_episodes=5)
    assert returns == rfo.evaluate(run_dir, eval_episodes=5) != rfo.evaluate(run_dir, eval_episodes=5, temperature=1.0)
    assert len(returns) == 5 and f"{np.mean(returns):.1f}" in capsys.readouterr().out
    envs, agent = make(args)
    rfo.load_checkpoint(run_dir, agent)
    torch.manual_seed(args.seed)
    envs = rfo.make_envs(args, 5)
    total = sum(envs.step(agent(envs.obs)[:, 0])[0] for _ in range(6))
    torch.testing.assert_close(total.detach(), torch.tensor(returns))


def test_dictionary_observations(tmp_path):
    """Are one vector, in the dictionary's order."""
    envs, _ = make(small_args(env_id="rfo_envs:Dictionary"))
    assert envs.obs.shape == (4, 3)
    torch.testing.assert_close(envs.obs[:, 1], envs.obs[:, 2])
    rfo.train(small_args(env_id="rfo_envs:Dictionary", runs_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--env-id Nothing", "no such class"),
        ("--env-id rfo_envs:Nothing", "no such class"),
        ("--env-id nowhere:Nothing", "No module named 'nowhere'"),
        ('--env-id rfo_envs:Linear --env-kwargs {"gravity":1}', "gravity"),
        ("--evaluate nowhere", "holds no checkpoint"),
        ("--resume nowhere", "holds no checkpoint"),
    ],
)
def test_one_line(cli, flags, said):  # noqa: F811
    """Exit status 2 and one line that says what is wrong; nothing is written."""
    ended = cli(*flags.split(), *SMALL)
    assert ended.status == 2 and said in ended.err and ended.err.startswith("error: ")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--horizon 8 --action-chunk 3", "--action-chunk is 3"),
        ("--num-minibatches 7", "--num-minibatches is 7"),
        ("--total-timesteps 10", "--total-timesteps is 10"),
        ("--gamma 1.5", "less than or equal to 1"),
        ("--export-onnx x.onnx", "--export-onnx needs --evaluate"),
    ],
)
def test_arguments(cli, flags, said):  # noqa: F811
    """What is not allowed is refused by name."""
    ended = cli(*flags.split())
    assert ended.status == 2 and said in " ".join(ended.err.replace("│", " ").split())


def test_wordless_errors_have_a_name(cli, tmp_path):  # noqa: F811
    """An exception without a message still says what it was, and a run of another shape what does not fit."""
    run_dir = rfo.train(small_args(runs_dir=str(tmp_path)))["run_dir"]
    ended = cli("--resume", run_dir, "--action-chunk", 2)
    assert ended.status == 2 and "size mismatch" in ended.err


def test_without_rewarped(tmp_path):
    """One line that says what to install."""
    (tmp_path / "rewarped.py").write_text("raise ImportError(\"No module named 'rewarped'\")\n")
    ended = run("--env-id", "Cartpole", *SMALL, cwd=tmp_path, path=[tmp_path])
    assert ended.status == 2 and "pip install -r requirements/rewarped.txt" in ended.err
    assert (ROOT / "requirements" / "rewarped.txt").exists()


def test_second_process_is_refused(cli, tmp_path):  # noqa: F811
    """Two processes cannot write one run."""
    run_dir = rfo.train(small_args(runs_dir=str(tmp_path)))["run_dir"]
    writer, lock = rfo.open_run(small_args(), rfo.Path(run_dir), 0)
    ended = cli("--resume", run_dir, "--total-timesteps", 128)
    assert ended.status == 2 and ".lock" in ended.err
    lock.release()
    writer.close()
    assert cli("--resume", run_dir, "--total-timesteps", 128).status == 0
