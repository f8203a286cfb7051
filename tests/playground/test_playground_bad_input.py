"""Promise: bad input gets one message that names flag, given and allowed value, and leaves nothing behind."""

import shutil

import pytest
from mujoco_playground import dm_control_suite, registry

from playground.conftest import FLAGS, scalars


def assert_one_line(ended, *words) -> None:
    """Status 2, one line on stderr with all these words."""
    status, _, err = ended
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1, ended
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartpoleBalanc", ["--env-id", "CartpoleBalanc,", "CartpoleBalance"]),
        ("--env-id no_such_module:Env", ["--env-id", "no_such_module"]),
        ("--env-id tests.playground.envs:Lan", ["--env-id", "'Lan' not found"]),
        ("--env-id tests.playground.envs:Images", ["--env-id", "Images", "images"]),
        ("--num-devices 3", ["--num-devices", "3"]),
        ("--num-envs 5 --num-minibatches 1 --num-devices 2", ["--num-devices", "2", "5"]),
        ('--config-overrides {"no_such_key":1}', ["--env-id", "no_such_key"]),
        ("--domain-randomization", ["--domain-randomization", "Lane"]),
        ("--resume nowhere", ["nowhere", "holds no whole checkpoint"]),
        ("--evaluate nowhere", ["nowhere", "holds no whole checkpoint"]),
        ("--resume=", ["''", "holds no whole checkpoint"]),  # a variable of the shell that is not set
    ],
)
def test_one_line(flags, words, cli, tmp_path):
    """What the environment, the machine or the disk decides is one line, before anything is written."""
    assert_one_line(cli(*FLAGS, *flags.split()), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-minibatches 3", ["--num-minibatches", "3", "32"]),
        ("--num-minibatches 32", ["--num-minibatches", "32", "two samples"]),
        ("--total-timesteps 31", ["--total-timesteps", "31", "32"]),
        ("--num-envs 0", ["num-envs", "greater than 0"]),
        ("--critic-hidden-dims 0", ["critic-hidden-dims", "greater than 0"]),
        ("--scale-bound nan", ["scale-bound", "finite"]),
        ("--gamma 1.1", ["gamma", "less than or equal to 1"]),
        ("--seed 2147483648", ["seed", "less than 2147483648"]),
        ("--config-overrides [1]", ["config-overrides", "dictionary"]),
        ("--config-overrides {", ["config-overrides"]),
        ("--no-such-flag 1", ["--no-such-flag"]),
        ("--export-onnx a.onnx", ["--export-onnx", "--evaluate"]),
    ],
)
def test_flags(flags, words, cli, tmp_path):
    """tyro prints what a flag's type or two flags together do not allow, in its own frame."""
    status, out, err = cli(*FLAGS, *flags.split())
    said = " ".join((out + err).replace("│", " ").split())
    assert status == 2 and "Traceback" not in said, said
    for word in words:
        assert word.replace("-", "_") in said or word in said, (word, said)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_runs_dir(cli, tmp_path):
    """An output folder that cannot be made is named, here one below a regular file."""
    (tmp_path / "file").write_text("")
    assert_one_line(cli(*FLAGS, "--runs-dir", "file/runs"), "file/runs")


def test_missing_meshes_are_one_line(cli, monkeypatch):
    """Where the robots' meshes cannot be cloned, whoever asked for a robot gets one line."""

    def clone(*_, **__):
        raise FileNotFoundError("no network here")

    monkeypatch.setattr(registry.locomotion.mjx_env, "ensure_menagerie_exists", clone)
    assert_one_line(cli("--env-id", "Go1JoystickFlatTerrain"), "--env-id", "Go1Joystick", "no network here")


def test_an_error_without_a_message_is_named_by_its_type(cli, monkeypatch):
    """An assertion of an environment often says nothing."""

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(dm_control_suite, "load", fail)
    assert_one_line(cli(*FLAGS), "tests.playground.envs:Lane", "AssertionError")


def test_damaged_checkpoints(cli, lane_run, tmp_path):
    """A file of arguments or arrays that was cut short is named."""
    for pattern in ("checkpoint/*/state/metadata", "checkpoint/*/arrays/manifest.ocdbt"):
        damaged = shutil.copytree(lane_run, tmp_path / pattern.split("/")[2])
        for file in damaged.glob(pattern):
            file.write_text("{")
        assert_one_line(cli("--evaluate", damaged), damaged, "holds no whole checkpoint")


def test_resuming_a_run_that_is_done_does_nothing(cli, lane_run, tmp_path):
    """It says where the run is, which stays as it was."""
    run_dir = shutil.copytree(lane_run, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoint/**/*")}
    status, out, err = cli("--resume", run_dir)
    assert status == 0 and str(run_dir) in out, err
    assert {path: path.stat().st_mtime_ns for path in run_dir.glob("checkpoint/**/*")} == before
    assert scalars(run_dir) == scalars(lane_run)
