"""Promise: TensorBoard always, Weights & Biases on request and offline if need be, under CleanRL's names."""

import re
import struct
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import SMALL, run, run_folders, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_continuous_action as nfpo

CLEANRL = """charts/episodic_return charts/episodic_length charts/learning_rate charts/SPS losses/value_loss
    losses/policy_loss losses/entropy losses/old_approx_kl losses/approx_kl losses/clipfrac
    losses/explained_variance""".split()
FLOW = ["flow/log_det", "flow/scale_abs_mean", "flow/scale_saturation"]
OURS = ["losses/grad_norm", "charts/broken_episodes"]


def test_metric_names(hopper_run, gaussian_run):
    """Scalars have CleanRL's names; the flow adds its own, the Gaussian twin none."""
    assert scalars(hopper_run).keys() == {*CLEANRL, *OURS, *FLOW}
    assert scalars(gaussian_run).keys() == {*CLEANRL, *OURS}


def test_steps(hopper_run):
    """Each iteration is logged once, at the step it ends at, and so are the episodes that ended in it."""
    points = scalars(hopper_run)
    for name in {*CLEANRL, *OURS, *FLOW} - {"charts/episodic_return", "charts/episodic_length"}:
        assert [step for step, _ in points[name]] == [64, 128], name
    assert {step for step, _ in points["charts/episodic_return"]} == {64, 128}
    played = sum(length for _, length in points["charts/episodic_length"])
    assert 128 / 2 < played <= 128, "the rest is in episodes that had not ended"


def test_learning_rate_is_annealed(hopper_run):
    """The learning rate falls linearly from its first value to 0, which the iteration after the last would have."""
    assert scalars(hopper_run)["charts/learning_rate"] == [(64, pytest.approx(3e-4)), (128, pytest.approx(1.5e-4))]


def test_arguments(hopper_run):
    """TensorBoard shows every argument."""
    events = EventAccumulator(str(hopper_run)).Reload()
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "|num_steps|32|" in table
    assert all(f"|{name}|" in table for name in vars(nfpo.Args()))


def test_run_name(cli):
    """A run is called <env_id>__<exp_name>__<seed>__<unix time>, / and : turned into -."""
    before = int(time.time())
    cli(*SMALL, "--env-id", "tests.envs:Target-v0", "--exp-name", "a/b", "--seed", 7)
    name = run_folders(cli.folder)[0].name
    match = re.fullmatch(r"tests\.envs-Target-v0__a-b__7__(\d+)", name)
    assert match and before <= int(match[1]) <= time.time() + 1, name


def test_entropy_is_that_of_the_policy_that_acted(train_small):
    """Noise on the stored actions, which comes after the rollout, does not show in it."""
    first = [scalars(train_small("Hopper-v4", action_noise=noise))["losses/entropy"][0] for noise in (0.0, 2.0)]
    assert first[0] == first[1]


def records(file: Path):
    """The records of a W&B run's own file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = file.read_bytes(), 7, []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no record's head fits into the rest of a block
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


def test_wandb_offline(tmp_path):
    """--track needs neither account nor network, mirrors each iteration once, and does not find its own copies."""
    variables = {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path),
        "WANDB_API_KEY": "",
        "https_proxy": "http://127.0.0.1:9",  # whoever calls home fails
    }
    flags = "--env-id", "Hopper-v4", "--track", "--total-timesteps", 640
    ended = run(*SMALL, *flags, cwd=tmp_path, **variables)
    assert ended.status == 0, ended.err
    (run_dir,) = run_folders(tmp_path)
    assert {file.name.split(".")[0] for file in run_dir.iterdir()} == {"events", "checkpoint", ""}, (
        "W&B's lie elsewhere"
    )
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert run_dir.name in log.name
    kinds, metrics = Counter(), Counter()
    for record in records(log):
        kinds[record.WhichOneof("record_type")] += 1
        metrics.update(item.key or "/".join(item.nested_key) for item in record.history.item)
    print(kinds, metrics)
    assert {name: metrics[name] for name in (*CLEANRL, *OURS, *FLOW)} == dict.fromkeys((*CLEANRL, *OURS, *FLOW), 10)
    assert kinds["history"] == 10 and kinds["tbrecord"] == 1 and kinds.total() < 100
    assert sum(file.stat().st_size for file in (tmp_path / "wandb").rglob("*") if file.is_file()) < 1_000_000
    for name, points in scalars(run_dir).items():
        assert len({step for step, _ in points}) == 10, name
