"""Promise: the boards of Fig. 6 are what their docstrings say, and their numbers measure what they are called."""

import csv
import math
import shutil
import sys
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL, run_folders
from gymnasium.utils.env_checker import check_env
from scipy.special import ndtr

import nfpo_continuous_action as nfpo
from benchmarks import multimodality
from benchmarks.baselines.ppo_continuous_action import GaussianPolicy
from benchmarks.baselines.ppo_mixture import MixturePolicy
from benchmarks.envs.gridworld import REACH, START, TIME_LIMIT
from benchmarks.multimodality import (
    action_limit,
    entropy_bits,
    find_modes,
    load_run,
    make_agent,
    play,
    start_density,
)

GRIDWORLD, JUMPWORLD = multimodality.BOARDS


@pytest.fixture(params=[GRIDWORLD, JUMPWORLD], ids=["GridWorld", "JumpWorld"])
def env(request):
    env = gym.make(request.param, render_mode="rgb_array")
    yield env
    env.close()


@pytest.fixture
def board(env):
    return env.unwrapped


@pytest.mark.filterwarnings("error", "ignore:.*symmetric and normalized space")  # JumpWorld's unit is a cell
def test_is_a_gymnasium_environment(env):
    """Gymnasium's own checker finds nothing wrong, and nothing to warn of."""
    check_env(env.unwrapped)


def test_no_goal_is_nearer(board):
    """All goals are equally far from the start, and turning the board by a quarter gives the same board."""
    distances = np.linalg.norm(board.goals - START, axis=-1)
    assert len(board.goals) == 4 and np.ptp(distances) == 0 and distances.min() > 0
    turned = (board.goals - START) @ np.array([[0, 1], [-1, 0]]) + START
    assert {tuple(goal) for goal in turned} == {tuple(goal) for goal in board.goals}


@pytest.mark.parametrize("goal", range(4))
def test_entering_a_goal_ends_the_episode(env, board, goal):
    """Reward 1, termination and the goal's index come with the step that enters it, and with no other."""
    jumps = 2 * [board.goals[goal] / 2] if not board.has_pits else [board.goals[goal] / 10, board.goals[goal] * 0.9]
    env.reset(seed=0)
    *before, (_, reward, terminated, truncated, info) = [env.step(jump / board.step_size) for jump in jumps]
    assert (reward, terminated, truncated, info["goal"]) == (1.0, True, False, goal)
    for _, reward, terminated, truncated, info in before:
        assert (reward, terminated, truncated, info["goal"]) == (0.0, False, False, -1)


def test_walls_and_time_limit():
    """On GridWorld a wall stops the point, whose corner holds no reward, and the time limit truncates."""
    env = gym.make(GRIDWORLD)
    env.reset(seed=0)
    answers = [env.step(np.ones(2, dtype=np.float32)) for _ in range(TIME_LIMIT)]
    assert not any(terminated or truncated for _, _, terminated, truncated, _ in answers[:-1])
    position, reward, terminated, truncated, info = answers[-1]
    assert position.tolist() == [env.unwrapped.half] * 2
    assert (reward, terminated, truncated, info["goal"]) == (0.0, False, True, -1)
    env.reset(seed=0)  # whoever is stopped by a wall inside a goal has entered it
    assert [env.step(np.array([x, 0.0], dtype=np.float32))[1] for x in (1.0, 0.6, 1.0)] == [0, 0, 1]


@pytest.mark.parametrize("x, y", [(1.0, 0.0), (1.2, -1.2), (2.7, 0.0), (0.0, -4.0), (-9.0, 9.0)])
def test_pits(x, y):
    """On JumpWorld a jump to a white cell or beside the board, behind a goal too, ends the episode with nothing."""
    env = gym.make(JUMPWORLD)
    env.reset(seed=0)
    position, reward, terminated, truncated, info = env.step(np.array([x, y]))
    assert (reward, terminated, truncated, info["goal"]) == (0.0, True, False, -1)
    assert env.observation_space.contains(position)


def test_grey_cell_is_no_pit():
    """On JumpWorld whoever stays in the grey cell may jump again, until the time limit."""
    env = gym.make(JUMPWORLD)
    env.reset(seed=0)
    answers = [env.step(np.array([0.04, -0.04], dtype=np.float32)) for _ in range(TIME_LIMIT)]
    assert [answer[1:4] for answer in answers] == [(0.0, False, False)] * (TIME_LIMIT - 1) + [(0.0, False, True)]


def test_actions_are_clipped(env, board):
    """A longer action than the Box allows is as good as one at its edge."""
    positions = []
    for action in (-7.0, -board.limit):
        env.reset(seed=0)
        positions.append(env.step(np.array([0.0, action]))[0].tolist())
    assert positions[0] == positions[1]


class WideGaussian(torch.nn.Module):
    """Mean 10 (y, -x) in cells, deviation 5, as shares of the Box: one mode, and no aim."""

    def __init__(self, obs_dim, action_dim):
        super().__init__()

    def sample(self, obs, temperature=1.0):
        mean = 10 * torch.stack([obs[:, 1], -obs[:, 0]], dim=-1)
        return mean + 5 * torch.randn_like(mean), torch.zeros(len(obs))


def test_clipping_aims():
    """GridWorld's docstring: a single wide Gaussian reaches all four goals alike, in no more steps than two or three.
    JumpWorld's: it reaches none there."""
    torch.manual_seed(0)
    on = {}
    for env_id in multimodality.BOARDS:
        agent = make_agent(gym.make(env_id), WideGaussian, nfpo.Args())  # whose statistics leave positions as they are
        on[env_id] = play(env_id, agent, 500)
    assert entropy_bits(on[GRIDWORLD].goals) > 1.95 and on[GRIDWORLD].lengths.mean() < 3
    assert (on[GRIDWORLD].goals >= 0).mean() > 0.99
    assert (on[JUMPWORLD].goals >= 0).mean() < 0.1


def test_jumps_have_to_choose():
    """JumpWorld's docstring, from exact probabilities: the best single Gaussian whose goals have an entropy of 1 bit
    hits 0.31 of the time; the best of all Gaussians hits always, and so does a mixture of four, at 2 bits."""
    board = gym.make(JUMPWORLD).unwrapped

    def share(mean, std, center):
        """Probability of a cell's width about a center, along one axis."""
        return ndtr((center + REACH - mean) / std) - ndtr((center - REACH - mean) / std)

    mean, std = np.linspace(0, 2, 21), np.geomspace(0.05, 6, 40)
    mx, my, sx, sy = np.meshgrid(mean, mean, std, std, indexing="ij")
    hits = np.stack([share(mx, sx, x) * share(my, sy, y) for x, y in board.goals])
    stays = share(mx, sx, 0) * share(my, sy, 0)  # and jumps again
    hits = (hits / np.maximum(1 - stays, 1e-9))[:, stays < 0.99]
    success = hits.sum(0)
    shares = hits / np.maximum(success, 1e-300)
    bits = -(shares * np.log2(np.maximum(shares, 1e-300))).sum(0)
    assert success.max() > 0.999 and bits[success.argmax()] < 0.01
    assert success[bits >= 1].max() == pytest.approx(0.31, abs=0.01)
    four = np.array([[share(gx, 0.1, x) * share(gy, 0.1, y) for x, y in board.goals] for gx, gy in board.goals])
    assert four.mean(0).sum() > 0.999 and np.ptp(four.mean(0)) < 1e-9


def test_frame_shows_start_goals_and_point(env, board):
    """Grey start, green goals and a dot that follows the point, up being up."""
    env.reset(seed=0)
    env.step(np.array([0.2, 0.4], dtype=np.float32))
    frame, half = env.render().astype(int), board.half
    red, green, blue = frame[..., 0], frame[..., 1], frame[..., 2]
    pixels = len(frame) / board.size

    def cells(mask):  # mean position of the pixels of one color
        rows, columns = mask.nonzero()
        return np.array([(columns.mean() + 0.5) / pixels - half, half - (rows.mean() + 0.5) / pixels])

    assert np.allclose(cells((red > 180) & (green < 100)), board.position, atol=0.05)
    is_green = (green > red + 40) & (green > blue + 40)
    for goal in board.goals:
        row, column = int((half - goal[1]) * pixels) + 3, int((goal[0] + half) * pixels) + 3
        assert is_green[row, column]
    assert 0.9 < is_green.sum() / (4 * (2 * REACH * pixels) ** 2) <= 1


@pytest.mark.parametrize("policy_class, env_id", [(nfpo.FlowPolicy, GRIDWORLD), (GaussianPolicy, JUMPWORLD)])
def test_command_line(policy_class, env_id, cli):
    """Both policies train, continue and evaluate on the boards by their ids."""
    assert cli(*SMALL, "--env-id", env_id, policy_class=policy_class).status == 0
    (run_dir,) = run_folders(cli.folder)
    ended = cli("--resume", run_dir, "--total-timesteps", 192, policy_class=policy_class)
    assert ended.status == 0 and "new ones have started" in ended.out
    ended = cli("--evaluate", run_dir, "--eval-episodes", 2, policy_class=policy_class)
    assert ended.status == 0 and "2 episodes, temperature 0" in ended.out


@pytest.fixture(scope="module")
def run_dirs(train_small):
    """A barely trained run of each contender on GridWorld, and one of the flow on JumpWorld."""
    policies = nfpo.FlowPolicy, GaussianPolicy, MixturePolicy
    return [*(train_small(GRIDWORLD, policy, base_std=1.0) for policy in policies), train_small(JUMPWORLD)]


@pytest.mark.parametrize("index", [0, 3], ids=["GridWorld", "JumpWorld"])
def test_episodes_are_the_environment_s(run_dirs, index):
    """Positions move by one step at most, and end in the goal that is named; without one in a pit or at the limit."""
    loaded = load_run(run_dirs[index])
    episodes, board = play(loaded.env_id, loaded.agent, 50), loaded.env
    assert episodes.positions.shape == (episodes.lengths.max() + 1, 50, 2)
    moves = np.abs(np.diff(episodes.positions, axis=0))
    assert np.nanmax(moves) <= board.step_size * board.limit + 1e-6
    assert set(episodes.goals) > {-1}, "the test needs both kinds of episodes"
    for i, (goal, length) in enumerate(zip(episodes.goals, episodes.lengths)):
        path = episodes.positions[:, i]
        assert np.isfinite(path[: length + 1]).all() and np.isnan(path[length + 1 :]).all()
        entered = (np.abs(path[length] - board.goals) <= REACH).all(-1)
        if goal >= 0:
            assert entered.nonzero()[0].tolist() == [goal]
        elif board.has_pits:  # the position of a fall beside the board is its edge, which may be a goal's
            assert length == TIME_LIMIT or (np.abs(path[length]) > REACH).any()
        else:
            assert not entered.any() and length == TIME_LIMIT


def test_density_is_the_policy_s(run_dirs):
    """The density at the start integrates to 1 on its grid and has the mean and the deviations of sampled actions, x
    along the columns, whatever the statistics of the observations are."""
    for run_dir in run_dirs:
        loaded = load_run(run_dir)
        loaded.agent.obs_stats.mean += torch.tensor(
            [2.0, -1.0]
        )  # so that the start is not what the network sees as zero
        with torch.no_grad():  # and a policy that looks different along each axis, there more than elsewhere
            for parameter in loaded.agent.policy.parameters():
                parameter += 0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        axis, density = start_density(loaded, action_limit(loaded, share=1.0))
        density *= (axis[1] - axis[0]) ** 2
        assert density.sum() == pytest.approx(1, abs=0.01)
        scaled = loaded.agent.normalize(torch.from_numpy(START)).expand(100_000, -1)
        with torch.no_grad():
            actions = loaded.agent.policy.sample(scaled)[0].numpy()
        for marginal, sampled in zip((density.sum(0), density.sum(1)), actions.T):
            mean = (marginal * axis).sum()
            assert mean == pytest.approx(sampled.mean(), abs=0.02)
            assert np.sqrt((marginal * (axis - mean) ** 2).sum()) == pytest.approx(sampled.std(), rel=0.02)


def program(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["multimodality.py", *map(str, flags)])
    multimodality.main()


def test_program(run_dirs, tmp_path, monkeypatch, capsys):
    """A row a run, a table and a picture a board; the same seed gives the same rows."""
    monkeypatch.setattr(multimodality, "start_density", partial(start_density, points=101))
    flags = *run_dirs, "--csv", tmp_path / "a.csv", "--figures", tmp_path, "--episodes", 20
    program(monkeypatch, *flags)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["contender"] for row in rows] == ["NFPO", "PPO", "PPO-mixture", "NFPO"]
    assert [row["board"] for row in rows] == ["GridWorld"] * 3 + ["JumpWorld"]
    for row in rows:
        shares = [float(row[f"share_goal_{goal}"]) for goal in range(4)]
        assert sum(shares) == pytest.approx(float(row["success_rate"]), abs=0.003)
    assert "| GridWorld | NFPO | 1 |" in capsys.readouterr().out
    for board in ("GridWorld", "JumpWorld"):
        assert (tmp_path / f"figure_6_{board}.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "a.csv").read_bytes()
    monkeypatch.setattr(multimodality, "draw", lambda *_: None)
    program(monkeypatch, *flags)
    assert (tmp_path / "a.csv").read_bytes() == before


def test_untrained_is_where_training_starts(run_dirs, train_small):
    """The policy before training has the weights that the script starts from: a run with a learning rate of nearly 0
    keeps them."""
    still = load_run(train_small(GRIDWORLD, base_std=1.0, learning_rate=1e-30)).agent.policy.state_dict()
    loaded = load_run(run_dirs[0])
    for name, before in loaded.untrained.policy.state_dict().items():
        assert torch.allclose(before, still[name], rtol=0, atol=1e-20), name
    assert any(not torch.allclose(x, still[name]) for name, x in loaded.agent.policy.state_dict().items())


class Stranger(GaussianPolicy):
    """The Gaussian with a weight that nobody else has."""

    def __init__(self, obs_dim, action_dim):
        super().__init__(obs_dim, action_dim)
        self.more = torch.nn.Parameter(torch.zeros(1))


def test_bad_runs(run_dirs, train_small, tmp_path, monkeypatch, capsys):
    """A run of another environment, one that is not finished, one of another policy and one given twice: one line
    names it. The folder over a run's is as good."""
    other = train_small("tests.envs:PointMass-v0")
    stranger = train_small(GRIDWORLD, Stranger)
    assert load_run(run_dirs[0].parent)[:3] == (GRIDWORLD, "NFPO", 1)
    unfinished = shutil.copytree(run_dirs[0], tmp_path / "unfinished")
    state = torch.load(unfinished / "checkpoint.pt", weights_only=False)
    state["args"]["total_timesteps"] = 1024
    torch.save(state, unfinished / "checkpoint.pt")
    for flags, words in (
        ([other], (str(other), GRIDWORLD, JUMPWORLD)),
        ([unfinished], (str(unfinished), "stopped at step 128")),
        ([stranger], (str(stranger), "another policy")),
        ([run_dirs[0], run_dirs[1], run_dirs[0]], (f"{GRIDWORLD} NFPO 1 twice",)),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            program(monkeypatch, *flags)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error


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
