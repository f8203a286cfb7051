"""Promise: TensorBoard always, Weights & Biases on request and offline if need be, under CleanRL's names."""

import json
import re
import time

import pytest
from conftest import SMALL, run, run_folders, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_continuous_action as nfpo

CLEANRL = """charts/episodic_return charts/episodic_length charts/learning_rate charts/SPS losses/value_loss
    losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac
    losses/explained_variance""".split()
FLOW = ["flow/log_det", "flow/scale_abs_mean", "flow/scale_saturation"]


def test_metric_names(hopper_run, gaussian_run):
    """Scalars have CleanRL's names; the flow adds its own, the Gaussian twin none."""
    assert scalars(hopper_run).keys() >= {*CLEANRL, *FLOW}
    assert scalars(gaussian_run).keys() >= set(CLEANRL)
    assert not any(name.startswith("flow/") for name in scalars(gaussian_run))


def test_steps(hopper_run):
    """Iterations are logged at the steps they end at, episodes at theirs: lengths add up to the steps."""
    points = scalars(hopper_run)
    assert [step for step, _ in points["losses/value_loss"]] == [64, 128]
    ends = [step for step, _ in points["charts/episodic_return"]]
    lengths = [length for _, length in points["charts/episodic_length"]]
    assert len(ends) > 1 and ends == [sum(lengths[: i + 1]) for i in range(len(lengths))]


def test_learning_rate_is_annealed(hopper_run):
    """The learning rate falls linearly from its first value to 0, which the iteration after the last would have."""
    assert scalars(hopper_run)["charts/learning_rate"] == [(64, pytest.approx(3e-4)), (128, pytest.approx(1.5e-4))]


def test_arguments(hopper_run):
    """args.json holds every argument and the policy's class, and TensorBoard shows the arguments too."""
    saved = json.loads((hopper_run / "args.json").read_text())
    assert saved.pop("policy_class") == "FlowPolicy"
    assert nfpo.Args(**saved) == nfpo.Args(
        env_id="Hopper-v4",
        num_steps=64,
        num_minibatches=2,
        update_epochs=1,
        total_timesteps=128,
        compile=False,
        runs_dir=str(hopper_run.parent),
    )
    events = EventAccumulator(str(hopper_run)).Reload()
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|num_steps|64|" in table and all(f"|{name}|" in table for name in saved)


def test_run_name(cli):
    """A run is called <env_id>__<exp_name>__<seed>__<unix time>, / and : turned into -."""
    before = int(time.time())
    cli(*SMALL, "--env-id", "gymnasium.envs.mujoco:Hopper-v5", "--exp-name", "a/b", "--seed", 7)
    name = run_folders(cli.folder)[0].name
    match = re.fullmatch(r"gymnasium\.envs\.mujoco-Hopper-v5__a-b__7__(\d+)", name)
    assert match and before <= int(match[1]) <= time.time() + 1, name


def test_two_runs_at_once(cli, monkeypatch):
    """Runs that start within the same second do not share a folder."""
    start, real = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: 1e9 + (real() - start) / 1e4)  # a second lasts for hours
    for _ in range(2):
        assert cli(*SMALL, "--env-id", "Hopper-v4").status == 0
    assert len(run_folders(cli.folder)) == 2


def test_wandb_offline(tmp_path):
    """--track with WANDB_MODE=offline needs neither account nor network and leaves its run in the run folder."""
    variables = {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
        "https_proxy": "http://127.0.0.1:9",  # whoever calls home fails
    }
    ended = run(*SMALL, "--env-id", "Hopper-v4", "--track", cwd=tmp_path, **variables)
    assert ended.status == 0, ended.err
    run_dir = run_folders(tmp_path)[0]
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert run_dir.name in log.name
    content = log.read_bytes()
    for name in ("charts/episodic_return", "losses/approx_kl", "flow/log_det"):
        assert name.encode() in content, f"{name} was not mirrored"
    assert scalars(run_dir).keys() >= set(CLEANRL)


def test_entropy_is_that_of_the_policy_that_acted(train_small):
    """Noise on the stored actions, which comes after the rollout, does not show in it."""
    first = [scalars(train_small("Hopper-v4", action_noise=noise))["losses/entropy"][0] for noise in (0.0, 2.0)]
    assert first[0] == first[1]
