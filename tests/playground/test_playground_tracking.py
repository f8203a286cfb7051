"""Promise: each number is logged once per iteration, under the names that dashboards read, and no log grows by itself."""

from pathlib import Path

import numpy as np

import nfpo_playground_jax as nfpo
from playground.conftest import FLAGS, finish, run_folder, scalars, small_args, start


def test_metrics_keep_their_names(lane_run):
    """What dashboards read is there, once per iteration."""
    points = scalars(lane_run)
    names = "charts/SPS charts/learning_rate charts/episodes charts/broken_episodes losses/policy_loss"
    names += " losses/value_loss losses/entropy losses/approx_kl losses/old_approx_kl losses/clipfrac losses/grad_norm"
    names += " losses/explained_variance flow/log_det flow/scale_abs_mean flow/scale_saturation flow/base_std"
    for name in names.split():
        assert [step for step, _ in points[name]] == [32, 64], name
    assert all(np.isfinite(value) for values in points.values() for _, value in values)
    assert points["flow/base_std"][0][1] == 1


def test_terms_of_the_task_are_logged(tmp_path):
    """The environment's own metrics appear as means over episodes, and the last episodes' return is handed out."""
    args = small_args(num_envs=8, num_steps=32, total_timesteps=256, runs_dir=str(tmp_path))
    metrics = nfpo.train(args)
    points = scalars(Path(metrics["run_dir"]))
    (step, speed), *_ = points["episode/speed"]
    assert step == 256 and 0 < speed < 20
    assert points["charts/episodic_length"][0][1] == 20
    assert metrics["episodic_return"] == points["charts/episodic_return"][0][1]


def test_run_folder(lane_run):
    """Events and checkpoint are where tools look for them, in a folder that says what was run."""
    assert {path.name.split(".")[0] or path.name for path in lane_run.iterdir()} == {"checkpoint", "events", ".lock-0"}
    assert lane_run.name.startswith("tests.playground.envs-Lane__nfpo_playground_jax__1__")


def test_weights_and_biases_log_every_step_once(tmp_path):
    """The offline run holds each iteration once, and its files are no larger than the run: no copy is found again."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    finish(start(*FLAGS, "--total-timesteps", 32 * 20, "--track", cwd=tmp_path, WANDB_MODE="offline"))
    run_dir = run_folder(tmp_path)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert not list(run_dir.glob("**/*.wandb")), "inside the log folder it would be found again and again"
    store, steps, num_records = DataStore(), [], 0
    store.open_for_scan(str(log))
    while data := store.scan_data():
        num_records += 1
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "losses/value_loss" in items:
            steps.append(int(items["global_step"]))
    assert steps == list(range(32, 32 * 21, 32))
    assert num_records < 100
    copies = [path for path in (tmp_path / "wandb").rglob("*tfevents*") if not path.is_symlink()]
    assert len(copies) <= 1 and max(len(str(path.relative_to(tmp_path))) for path in tmp_path.rglob("*")) < 250
    assert sum(path.stat().st_size for path in (tmp_path / "wandb").rglob("*") if path.is_file()) < 1_000_000
