"""Does the flow learn several ways to act, and its Gaussian twin one? The paper's Fig. 6 (Sec. 5.3) from finished runs.

Run:     python benchmarks/multimodality.py runs/grid/benchmarks.envs.gridworld-*
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt
Before:  python benchmarks/run.py --experiments 6

Plays each run's policy 1000 times from the start, at temperature 1 and with its frozen observation statistics. Writes
`benchmarks/results/gridworld.csv`, one row for each run given, prints it as a table and draws, for each board, every
contender's run of median entropy into `benchmarks/figures/figure_6_*.png`. The entropy is that of the distribution over
the goals reached, in bits; `untrained_bits` is the same before training, from the seed's initial weights. The modes are
those of the exact action density at the start, of actions as sampled: the script rescales [-1, 1] to the Box and clips
to it. `results/gridworld.csv` as committed was made at commit 4078e50, where actions were clipped and not rescaled.
"""

import csv
import dataclasses
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import tyro
from scipy import ndimage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks.baselines.ppo_continuous_action import GaussianPolicy  # noqa: E402
from benchmarks.baselines.ppo_mixture import MixturePolicy  # noqa: E402
from benchmarks.envs.gridworld import REACH, START, GridWorld  # noqa: E402
from benchmarks.run import GRIDWORLD, JUMPWORLD  # noqa: E402
from nfpo_continuous_action import Agent, BadInput, FlowPolicy, load_checkpoint  # noqa: E402

FOLDER = Path(__file__).resolve().parent
BOARDS = {GRIDWORLD: "GridWorld", JUMPWORLD: "JumpWorld"}
CONTENDERS = {"NFPO": FlowPolicy, "PPO": GaussianPolicy, "PPO-mixture": MixturePolicy}
GOAL_COLORS = ("tab:blue", "tab:orange", "tab:purple", "tab:red")


@dataclasses.dataclass
class MultimodalityArgs:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of finished runs on these boards: the grid's, or the script's"""
    episodes: int = 1000
    """episodes played with each policy"""
    seed: int = 1
    """seed of the action noise"""
    csv: Path = FOLDER / "results" / "gridworld.csv"
    """file for the numbers"""
    figures: Path = FOLDER / "figures"
    """folder for the pictures"""


class Run(NamedTuple):
    """A policy with its observation statistics."""

    env_id: str
    contender: str
    seed: int
    agent: Agent
    untrained: Agent
    env: GridWorld  # without time limit


class Episodes(NamedTuple):
    """N episodes from the start."""

    positions: np.ndarray  # (T + 1, N, 2), not a number after an episode's end
    goals: np.ndarray  # (N,), index of the goal reached or -1
    lengths: np.ndarray  # (N,), steps


def make_agent(env: gym.Env, policy_class: type, args) -> Agent:
    """An agent for an environment, as the script makes it."""
    low, high = env.action_space.low, env.action_space.high
    obs = torch.zeros(1, *env.observation_space.shape)
    return Agent(
        args, policy_class, SimpleNamespace(policy_obs=slice(None), critic_obs=slice(None), obs=obs, low=low, high=high)
    )


def load_run(folder: Path) -> Run:
    """The policy of a run. Raises `BadInput` for one of another environment or policy, or one not finished."""
    checkpoint = max(folder.rglob("checkpoint.pt"), default=folder, key=os.path.getmtime)
    state = load_checkpoint(checkpoint)
    args = state["args"]
    if args.env_id not in BOARDS:
        raise BadInput(f"RUN_DIRS has {folder}, a run of {args.env_id}; allowed are runs of {', '.join(BOARDS)}")
    if state["global_step"] + args.num_envs * args.num_steps <= args.total_timesteps:
        raise BadInput(f"RUN_DIRS has {folder}, stopped at step {state['global_step']}; allowed are finished runs")
    env = gym.make(args.env_id).unwrapped
    for contender, policy_class in CONTENDERS.items():
        torch.manual_seed(args.seed)  # as the script does before it makes the agent
        untrained, agent = (make_agent(env, policy_class, args) for _ in range(2))
        if agent.state_dict().keys() == state["agent"].keys():
            load_checkpoint(checkpoint, agent)
            untrained.obs_stats = agent.obs_stats
            return Run(args.env_id, contender, args.seed, agent, untrained, env)
    raise BadInput(f"RUN_DIRS has {folder}, a run of another policy; allowed are {', '.join(CONTENDERS)}")


@torch.no_grad()
def play(env_id: str, agent: Agent, episodes: int) -> Episodes:
    """Play episodes side by side at temperature 1: one environment each, one batch of actions a step."""
    envs = [gym.make(env_id, disable_env_checker=True) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)])  # (N, 2)
    goals, lengths = np.full(episodes, -1), np.zeros(episodes, dtype=np.int64)
    positions, playing = [obs.copy()], np.ones(episodes, dtype=bool)
    while playing.any():
        actions = agent.act(torch.from_numpy(obs))[-1].numpy()
        positions.append(np.full_like(obs, np.nan))
        for i in playing.nonzero()[0]:
            obs[i], _, terminated, truncated, info = envs[i].step(actions[i])
            positions[-1][i], goals[i], playing[i] = obs[i], info["goal"], not (terminated or truncated)
            lengths[i] += 1
    return Episodes(np.stack(positions), goals, lengths)


def entropy_bits(goals: np.ndarray) -> float:
    """Entropy of the distribution over the goals reached, in bits; -1 stands for none and is left out. (N,) -> scalar.

    Not a number where no goal was reached.
    """
    reached = goals[goals >= 0]
    if not reached.size:
        return math.nan
    shares = np.bincount(reached) / reached.size
    shares = shares[shares > 0]
    return float((shares * np.log2(1 / shares)).sum())


@torch.no_grad()
def start_density(run: Run, limit: float, points: int = 601) -> tuple[np.ndarray, np.ndarray]:
    """Exact density at the start of actions before they meet the Box, which is [-1, 1] here. -> grid along both axes
    (P,), density (P, P) in rows of dy."""
    axis = np.linspace(-limit, limit, points)
    dx, dy = np.meshgrid(axis, axis)
    actions = torch.from_numpy(np.stack([dx.ravel(), dy.ravel()], axis=-1)).float()  # (P * P, 2)
    obs = run.agent.normalize(torch.from_numpy(START)).expand(len(actions), -1)
    return axis, run.agent.policy.log_prob(obs, actions).exp().numpy().reshape(points, points).astype(np.float64)


@torch.no_grad()
def action_limit(run: Run, share: float = 0.999, samples: int = 10_000) -> float:
    """The size that a `share` of the components of actions sampled at the start does not exceed, and a tenth more."""
    obs = run.agent.normalize(torch.from_numpy(START)).expand(samples, -1)
    return 1.1 * float(run.agent.policy.sample(obs)[0].abs().quantile(share))


def find_modes(density: np.ndarray, height: float = 0.1, dip: float = 0.5) -> np.ndarray:
    """The modes of a density on a grid (P, P). -> (modes, 2) indexes.

    A local maximum counts if it is at least `height` of the highest, and if from it the density has to fall by the
    share `dip` before anything higher is reached: ripples on one broad hill are not modes, nor are those that
    a grid makes of a ridge narrower than its cells.
    """
    peaks = (density == ndimage.maximum_filter(density, size=3)) & (density >= height * density.max())
    modes = []
    for index in np.argwhere(peaks):
        islands, _ = ndimage.label(density > (1 - dip) * density[tuple(index)], structure=np.ones((3, 3)))
        island = np.where(islands == islands[tuple(index)], density, 0.0)
        if np.ravel_multi_index(index, density.shape) == island.argmax():  # of equal neighbors, the first
            modes.append(index)
    return np.array(modes)


def summary(run: Run, episodes: Episodes, before: Episodes) -> dict:
    """One row of the CSV, of the episodes after and before training."""
    _, density = start_density(run, action_limit(run))
    shares = [float((episodes.goals == goal).mean()) for goal in range(len(run.env.goals))]
    return {
        "board": BOARDS[run.env_id],
        "contender": run.contender,
        "seed": run.seed,
        "entropy_bits": f"{entropy_bits(episodes.goals):.3f}",
        "untrained_bits": f"{entropy_bits(before.goals):.3f}",
        "success_rate": f"{(episodes.goals >= 0).mean():.3f}",
        "mean_length": f"{episodes.lengths.mean():.2f}",
        "modes": len(find_modes(density)),
        **{f"share_goal_{goal}": f"{share:.3f}" for goal, share in enumerate(shares)},
    }


def draw_board(axes: plt.Axes, env: GridWorld) -> None:
    """Cells, the grey start and the green goals."""
    half = env.half
    for center, color in ((START, "0.75"), *((goal, "#9fd69f") for goal in env.goals)):
        axes.add_patch(plt.Rectangle(center - REACH, 2 * REACH, 2 * REACH, color=color, linewidth=0, zorder=0))
    ticks = np.arange(env.size + 1) - half
    axes.hlines(ticks, -half, half, color="0.9", linewidth=0.6, zorder=0)
    axes.vlines(ticks, -half, half, color="0.9", linewidth=0.6, zorder=0)
    axes.set(xlim=(-half, half), ylim=(-half, half), xlabel="x (cells)", ylabel="y (cells)", aspect="equal")
    axes.set(xticks=np.arange(env.size) - env.size // 2, yticks=np.arange(env.size) - env.size // 2)


@torch.no_grad()
def draw_actions(axes: plt.Axes, run: Run, samples: int = 12) -> None:
    """Sampled actions, as the environment receives them, from the center of every cell that one can be on."""
    env = run.env
    centers = np.stack(np.meshgrid(*[np.arange(env.size) - env.size // 2] * 2), axis=-1).reshape(-1, 2)
    is_green = (np.abs(centers[:, None] - env.goals) <= REACH).all(-1).any(-1)
    centers = (START[None] if env.has_pits else centers[~is_green]).astype(np.float32)  # (cells, 2)
    positions = centers.repeat(samples, axis=0)  # (cells * samples, 2)
    actions = run.agent.act(torch.from_numpy(positions))[-1].numpy()
    at_start = (positions == START).all(-1)
    draw_board(axes, env)
    length = 1.0 if env.has_pits else 0.45  # where they lead, or as many as find room
    for mask, color in ((~at_start, "tab:blue"), (at_start, "black")):
        axes.quiver(
            *positions[mask].T,
            *length * actions[mask].T,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.0035,
            color=color,
            alpha=0.6,
        )
    axes.set_title(f"{run.contender} (seed {run.seed}): {samples} actions a cell", fontsize=10)


def draw_trajectories(axes: plt.Axes, run: Run, episodes: Episodes, shown: int = 100) -> None:
    """The first `shown` episodes, colored by the goal reached, and at each goal its share in all episodes."""
    draw_board(axes, run.env)
    for i in range(min(shown, len(episodes.goals))):
        color = GOAL_COLORS[episodes.goals[i]] if episodes.goals[i] >= 0 else "0.4"
        axes.plot(*episodes.positions[:, i].T, color=color, linewidth=0.7, alpha=0.4, marker=".", markersize=2.5)
    for goal, center in enumerate(run.env.goals):
        axes.annotate(
            f"{100 * (episodes.goals == goal).mean():.0f} %",
            center * 0.74 + np.where(center == 0, 0.95, 0),  # beside the arrivals, not under them
            ha="center",
            va="center",
            fontsize=9,
            color=GOAL_COLORS[goal],
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    bits = entropy_bits(episodes.goals)
    axes.set_title(f"{min(shown, len(episodes.goals))} trajectories; goal entropy {bits:.2f} bit", fontsize=10)


def draw_density(axes: plt.Axes, run: Run, limit: float):
    """The action density at the start, the Box and the modes. Returns the image, for a color bar."""
    axis, density = start_density(run, limit)
    modes = find_modes(density)
    scale = matplotlib.colors.LogNorm(1e-3, 1, clip=True)
    image = axes.pcolormesh(axis, axis, density / density.max(), cmap="magma", norm=scale, rasterized=True)
    axes.add_patch(plt.Rectangle((-1, -1), 2, 2, fill=False, edgecolor="white", linestyle="--", label="Box of actions"))
    axes.plot(axis[modes[:, 1]], axis[modes[:, 0]], "c+", markersize=9, label="mode")
    axes.legend(fontsize=7, loc="upper right", facecolor="0.3", labelcolor="white")
    axes.set(xlabel="action dx / Box", ylabel="action dy / Box", aspect="equal")
    axes.set_title("action density at the start", fontsize=10)
    return image


def draw(runs: list[tuple[Run, Episodes]], path: Path) -> None:
    """A column for each run; rows: actions, trajectories, density at the start."""
    limit = max(1.1, *(action_limit(run, share=0.95) for run, _ in runs))  # the rest is far outside the Box
    figure, axes = plt.subplots(3, len(runs), figsize=(0.6 + 3.7 * len(runs), 11), layout="constrained", squeeze=False)
    for column, (run, episodes) in zip(axes.T, runs):
        draw_actions(column[0], run)
        draw_trajectories(column[1], run, episodes)
        image = draw_density(column[2], run, limit)
    figure.colorbar(image, ax=axes[2], label="density / its maximum", shrink=0.9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    args = tyro.cli(MultimodalityArgs, description=__doc__.split("\n")[0])
    torch.set_num_threads(1)
    try:
        if not args.run_dirs or args.episodes < 1:
            raise BadInput("allowed are at least one run folder and at least one episode")
        runs = sorted(map(load_run, args.run_dirs), key=lambda run: run[:3])
        for one, other in zip(runs, runs[1:]):
            if one[:3] == other[:3]:
                raise BadInput(f"RUN_DIRS has {' '.join(map(str, one[:3]))} twice; allowed is one run for each seed")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rows, played = [], {}
    for run in tqdm(runs, unit="run", disable=not sys.stderr.isatty()):
        torch.manual_seed(args.seed)
        episodes = play(run.env_id, run.agent, args.episodes)
        rows.append(summary(run, episodes, play(run.env_id, run.untrained, args.episodes)))
        played.setdefault(run.env_id, {}).setdefault(run.contender, []).append((run, episodes))
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for cells in (rows[0], ["-"] * len(rows[0]), *(row.values() for row in rows)):
        print("| " + " | ".join(map(str, cells)) + " |")
    for env_id, contenders in played.items():
        # Not the first seed and not the nicest: the one whose entropy is the median.
        ranked = [sorted(pairs, key=lambda pair: entropy_bits(pair[1].goals)) for pairs in contenders.values()]
        draw([pairs[len(pairs) // 2] for pairs in ranked], args.figures / f"figure_6_{BOARDS[env_id]}.png")


if __name__ == "__main__":
    main()
