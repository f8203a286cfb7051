"""Promise: the boards of Fig. 6 are what their docstrings say, and their numbers measure what they are called."""

import csv
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import SCRIPT, SMALL, TWIN, run, run_folders
from gymnasium.utils.env_checker import check_env

from benchmarks import multimodality
from benchmarks.envs.gridworld import REACH, START, TIME_LIMIT
from benchmarks.multimodality import action_limit, entropy_bits, find_modes, load_run, play, start_density

GRIDWORLD, JUMPWORLD = multimodality.BOARDS


@pytest.fixture(params=[GRIDWORLD, JUMPWORLD], ids=["GridWorld", "JumpWorld"])
def env(request):
    env = gym.make(request.param, render_mode="rgb_array")
    yield env
    env.close()


def walk(env: gym.Env, target: np.ndarray) -> list[tuple]:
    """Go straight from the start towards a position, by half steps, until the episode ends; returns every answer."""
    position, answers = env.reset(seed=0)[0], []
    while not answers or not (answers[-1][2] or answers[-1][3]):
        action = np.clip((target - position) / STEP_SIZE, -0.5, 0.5).astype(np.float32)
        position, *rest = env.step(action)
        answers.append((position, *rest))
    return answers


@pytest.mark.filterwarnings("error")
def test_is_a_gymnasium_environment(env):
    """Gymnasium's own checker finds nothing wrong, and nothing to warn of."""
    check_env(env.unwrapped)


def test_no_goal_is_nearer():
    """All goals are equally far from the start, and turning the board by a quarter gives the same board."""
    distances = np.linalg.norm(GOALS - START, axis=-1)
    assert len(GOALS) == 4 and np.ptp(distances) == 0 and distances.min() > 0
    turned = (GOALS - START) @ np.array([[0, 1], [-1, 0]]) + START
    assert {tuple(goal) for goal in turned} == {tuple(goal) for goal in GOALS}


@pytest.mark.parametrize("goal", range(len(GOALS)))
def test_entering_a_goal_ends_the_episode(env, goal):
    """Reward 1, termination and the goal's index come with the step that enters it, and with no other."""
    *before, (_, reward, terminated, truncated, info) = walk(env, GOALS[goal])
    assert (reward, terminated, truncated, info["goal"]) == (1.0, True, False, goal)
    for _, reward, terminated, truncated, info in before:
        assert (reward, terminated, truncated, info["goal"]) == (0.0, False, False, -1)


def test_walls_and_time_limit(env):
    """In a corner there is no way out of the board and no reward, and the time limit truncates."""
    answers = walk(env, np.array([10.0, 10.0]))
    assert len(answers) == TIME_LIMIT
    position, reward, terminated, truncated, info = answers[-1]
    assert position.tolist() == [HALF, HALF]
    assert (reward, terminated, truncated, info["goal"]) == (0.0, False, True, -1)


def test_actions_are_clipped(env):
    """A longer action than the Box allows moves the point by one step size."""
    env.reset(seed=0)
    assert env.unwrapped.step(np.array([0.0, -7.0]))[0].tolist() == [0.0, -STEP_SIZE]


def test_frame_shows_start_goals_and_point(env):
    """Grey start, green goals and a dot that follows the point, up being up."""
    env.reset(seed=0)
    env.step(np.array([0.25, 0.5], dtype=np.float32))
    frame = env.render().astype(int)
    red, green, blue = frame[..., 0], frame[..., 1], frame[..., 2]
    pixels = len(frame) / (2 * HALF)

    def cells(mask):  # mean position of the pixels of one color
        rows, columns = mask.nonzero()
        return np.array([(columns.mean() + 0.5) / pixels - HALF, HALF - (rows.mean() + 0.5) / pixels])

    assert np.allclose(cells((red > 180) & (green < 100)), env.unwrapped.position, atol=0.05)
    is_green = (green > red + 40) & (green > blue + 40)
    for goal in GOALS:
        row, column = int((HALF - goal[1]) * pixels) + 3, int((goal[0] + HALF) * pixels) + 3
        assert is_green[row, column]
    assert 0.9 < is_green.sum() / (4 * (2 * REACH * pixels) ** 2) <= 1


@pytest.mark.parametrize("script", [SCRIPT, TWIN], ids=["flow", "gaussian"])
def test_command_line(script, tmp_path):
    """Both scripts train, continue and evaluate on the gridworld by its id, without a warning."""
    ended = run(*SMALL, "--env-id", ENV_ID, cwd=tmp_path, script=script)
    assert ended.status == 0 and not ended.err, ended.err
    (run_dir,) = run_folders(tmp_path)
    for flags in (("--resume", run_dir), ("--evaluate", run_dir, "--no-compile", "--eval-episodes", 2)):
        ended = run(*flags, cwd=tmp_path, script=script)
        assert ended.status == 0 and not ended.err, ended.err
    assert f"2 episodes of {ENV_ID}" in ended.out


@pytest.fixture(scope="module")
def run_dirs(train_small, gaussian):
    """A barely trained run of each contender."""
    return [train_small(ENV_ID), train_small(ENV_ID, gaussian, exp_name="ppo_continuous_action")]


def test_episodes_are_the_environment_s(run_dirs):
    """Positions move by one step at most, and end in the goal that is named; without a goal at the time limit."""
    episodes = play(load_run(run_dirs[0]), 50)
    assert episodes.positions.shape == (episodes.lengths.max() + 1, 50, 2)
    moves = np.abs(np.diff(episodes.positions, axis=0))
    assert np.nanmax(moves) <= STEP_SIZE + 1e-6
    assert set(episodes.goals) > {-1}, "the test needs both kinds of episodes"
    for i, (goal, length) in enumerate(zip(episodes.goals, episodes.lengths)):
        path = episodes.positions[:, i]
        assert np.isfinite(path[: length + 1]).all() and np.isnan(path[length + 1 :]).all()
        entered = (np.abs(path[length] - GOALS) <= REACH).all(-1)
        assert entered.nonzero()[0].tolist() == [goal] * int(goal >= 0) and (goal >= 0 or length == TIME_LIMIT)


def test_density_is_one(run_dirs):
    """The density at the start integrates to 1 on its grid, with x along the columns."""
    for run_dir in run_dirs:
        loaded = load_run(run_dir)
        loaded.deployed.policy.requires_grad_(False)
        axis, density = start_density(loaded, action_limit(loaded))
        assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=0.01)


def test_program(run_dirs, tmp_path, monkeypatch, capsys):
    """Two runs give two rows, a table and a picture; the same seed gives the same rows."""
    files = ["--csv", str(tmp_path / "a.csv"), "--figure", str(tmp_path / "a.png")]
    monkeypatch.setattr(sys, "argv", ["multimodality.py", *map(str, run_dirs), *files, "--episodes", "20"])
    multimodality.main()
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["contender"] for row in rows] == ["NFPO", "PPO"]
    for row in rows:
        shares = [float(row[f"share_goal_{goal}"]) for goal in range(4)]
        assert sum(shares) == pytest.approx(float(row["success_rate"]), abs=0.003)
    assert "| NFPO | 1 |" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "a.csv").read_bytes()
    monkeypatch.setattr(multimodality, "draw", lambda *_: None)
    multimodality.main()
    assert (tmp_path / "a.csv").read_bytes() == before


def test_run_of_another_environment(train_small, monkeypatch, capsys):
    """One line names the run and what is allowed."""
    run_dir = train_small("tests.envs:PointMass-v0")
    monkeypatch.setattr(sys, "argv", ["multimodality.py", str(run_dir)])
    with pytest.raises(SystemExit, match="2"):
        multimodality.main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(run_dir) in error and ENV_ID in error


@pytest.mark.parametrize(
    "goals, bits",
    [
        ([0, 1, 2, 3] * 5, 2.0),
        ([2] * 7, 0.0),
        ([0, 0, 0, 1], 2 - 0.75 * math.log2(3)),
        ([-1, -1, 0, 3, -1], 1.0),
        ([-1], math.nan),
    ],
    ids=["uniform", "one goal", "three to one", "misses are left out", "no goal"],
)
def test_entropy(goals, bits):
    """Entropies worked out by hand."""
    assert entropy_bits(np.array(goals)) == pytest.approx(bits, nan_ok=True)


def mixture(*components: tuple[float, float, float, float]) -> np.ndarray:
    """Sum of Gaussians (weight, x, y, deviation) on a grid."""
    x, y = np.meshgrid(np.linspace(-5, 5, 201), np.linspace(-4, 4, 161))
    return sum(w / d**2 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * d**2)) for w, a, b, d in components)


@pytest.mark.parametrize(
    "modes, density",
    [
        (1, mixture((1, 0.51, -0.32, 0.5))),
        (1, mixture((1, 0.025, 0.025, 2.0))),  # its top lies between four grid points, which are equally high
        (1, mixture((1, -0.5, 0, 1.0), (1, 0.5, 0, 1.0))),  # too near each other to be two
        (1, mixture((1, -2, 0, 0.5), (0.05, 2, 0, 0.5))),  # the second is too low
        (1, mixture((1, -1.2, 0, 1.0), (0.95, 1.2, 0, 1.0))),  # two tops, the dip between them is 7 % deep
        (2, mixture((1, -2, 0, 0.5), (0.7, 2, 0, 0.5))),
        (4, mixture((1, 3, 0, 0.4), (1, 0, 3, 0.4), (0.5, -3, 0, 0.4), (0.6, 0, -3, 0.4))),
    ],
    ids=["narrow", "broad, with ties", "merged", "too low", "shallow dip", "two", "four"],
)
def test_modes(modes, density):
    """Modes of mixtures whose number is known."""
    assert len(find_modes(density)) == modes


def test_mode_positions():
    """A mode's indexes are row (dy) and column (dx) of its top."""
    assert find_modes(mixture((1, 2, -1, 0.4))).tolist() == [[60, 140]]
