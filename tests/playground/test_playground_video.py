"""Promise: --capture-video films what is played, in real time; where nothing can be drawn it is one line."""

import sys

import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import FLAGS, finish, start


def test_film(tmp_path):
    """An episode is filmed after training, without a display and without settings, and plays in real time."""
    from moviepy import VideoFileClip

    flags = [*FLAGS, "--env-id", "CartpoleBalance", "--total-timesteps", 32, "--capture-video"]
    process = start(*flags, "--config-overrides", '{"episode_length": 100}', cwd=tmp_path, DISPLAY="")
    out = finish(process)
    if "No films" in out:
        assert "MUJOCO_GL=egl" in out and "libegl1" in out
        pytest.skip("no off-screen OpenGL here: `apt-get install libegl1`")
    (film,) = tmp_path.glob("runs/*/videos/step32-temperature0-episode-0.mp4")
    with VideoFileClip(str(film)) as clip:
        assert clip.duration == pytest.approx(1, abs=0.1)  # 100 steps of 10 ms
        first, last = clip.get_frame(0), clip.get_frame(clip.duration - 0.05)
    assert first.std() > 5 and np.abs(first.astype(float) - last).max() > 50


def test_without_opengl_it_is_one_line(lane_run, capsys):
    """What was played is printed, and then one line that says what films need."""
    returns = nfpo.evaluate(lane_run, eval_episodes=1)  # its physics is an array, so that nothing can be drawn
    capsys.readouterr()
    frames = [(np.ones(1, bool), {"qpos": np.zeros((1, 1))})]
    nfpo.film(None, frames, str(lane_run / "videos" / "x"))
    err = capsys.readouterr().err
    assert len(returns) == 1 and len(err.splitlines()) == 1 and "MUJOCO_GL=egl" in err and "libegl1" in err
    assert "moviepy" in sys.modules
