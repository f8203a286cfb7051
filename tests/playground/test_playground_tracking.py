"""Promise: each number is logged once per iteration, under its usual name, and no log grows by itself."""

import struct
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


def wandb_records(file: Path):
    """The records of a Weights & Biases run: LevelDB's log format, blocks of 32 KiB behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no record's head fits into the rest of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_weights_and_biases_log_every_step_once(tmp_path):
    """The offline run holds each iteration once, and its files are no larger than the run: no copy is found again."""
    variables = {"WANDB_MODE": "offline", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    finish(start(*FLAGS, "--total-timesteps", 32 * 20, "--track", cwd=tmp_path, **variables))
    run_dir = run_folder(tmp_path)
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run_dir.name in log.name
    records = list(wandb_records(log))
    history = [{item.key or "/".join(item.nested_key): item.value_json for item in x.history.item} for x in records]
    steps = [int(x["global_step"]) for x in history if "losses/value_loss" in x]
    assert steps == list(range(32, 32 * 21, 32))
    assert len(records) < 100
    assert not [path for path in run_dir.rglob("*") if "wandb" in path.name], "there it would be found again and again"
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert max(len(str(path.relative_to(tmp_path))) for path in files) < 250
