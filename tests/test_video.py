"""Promise: --capture-video films the trained policy where there is GL; where there is none, one line says so."""

import ctypes.util

import pytest
from conftest import SMALL, run, run_folders

needs_egl = pytest.mark.skipif(
    not ctypes.util.find_library("EGL"), reason="no libEGL here: apt-get install libegl1 to film for real"
)


def is_mp4(file) -> bool:
    return file.read_bytes()[4:8] == b"ftyp" and file.stat().st_size > 1000


@needs_egl
def test_films_every_episode(tmp_path):
    """After training and at an evaluation: one film per episode, none replacing another, EGL chosen by itself."""
    task = [*SMALL, "--env-id", "InvertedPendulum-v4", "--eval-episodes", 3, "--capture-video"]
    ended = run(*task, cwd=tmp_path, MUJOCO_GL="", DISPLAY="")
    assert ended.status == 0, ended.err
    (run_dir,) = run_folders(tmp_path)
    trained = set((run_dir / "videos").glob("*.mp4"))
    assert len(trained) == 3 and all(map(is_mp4, trained))
    flags = "--evaluate", run_dir, "--capture-video", "--eval-episodes", 2, "--temperature", 1
    ended = run(*flags, cwd=tmp_path, MUJOCO_GL="", DISPLAY="")
    assert ended.status == 0, ended.err
    evaluated = set((run_dir / "videos").glob("*.mp4")) - trained
    assert len(evaluated) == 2 and all(map(is_mp4, evaluated))


def test_no_gl_library(hopper_copy, tmp_path):
    """Without libEGL a film is refused in one line, and nothing is lost: the run was saved before."""
    for name in ("libEGL.so", "libEGL.so.1", "libEGL.so.0"):  # found before the system's, and not to be loaded
        (tmp_path / name).write_text("no library")
    variables = {"LD_LIBRARY_PATH": str(tmp_path), "DISPLAY": "", "MUJOCO_GL": ""}
    ended = run("--evaluate", hopper_copy, "--capture-video", "--eval-episodes", 1, cwd=tmp_path, **variables)
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.status == 2 and len(errors) == 1, ended  # Gymnasium's half a viewer complains as well, when it goes
    assert "Hopper-v4" in errors[0] and "MUJOCO_GL=egl" in errors[0] and "libegl1" in errors[0]
    assert (hopper_copy / "checkpoint.pt").exists()
