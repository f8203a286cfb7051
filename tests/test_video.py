"""Promise: --capture-video films where there is GL; where there is none, one line says so and training goes on."""

import ctypes.util
import os

import pytest
from conftest import SMALL, Ended, run, run_folders

FILM = [*SMALL, "--env-id", "InvertedPendulum-v4", "--capture-video"]
needs_egl = pytest.mark.skipif(
    not ctypes.util.find_library("EGL"), reason="no libEGL here: apt-get install libegl1 to film for real"
)


def is_mp4(file) -> bool:
    return file.read_bytes()[4:8] == b"ftyp" and file.stat().st_size > 1000


@needs_egl
def test_films_training_and_evaluation(tmp_path):
    """Training and evaluation leave films of whole episodes in the run's `videos` folder, none replacing another."""
    ended = run(*FILM, cwd=tmp_path, MUJOCO_GL="egl")
    assert ended.status == 0, ended.err
    run_dir = run_folders(tmp_path)[0]
    trained = set((run_dir / "videos").glob("*.mp4"))
    assert trained and all(map(is_mp4, trained))
    ended = run(*("--evaluate", run_dir, "--capture-video", "--eval-episodes", 2), cwd=tmp_path, MUJOCO_GL="egl")
    assert ended.status == 0, ended.err
    evaluated = set((run_dir / "videos").glob("*.mp4")) - trained
    assert len(evaluated) == 2 and all(map(is_mp4, evaluated))


def assert_goes_on(ended: Ended) -> None:
    lines = [line for line in ended.err.splitlines() if "--capture-video" in line]
    assert ended.status == 0 and "Traceback" not in ended.err, ended
    assert len(lines) == 1 and "libegl1" in lines[0] and "without video" in lines[0]


def test_no_display(tmp_path):
    """GLFW without a display costs the film, neither the training nor the evaluation."""
    variables = {"MUJOCO_GL": "glfw", "DISPLAY": "", "WAYLAND_DISPLAY": "", "CUDA_VISIBLE_DEVICES": ""}
    assert_goes_on(run(*FILM, cwd=tmp_path, **variables))
    run_dir = run_folders(tmp_path)[0]
    assert (run_dir / "checkpoint.pt").exists() and not (run_dir / "videos").exists()
    ended = run("--evaluate", run_dir, "--capture-video", "--eval-episodes", 2, cwd=tmp_path, **variables)
    assert_goes_on(ended)
    assert "2 episodes of InvertedPendulum-v4" in ended.out


@pytest.mark.parametrize("backend", ["egl", "", "no_such_backend"], ids=["egl", "unset", "unknown"])
def test_no_gl_library(backend, tmp_path):
    """A machine without libegl1 trains, though with MUJOCO_GL=egl importing MuJoCo itself fails there."""
    for name in ("libEGL.so", "libEGL.so.1", "libEGL.so.0"):  # found before the system's, and not to be loaded
        (tmp_path / name).write_text("no library")
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "DISPLAY": "", "MUJOCO_GL": backend}
    assert_goes_on(run(*FILM, cwd=tmp_path, **variables))
    assert (run_folders(tmp_path)[0] / "checkpoint.pt").exists()


def test_no_gl_library_and_no_film(tmp_path):
    """Whoever films nothing needs no GL, whatever MUJOCO_GL says, and hears nothing about it."""
    ended = run(*FILM[:-1], cwd=tmp_path, MUJOCO_GL="no_such_backend")
    assert ended.status == 0 and "video" not in ended.err, ended


def test_no_moviepy(cli, monkeypatch):
    """Without the film writer one line says so before training starts, and not at the end of an episode."""
    monkeypatch.setitem(__import__("sys").modules, "moviepy", None)
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    ended = cli(*FILM)
    assert ended.status == 0
    lines = [line for line in ended.err.splitlines() if "--capture-video" in line]
    assert len(lines) == 1 and "moviepy" in lines[0]
