"""The report: from the grid's runs to the committed CSV files, the figures and the tables of the pages.

Run:     python benchmarks/report.py                # after benchmarks/run.py, at any time, finished or not
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

First, what has ended in the runs folder goes into `results/`: one row per run in `runs.csv`, and 50 bins per run in
`curves/<environment>.csv`. Then figures and tables are made from `results/` alone, so that a fresh clone, which has
no runs, gives the same ones. Statistics are those of Agarwal et al. (2021), by their library rliable: interquartile
mean (IQM) over seeds, 95 % intervals by stratified bootstrap, performance profiles, probability of improvement.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import matplotlib
import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics, plot_utils
from scipy.stats import trim_mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run import (  # noqa: E402
    ABLATION,
    DEPLOYED,
    GRID,
    KEY,
    MUJOCO,
    ROOT,
    SCALARS,
    TRAINING,
    Run,
    collect,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

GRID = [experiment for experiment in GRID if experiment.edition == 1]  # the tables and figures are of this one
STEPS_1M, STEPS_ABLATION = 1_000_000, 500_000
AGREES = "agrees: no difference seen"
BANDS = "IQM over seeds, 95 % interval\n(below 5 seeds: all of them)"
PUBLISHED = ROOT / "benchmarks" / "results" / "published.csv"
LOG_DET = "last_log_det"
# rliable's own bootstrap draws 50,000 times; its interval's second digit settles long before.
RESAMPLES = 2000


@dataclasses.dataclass
class ReportArgs:
    runs_dir: Path = ROOT / "runs" / "grid"
    """folder of the grid's runs; what has ended in it is added to the results, instead of an earlier run of its name"""
    results: Path = ROOT / "benchmarks" / "results"
    """folder of the CSV files"""
    figures: Path = ROOT / "benchmarks" / "figures"
    """folder of the figures"""
    readme: Path = ROOT / "benchmarks" / "README.md"
    """file whose marked parts are written anew"""
    docs: Path = ROOT / "docs" / "nfpo_continuous_action.md"
    """file whose marked table of results is written anew"""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A statistic with its 95 % interval and the numbers of seeds and tasks it comes from."""

    value: float
    low: float
    high: float
    seeds: int
    tasks: int = 1

    def __str__(self) -> str:
        interval = f" [{self.low:.0f}, {self.high:.0f}]" if self.seeds > 1 else ""
        return f"{self.value:.0f}{interval}" + (f" ({self.seeds})" if self.seeds < 5 else "")


def bootstrap(
    scores, statistic: Callable, level: float = 0.95, resamples: Optional[int] = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, lower and upper end of a statistic (K,) of scores (seeds, tasks, ...), or of a pair of such."""
    arrays = scores if isinstance(scores, list) else [scores]
    if all(len(x) == 1 for x in arrays):  # one seed has no interval, and nothing to draw from
        value = statistic(*arrays)
        return value, value, value
    np.random.seed(0)  # rliable draws from the global generator: the same results give the same table
    values, intervals = library.get_interval_estimates(
        {"": scores}, statistic, reps=resamples or RESAMPLES, confidence_interval_size=level
    )
    return values[""], *intervals[""]


def iqm(scores: np.ndarray) -> Estimate:
    """Interquartile mean of one score a seed, (seeds,)."""
    value, low, high = bootstrap(scores[:, None], lambda x: np.array([metrics.aggregate_iqm(x)]))
    return Estimate(value[0], low[0], high[0], len(scores))


def iqm_curve(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile mean over seeds at each of T points, with its interval: (seeds, T) to three (T,)."""
    # A band's edge is drawn, not quoted, and there are hundreds of them.
    return bootstrap(returns[:, None], lambda x: trim_mean(x[:, 0], 0.25, axis=0), resamples=RESAMPLES // 5)


def improvement(ours: np.ndarray, theirs: np.ndarray, comparisons: int = 1) -> Estimate:
    """Probability that a run of ours scores above a run of theirs, averaged over tasks; both (seeds, tasks). The
    interval is wider where it is one of several `comparisons`, so that 95 % holds for all of them (Bonferroni)."""
    value, low, high = bootstrap(
        [ours, theirs],
        lambda x, y: np.array([metrics.probability_of_improvement(x, y)]),
        1 - 0.05 / comparisons,
    )
    return Estimate(value[0], low[0], high[0], min(len(ours), len(theirs)), ours.shape[1])


def probability(found: Optional[Estimate]) -> str:
    """An `improvement` as text; of one or two seeds an interval would only pretend to be one."""
    if found is None:
        return "tasks missing"
    few = f" (from {found.seeds} seed{'s' * (found.seeds > 1)} a task)"
    return f"{found.value:.2f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if found.seeds > 2 else few)


class Results:
    """The CSV files, with the look-ups that figures and tables need. Not changed once read: `compare` remembers."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "runs.csv"
        self.runs = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEY, "status", TRAINING, DEPLOYED])
        files = sorted((folder / "curves").glob("*.csv"))
        curves = pd.concat(map(pd.read_csv, files)) if files else pd.DataFrame()
        self.curves = curves.reindex(columns=[*KEY, "step", *SCALARS])
        last = self.curves.dropna(subset="log_det").sort_values("step").groupby(KEY).log_det.last()
        self.runs[LOG_DET] = last.reindex(pd.MultiIndex.from_frame(self.runs[KEY])).to_numpy()

    def without_seed(self, seed: int) -> "Results":
        """The other runs."""
        others = copy.copy(self)
        others.runs = self.runs[self.runs.seed != seed]
        return others

    def rows(self, env_id: str, variant: str, total: int) -> pd.DataFrame:
        """The runs, in the order of their seeds."""
        return self.runs[select(self.runs, env_id, variant, total)].sort_values("seed")

    def scores(self, env_id: str, variant: str, total: int, column: str = TRAINING) -> np.ndarray:
        """One score for each run that did not break, in the order of the seeds, (seeds,)."""
        rows = self.rows(env_id, variant, total)
        return rows[column][rows.status != "broke"].dropna().to_numpy()

    def broken(self, env_id: str, variant: str, total: int) -> int:
        """How many of these runs broke off."""
        return int((self.rows(env_id, variant, total).status == "broke").sum())

    def ranked(self, env_id: str, variant: str, total: int, column: str = TRAINING) -> pd.Series:
        """One score a seed, (seeds,), to be compared: a run that broke is below all that did not."""
        rows = self.rows(env_id, variant, total).set_index("seed")
        scores = rows[column] if column == LOG_DET else rows[column].where(rows.status != "broke", -np.inf)
        return scores.dropna()

    def matrix(self, env_ids: tuple[str, ...], variant: str, total: int, column: str = TRAINING) -> np.ndarray:
        """`ranked` scores (seeds, tasks), of as many seeds as all tasks have."""
        columns = [self.ranked(env_id, variant, total, column).to_numpy() for env_id in env_ids]
        seeds = min(map(len, columns))
        return np.stack([scores[:seeds] for scores in columns], axis=1)

    def curve(self, env_id: str, variant: str, total: int, name: str) -> Optional[tuple[np.ndarray, np.ndarray]]:
        """Steps (T,) and values (seeds, T) of the runs that did not break. A bin without an episode takes what lies
        around it, and the curves end where the first seed's ends."""
        table = self.by_seed(env_id, variant, total, name, broken=False)
        table = table.interpolate(axis=1, limit_area="inside").bfill(axis=1).dropna(axis=1)
        return (table.columns.to_numpy(), table.to_numpy()) if table.size else None

    def broken_curves(self, env_id: str, variant: str, total: int, name: str) -> list[pd.Series]:
        """Values by step of each run that broke, up to its end."""
        return [line.dropna() for _, line in self.by_seed(env_id, variant, total, name, broken=True).iterrows()]

    def by_seed(self, env_id: str, variant: str, total: int, name: str, broken: bool) -> pd.DataFrame:
        """One row a run and one column a step, of the runs that broke or of the others."""
        runs = self.rows(env_id, variant, total)
        rows = self.curves[select(self.curves, env_id, variant, total)]
        rows = rows[rows.seed.isin(runs.seed[runs.status == "broke"]) == broken]
        return rows.pivot(index="seed", columns="step", values=name) if len(rows) else pd.DataFrame()

    def has(self, env_ids: tuple[str, ...], variant: str, total: int) -> bool:
        return all(len(self.scores(env_id, variant, total)) for env_id in env_ids)


def select(table: pd.DataFrame, env_id: str, variant: str, total: int) -> pd.Series:
    return (table.env_id == env_id) & (table.variant == variant) & (table.total_timesteps == total)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def draw_curves(axes, results: Results, env_id: str, variants: list[str], total: int, name: str, label: str) -> None:
    """IQM over seeds with its interval, one line a variant. A run that broke has a thin line that ends in a cross."""
    colors = dict(zip(variants, plt.get_cmap("tab10").colors * 2))
    for variant in variants:
        for line in results.broken_curves(env_id, variant, total, name):
            axes.plot(line.index, line, color=colors[variant], label=f"{variant} (broke)", linewidth=0.8)
            axes.plot(line.index[-1:], line[-1:], "x", color=colors[variant], markersize=9, markeredgewidth=2)
        curve = results.curve(env_id, variant, total, name)
        if curve is None:
            continue
        steps, values = curve
        middle, low, high = iqm_curve(values)
        legend = f"{variant} ({len(values)} seed{'s' * (len(values) > 1)})"
        axes.plot(steps, middle, color=colors[variant], label=legend, linewidth=1.5)
        axes.fill_between(steps, low, high, color=colors[variant], alpha=0.2, linewidth=0)
    axes.set(title=env_id.split(":")[-1], xlabel="environment steps", ylabel=label)
    if axes.lines:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        axes.grid(alpha=0.25)
    else:
        axes.text(0.5, 0.5, "no run yet", transform=axes.transAxes, ha="center", color="dimgray")
        axes.set(xticks=[], yticks=[])


def legend_of(grid) -> dict:
    """One line a variant for a legend of all panels; numbers of seeds differ from panel to panel and are left out."""
    return {text.split(" (")[0]: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels())}


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def contenders(results: Results, experiments: tuple[str, ...] = ("S1", "S1-screen")) -> list[str]:
    """The variants of Figure S1 of which there are runs, in the grid's order."""
    variants = dict.fromkeys(v for experiment in GRID if experiment.name in experiments for v in experiment.variants)
    return [v for v in variants if any(results.has((env_id,), v, STEPS_1M) for env_id in MUJOCO)]


def figure_s1(results: Results, folder: Path) -> None:
    """Return over steps on the five tasks, and as dashed lines what others published for the same number of steps. The
    variants of which one seed was tried are left to the tables."""
    figure, grid = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    published = pd.read_csv(PUBLISHED)
    published = published[published.steps == STEPS_1M]
    for axes, env_id in zip(grid.flat, MUJOCO):
        draw_curves(axes, results, env_id, contenders(results, ("S1",)), STEPS_1M, "episodic_return", "episode return")
        if not axes.lines:
            continue
        top = axes.get_ylim()[1]
        notes, above = [], np.inf
        for row in published[published.env_id == env_id].sort_values("mean", ascending=False).itertuples():
            if row.mean < 1.3 * top:
                align = "top" if above - row.mean < 0.05 * top else "bottom"  # below its line where there is one above
                above = row.mean
                axes.axhline(row.mean, color="gray", linestyle="--", linewidth=0.8)
                axes.text(0, row.mean, f" {row.algorithm}, published", fontsize=7, color="dimgray", va=align)
            else:
                notes.append(f"{row.algorithm} {row.mean:.0f}")
        if notes:
            text = "published, above: " + ", ".join(notes)
            axes.text(0.02, 0.98, text, transform=axes.transAxes, fontsize=7, color="dimgray", va="top")
    # One legend for all, in the empty sixth place; the numbers of seeds stand in the table.
    lines = legend_of(grid)
    grid.flat[-1].axis("off")
    grid.flat[-1].legend(lines.values(), lines.keys(), loc="center", title=BANDS)
    save(figure, folder / "figure_S1.png")


def over_ppo(results: Results, variant: str) -> Optional[np.ndarray]:
    """Scores (seeds, tasks) as multiples of PPO's IQM on the task, or None where a task has no run."""
    if not (results.has(MUJOCO, variant, STEPS_1M) and results.has(MUJOCO, "PPO", STEPS_1M)):
        return None
    reference = [metrics.aggregate_iqm(results.scores(env_id, "PPO", STEPS_1M)) for env_id in MUJOCO]
    return results.matrix(MUJOCO, variant, STEPS_1M) / np.array(reference)


def iqm_of_tasks(normalized: np.ndarray) -> Estimate:
    """Interquartile mean over seeds and tasks, (seeds, tasks), with its interval by stratified bootstrap."""
    value, low, high = bootstrap(normalized, lambda x: np.array([metrics.aggregate_iqm(x)]))
    return Estimate(value[0], low[0], high[0], *normalized.shape)


def figure_s1_aggregate(results: Results, folder: Path) -> None:
    """Over all tasks that a contender has runs of: performance profiles, IQM, and the probability of improvement on
    PPO."""
    normalized = {variant: over_ppo(results, variant) for variant in contenders(results)}
    normalized = {variant: scores for variant, scores in normalized.items() if scores is not None}
    if not normalized:
        return
    labels = {v: f"{v}, {len(x)} seed{'s' * (len(x) > 1)} a task" for v, x in normalized.items()}
    colors = dict(zip(contenders(results), plt.get_cmap("tab10").colors))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained", width_ratios=(2, 1, 1))
    thresholds = np.linspace(0, max(2.5, *(x.max() for x in normalized.values())) * 1.05, 51)
    np.random.seed(0)
    profiles, bands = library.create_performance_profile(
        {labels[v]: x for v, x in normalized.items()}, thresholds, reps=RESAMPLES
    )
    plot_utils.plot_performance_profiles(
        profiles,
        thresholds,
        bands,
        colors={labels[v]: colors[v] for v in normalized},
        ax=left,
        xlabel="return / PPO's IQM",
        ylabel="share of runs above",
    )
    left.legend()
    aggregates = {v: iqm_of_tasks(x) for v, x in normalized.items()}
    improvements = {v: compare(results, MUJOCO, v, "PPO", STEPS_1M) for v in normalized if v != "PPO"}
    for axes, estimates, label, even in (
        (middle, aggregates, "IQM of return / PPO's IQM, all tasks", 1),
        (right, improvements, "P(a run is above a run of PPO)", 0.5),
    ):
        for place, (variant, found) in enumerate(estimates.items()):
            if found.seeds > 2:
                axes.plot([found.low, found.high], [place, place], color=colors[variant], linewidth=8, alpha=0.3)
            axes.plot(found.value, place, "o", color=colors[variant])
        axes.axvline(even, color="gray", linestyle="--", linewidth=0.8)
        axes.set(yticks=range(len(estimates)), yticklabels=estimates, xlabel=label)
    right.set(xlim=(0, 1))
    save(figure, folder / "figure_S1_aggregate.png")


def figure_s1_updates(results: Results, folder: Path) -> None:
    """How far an update goes and how much noise is left. The variants of which one seed was tried are left out."""
    figure, grid = plt.subplots(2, len(MUJOCO), figsize=(20, 7.5), layout="constrained", sharex=True)
    variants = contenders(results, ("S1",))
    for axes, env_id in zip(grid.T, MUJOCO):
        draw_curves(axes[0], results, env_id, variants, STEPS_1M, "approx_kl", "approximate KL divergence")
        draw_curves(axes[1], results, env_id, variants, STEPS_1M, "entropy", "entropy (nats)")
        axes[0].set(yscale="log", xlabel="")
        axes[1].set(title="")
    lines = legend_of(grid)
    if lines:
        title = BANDS.replace("\n", " ")
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), title=title)
    save(figure, folder / "figure_S1_updates.png")


PICTURES = {
    "S1": ("figure_S1.png", "figure_S1_aggregate.png"),
    "updates": ("figure_S1_updates.png",),
    **{name: (f"figure_{name}.png",) for name in ("2", "3", "4", "S2")},
    "6": ("figure_6_GridWorld.png", "figure_6_JumpWorld.png"),
    "cost": (),
    "speed": (),
}

SPEED_NAMES = {
    "nfpo": "**NFPO, `nfpo_continuous_action.py`**",
    "ppo": "its Gaussian twin",
    "cleanrl": "CleanRL's PPO (Gymnasium 0.29.1, MuJoCo 2.3.7)",
    "sb3": "Stable-Baselines3's PPO",
    "bare": "the environment alone",
}

# The ablations: which curves stand in which row of which figure.
ABLATION_ROWS = {
    "2": {"scale function, l = 0.5": ["NFPO", "scale-none", "scale-zero", "scale-clip", "scale-asymmetric"]},
    "3": {
        "l * tanh(s)": ["tanh-0.1", "tanh-0.25", "NFPO", "tanh-1", "tanh-2"],
        "clamp(s, -l, l)": ["clip-0.1", "clip-0.25", "scale-clip", "clip-1", "clip-2"],
    },
    "4": {
        "entropy coefficient": ["NFPO", "entropy-0.001", "entropy-0.01"],
        "action noise": ["NFPO", "noise-0.05", "noise-0.2"],
    },
    "S2": {
        "coupling layers": ["layers-2", "NFPO", "layers-6", "layers-8"],
        "hidden dimension": ["hidden-32", "NFPO", "hidden-128", "hidden-256"],
    },
}


def figure_ablation(results: Results, name: str, folder: Path) -> None:
    """One row of panels a sweep: return on each task, and for Figure 2 the log-determinant beside it."""
    metrics_shown = [("episodic_return", "episode return")] + [("log_det", "log|det df/da|")] * (name == "2")
    rows = ABLATION_ROWS[name]
    if not results.runs.variant.isin({v for variants in rows.values() for v in variants} - {"NFPO"}).any():
        return
    width = len(ABLATION) * len(metrics_shown)
    figure, grid = plt.subplots(
        len(rows), width, figsize=(5 * width, 4 * len(rows)), layout="constrained", squeeze=False
    )
    for panels, (title, variants) in zip(grid, rows.items()):
        places = ((env_id, *shown) for env_id in ABLATION for shown in metrics_shown)
        for axes, (env_id, column, label) in zip(panels, places):
            draw_curves(axes, results, env_id, variants, STEPS_ABLATION, column, label)
        lines = legend_of(panels)
        panels[-1].legend(
            lines.values(), lines.keys(), title=f"{title}\n{BANDS}", loc="center left", bbox_to_anchor=(1, 0.5)
        )
    save(figure, folder / f"figure_{name}.png")


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(map(str, line)) + " |" for line in (header, *rows))
    return "\n".join([head, "|" + "-|" * len(header), *body])


@functools.cache  # two pages show the same cells
def cell(results: Results, env_id: str, variant: str, total: int, column: str) -> str:
    """IQM and interval of the runs that did not break, their number where it is below five, and how many broke."""
    scores, broken = results.scores(env_id, variant, total, column), results.broken(env_id, variant, total)
    return (str(iqm(scores)) if len(scores) else "-") + (f", {broken} broke" if broken else "")


def table_scores(results: Results, env_ids: tuple[str, ...], variants: list[str], total: int, column: str) -> str:
    """IQM and interval of each variant on each task."""
    rows = [[v, *(cell(results, env_id, v, total, column) for env_id in env_ids)] for v in variants]
    return markdown(["", *env_ids], rows)


def table_s1(results: Results) -> str:
    """Training and deployed scores, ratios to PPO, and what others published."""
    variants = contenders(results)
    parts = ["Return over the last 100 training episodes, with the sampling noise on:", ""]
    parts += [table_scores(results, MUJOCO, variants, STEPS_1M, TRAINING), ""]
    parts += [
        "The finished policies as deployed, temperature 0, 20 episodes a seed (100 for seeds 1 to 3 of NFPO and PPO"
    ]
    parts += ["on Humanoid-v4):", ""]
    parts += [table_scores(results, MUJOCO, variants, STEPS_1M, DEPLOYED), ""]
    ratios = []
    for variant in variants:
        if variant != "PPO":
            cells = [ratio(results, env_id, variant, "PPO", STEPS_1M) for env_id in MUJOCO]
            both = tuple(env_id for env_id, x in zip(MUJOCO, cells) if x is not None)
            found = [compare(results, both, variant, "PPO", STEPS_1M, column) for column in (TRAINING, DEPLOYED)]
            few = f", {len(both)} task{'s' * (len(both) > 1)}" if len(both) < len(MUJOCO) else ""
            normalized = over_ppo(results, variant)
            overall = "tasks missing" if normalized is None else probability(iqm_of_tasks(normalized))
            ratios.append([variant, *map(times, cells), overall, *(probability(x) + few for x in found)])
    parts += [
        "IQM of the training returns over PPO's, of the seeds that both have; the IQM over seeds and tasks of returns"
    ]
    parts += ["divided by PPO's IQM on the task; and the probability that a run is above a run of PPO:", ""]
    header = ["", *MUJOCO, "all tasks", "P(above PPO), training", "P(above PPO), deployed"]
    parts += [markdown(header, ratios), ""]
    published = pd.read_csv(PUBLISHED)
    rows = []
    for (algorithm, steps, source), group in published.groupby(["algorithm", "steps", "source"], sort=False):
        by_env = {row.env_id: f"{row.mean:.0f} ± {row.deviation:.0f}" for row in group.itertuples()}
        rows.append([f"{algorithm}, {steps / 1e6:g}M steps, {source}", *(by_env.get(e, "") for e in MUJOCO)])
    parts += ["Published by others, cited and not measured here (mean ± deviation over seeds):", ""]
    return "\n".join([*parts, markdown(["", *MUJOCO], rows)])


def table_docs(results: Results) -> str:
    """What Figure S1 compares, without the variants that one seed screened, in training and as deployed."""
    variants = contenders(results, ("S1",))
    parts = ["Return over the last 100 episodes of training:", ""]
    parts += [table_scores(results, MUJOCO, variants, STEPS_1M, TRAINING), "", "As deployed, at temperature 0:", ""]
    return "\n".join([*parts, table_scores(results, MUJOCO, variants, STEPS_1M, DEPLOYED)])


def table_updates(results: Results) -> str:
    """What figure_s1_updates draws, as one number a cell: medians over bins and seeds."""

    def table(name: str, begin: int, end: int, digits: int) -> str:
        rows = []
        for variant in contenders(results):
            cells = []
            for env_id in MUJOCO:
                curve = results.curve(env_id, variant, STEPS_1M, name)
                within = curve and curve[1][:, (begin < curve[0]) & (curve[0] <= end)]
                cells.append(f"{np.median(within):.{digits}f}" if curve and within.size else "-")
            rows.append([variant, *cells])
        return markdown(["", *MUJOCO], rows)

    tenth = STEPS_1M // 10
    parts = ["Approximate KL divergence of an iteration, first tenth of the steps:", ""]
    parts += [table("approx_kl", 0, tenth, 3), "", "The same, last tenth:", ""]
    parts += [table("approx_kl", STEPS_1M - tenth, STEPS_1M, 3), "", "Return in the second tenth:", ""]
    parts += [table("episodic_return", tenth, 2 * tenth, 0), "", "Entropy in nats, last tenth:", ""]
    return "\n".join([*parts, table("entropy", STEPS_1M - tenth, STEPS_1M, 1)])


def ratio(results: Results, env_id: str, ours: str, theirs: str, total: int, column: str = TRAINING) -> Optional[float]:
    """IQM of a contender's scores over another's, of the seeds that both have: one more on one side is no gain. None
    without such seeds or where theirs broke, -inf where ours did (of five runs one may, and is cut off)."""
    ours, theirs = (results.ranked(env_id, v, total, column) for v in (ours, theirs))
    seeds = ours.index.intersection(theirs.index)
    below = metrics.aggregate_iqm(theirs[seeds]) if len(seeds) else -np.inf
    return metrics.aggregate_iqm(ours[seeds]) / below if np.isfinite(below) else None


def times(ratio: Optional[float]) -> str:
    """A `ratio` as text."""
    return "" if ratio is None else f"{ratio:.2f}" if np.isfinite(ratio) else "broke"


def show_ratios(results: Results, env_ids: tuple[str, ...], ours: str, theirs: str, total: int) -> list[str]:
    """The ratios of the tasks that both have runs of, as text."""
    ratios = {env_id: ratio(results, env_id, ours, theirs, total) for env_id in env_ids}
    return [f"{env_id} {times(x)} x" for env_id, x in ratios.items() if x is not None]


@functools.cache  # thousands of draws, for a figure, a table and a verdict alike
def compare(
    results: Results,
    env_ids: tuple[str, ...],
    ours: str,
    theirs: str,
    total: int,
    column: str = TRAINING,
    comparisons: int = 1,
) -> Optional[Estimate]:
    """P(a run of `ours` scores above a run of `theirs`), or None where a task has no run. The value is of all runs; the
    interval, which needs as many on each task, is of the first seeds."""
    pair = [results.matrix(env_ids, variant, total, column) for variant in (ours, theirs)] if env_ids else [[]]
    if not all(map(len, pair)):
        return None
    tasks = (
        [results.ranked(env_id, v, total, column).to_numpy()[:, None] for v in (ours, theirs)] for env_id in env_ids
    )
    value = np.mean([metrics.probability_of_improvement(*task) for task in tasks])
    return improvement(*pair, comparisons)._replace(value=value)


def side(found: Estimate) -> Optional[Literal["above", "below", "both"]]:
    """Where of 1/2 the interval lies, or None where it is not to be trusted: that takes three seeds a task and five
    runs in all. The bootstrap of three against three is too narrow, one in five is on one side by chance."""
    if found.seeds < 3 or found.seeds * found.tasks < 5:
        return None
    return "above" if found.low > 0.5 else "below" if found.high < 0.5 else "both"


def judge(found: Optional[Estimate], planned: int, claim: Literal["above", "not above", "equal"]) -> tuple[str, str]:
    """What was found, and the verdict on a claim about P(ours above theirs), by the `side` of 1/2 that its interval is
    on. Where it is on both, `equal` and `not above` ask that it excludes more than one standard deviation between
    seeds, which is a P of 3/4."""
    if found is None:
        return "runs are missing", "open"
    text = f"P = {probability(found)}"
    if side(found) is None:
        return text, f"open ({found.seeds} of {planned} seeds)"
    near = found.high < 0.75 and (claim == "not above" or found.low > 0.25)
    verdict = {
        ("above", "above"): "reproduced",
        ("above", "below"): "**not reproduced**, the opposite was seen",
        ("above", "both"): "not decidable here",
        ("not above", "above"): "**not reproduced**",
        ("not above", "below"): "reproduced",
        ("not above", "both"): AGREES if near else "not decidable here",
        ("equal", "above"): "**not reproduced**, ahead",
        ("equal", "below"): "**not reproduced**, behind",
        ("equal", "both"): AGREES if near else "not decidable here",
    }[claim, side(found)]
    return text, verdict + (f" ({found.seeds} of {planned} seeds)" if found.seeds < planned else "")


def judge_tasks(
    results: Results, env_ids: tuple[str, ...], ours: str, theirs: str, total: int, planned: int, claim: str
) -> tuple[str, str]:
    """`judge`, but tasks on which the two differ must not make up for each other where a claim is that they do not."""
    together = compare(results, env_ids, ours, theirs, total)
    text, verdict = judge(together, planned, claim)
    if claim == "above" or together is None or side(together) != "both":
        return text, verdict
    words = {"above": "ahead", "below": "behind"} if claim == "equal" else {"above": "ahead"}
    singles = {e: compare(results, (e,), ours, theirs, total, comparisons=len(env_ids)) for e in env_ids}
    sure = [f"{words[side(found)]} on {e}" for e, found in singles.items() if side(found) in words]
    if sure:
        return text, f"**not reproduced**: {', '.join(sure)}"
    # Fewer than five runs against five decide nothing, but then they do not agree either.
    apart = {e: {1: "above", 0: "below"}.get(found.value) for e, found in singles.items()}
    seen = [f"{words[place]} on {e}" for e, place in apart.items() if place in words]
    return text, f"not decidable here: {', '.join(seen)} in every run" if seen else verdict


def sensitivity(results: Results) -> tuple[str, str]:
    """How much l matters to tanh and to clip, (best - worst) / best of the IQMs over l, and whether it is less to tanh:
    by the interval of the difference, averaged over tasks. A run that broke counts as a return of 0."""
    sweeps = ABLATION_ROWS["3"].values()
    scores = [results.matrix(ABLATION, variant, STEPS_ABLATION) for variants in sweeps for variant in variants]
    seeds = min(map(len, scores))
    if seeds < 3:
        return "runs are missing", f"open ({seeds} of 3 seeds)" if seeds else "open"
    shape = len(sweeps), len(scores) // len(sweeps), len(ABLATION)
    scores = np.concatenate([x[:seeds] for x in scores], axis=1).clip(0)  # (seeds, sweeps * l * tasks)

    def spreads(x: np.ndarray) -> np.ndarray:
        found = trim_mean(x, 0.25, axis=0).reshape(shape)
        return (found.max(1) - found.min(1)) / found.max(1)  # (sweeps, tasks)

    tanh, clip = spreads(scores)
    _, low, high = bootstrap(scores, lambda x: np.diff(spreads(x), axis=0).mean(1))
    verdict = "reproduced" if low[0] > 0 else "**not reproduced**" if high[0] < 0 else "not decidable here"
    text = "; ".join(f"{e} {x:.0%} against {y:.0%}" for e, x, y in zip(ABLATION, tanh, clip))
    return f"{text}; difference [{low[0]:.0%}, {high[0]:.0%}]", verdict


def summary_s1(results: Results) -> list[list[str]]:
    """The paper's Figure S1 and what this repository set out to reach."""
    rows = []
    for env_ids, claim, text in (
        (MUJOCO[1:], "equal", "NFPO performs like PPO on Ant, HalfCheetah, Hopper and Walker2d"),
        (MUJOCO[:1], "above", "NFPO beats PPO on Humanoid"),
    ):
        shown = []
        for env_id in env_ids:
            noisy, deployed = (ratio(results, env_id, "NFPO", "PPO", STEPS_1M, c) for c in (TRAINING, DEPLOYED))
            shown.append(
                f"{env_id}: no pair of runs"
                if noisy is None
                else f"{env_id} {times(noisy)} x, deployed {times(deployed)} x"
            )
        found, verdict = judge_tasks(results, env_ids, "NFPO", "PPO", STEPS_1M, 5, claim)
        rows.append([text, "Fig. S1", "; ".join([*shown, found]), verdict])
    pair = "NFPO", "PPO-mixture"
    env_ids = next((e.env_ids for e in GRID if pair[1] in e.variants), ())
    found, verdict = judge(compare(results, env_ids, *pair, STEPS_1M), 5, "above")
    text = "; ".join([*show_ratios(results, env_ids, *pair, STEPS_1M), found])
    rows.append(["NFPO beats PPO with a mixture of five Gaussians", "a reviewer's question", text, verdict])
    # Is it the flow, or would the Gaussian have gained as much from the learning rate alone?
    pair = "NFPO-std-flat", "PPO-flat"
    fresh = results.without_seed(1)  # the seed that chose this variant from others, and flatters it
    found, verdict = judge(compare(results, MUJOCO, *pair, STEPS_1M), 3, "above")
    shown = show_ratios(results, MUJOCO, *pair, STEPS_1M)
    deployed = compare(results, MUJOCO, *pair, STEPS_1M, DEPLOYED)
    if verdict.startswith("reproduced") and side(deployed) != "above":
        verdict = "not decidable here: in training only"
    claim = "NFPO-std-flat beats PPO-flat, the Gaussian with the same small, constant learning rate"
    others = probability(compare(fresh, MUJOCO, *pair, STEPS_1M))
    text = "; ".join(
        [*shown, found, f"without seed 1, which chose it, {others}", f"deployed P = {probability(deployed)}"]
    )
    rows.append([claim, "our control", text, verdict])
    # The variants that the screen chose from are not among them: of those there is one seed, and it chose.
    variants = [v for e in GRID if e.name == "S1" for v in e.variants if v.startswith("NFPO")]
    reached = {v: [ratio(results, env_id, v, "PPO", STEPS_1M) for env_id in MUJOCO] for v in variants}
    complete = {v: ratios for v, ratios in reached.items() if None not in ratios}
    seeds = {v: min(len(results.ranked(e, w, STEPS_1M)) for e in MUJOCO for w in (v, "PPO")) for v in variants}
    target = "a variant has IQM >= PPO on all five tasks and >= 1.5 x on Humanoid"
    if not complete:
        return [*rows, [target, "our target", "no variant has runs of all five tasks yet", "open"]]

    def rank(variant: str) -> tuple:
        """First whoever reaches it with enough seeds, then whoever is nearest."""
        ratios = complete[variant]
        return seeds[variant] >= 3, min(ratios) >= 1 and ratios[0] >= 1.5, min(*ratios, ratios[0] / 1.5)

    best = max(complete, key=rank)
    shown = f"{best}: " + ", ".join(map(times, complete[best])) + " x PPO"
    if best != "NFPO":
        others = [times(ratio(fresh, env_id, best, "PPO", STEPS_1M)) or "-" for env_id in MUJOCO]
        shown += f"; without seed 1, which chose it, {', '.join(others)}"
    if rank(best)[:2] == (True, True):
        verdict = "reached"
    else:
        verdict = "**fell short**" if min(seeds.values()) >= 3 else "open"
    verdict += f" ({seeds[best]} of 5 seeds)" if seeds[best] < 5 else ""
    return [*rows, [target, "our target", shown, verdict]]


def summary_ablations(results: Results) -> list[list[str]]:
    """Figures 2, 3, 4 and S2."""
    rows = []
    for name, text in (
        ("scale-none", "without a bound (`none`) the determinant grows larger"),
        ("scale-asymmetric", "the determinant of `asymmetric` stays larger"),
    ):
        shown = []
        for env_id in ABLATION:
            ends = [results.ranked(env_id, variant, STEPS_ABLATION, LOG_DET) for variant in (name, "NFPO")]
            if all(map(len, ends)):
                shown.append("{} {:.1f} (tanh {:.1f})".format(env_id, *map(np.median, ends)))
        found, verdict = judge(compare(results, ABLATION, name, "NFPO", STEPS_ABLATION, LOG_DET), 3, "above")
        text += ", the log-determinant at a run's end being above that with `tanh`"
        rows.append([text, "Fig. 2", "; ".join([*shown, found]), verdict])
    # Of the seeds that both have, on each task.
    seeds = {e: min(len(results.rows(e, v, STEPS_ABLATION)) for v in ("scale-none", "NFPO")) for e in ABLATION}
    broke = [
        sum((results.rows(e, v, STEPS_ABLATION).status[:n] == "broke").sum() for e, n in seeds.items())
        for v in ("scale-none", "NFPO")
    ]
    found = f"{broke[0]} of {sum(seeds.values())} runs broke, with tanh {broke[1]}"
    if min(seeds.values()) < 3:
        verdict = "open"
    elif broke[0] <= broke[1]:
        verdict = "**not reproduced** in 500k steps: it breaks no more often"
    else:
        verdict = "reproduced" if broke[0] - broke[1] >= sum(seeds.values()) / 2 else "not decidable here"
    rows.append(["without a bound numbers break in the end", "Fig. 2", found, verdict])
    for text, figure, ours, theirs, env_ids, expected in (
        ("without a bound (`none`) performance is insufficient", "Fig. 2", "NFPO", "scale-none", ABLATION, "above"),
        ("without scales (`zero`) the policy underfits", "Fig. 2", "NFPO", "scale-zero", ABLATION, "above"),
        ("`clip` does about as well as `tanh`", "Fig. 2", "scale-clip", "NFPO", ABLATION, "equal"),
        ("entropy bonus 0.01 does not help", "Fig. 4", "entropy-0.01", "NFPO", ABLATION, "not above"),
        ("action noise 0.05 hurts", "Fig. 4", "NFPO", "noise-0.05", ABLATION, "above"),
        ("action noise 0.2 hurts", "Fig. 4", "NFPO", "noise-0.2", ABLATION, "above"),
        ("2 coupling layers are clearly worse than 4", "Fig. S2", "NFPO", "layers-2", ABLATION, "above"),
        ("6 layers do about as well as 4", "Fig. S2", "layers-6", "NFPO", ABLATION, "equal"),
        ("8 layers do about as well as 4", "Fig. S2", "layers-8", "NFPO", ABLATION, "equal"),
        ("wider networks help on the harder task", "Fig. S2", "hidden-256", "NFPO", ABLATION[:1], "above"),
    ):
        planned = 3 if env_ids == ABLATION else 5
        found, verdict = judge_tasks(results, env_ids, ours, theirs, STEPS_ABLATION, planned, expected)
        shown = [f"{ours} over {theirs}: {x}" for x in show_ratios(results, env_ids, ours, theirs, STEPS_ABLATION)]
        rows.append([text, figure, "; ".join([*shown, found]), verdict])
    others = {v: None for v in ABLATION_ROWS["3"]["l * tanh(s)"] if v != "NFPO"}
    for v in others:
        others[v] = compare(results, ABLATION, v, "NFPO", STEPS_ABLATION, comparisons=len(others))
    claim = "l = 0.5 is a good default: no other is better"
    if all(others.values()):
        best = max(others, key=lambda v: others[v].low)
        seeds = min(found.seeds for found in others.values())
        found, verdict = judge(others[best]._replace(seeds=seeds), 3, "not above")
        rows.append([claim, "Fig. 3", f"the best other: {best}: {found}", verdict])
    else:
        rows.append([claim, "Fig. 3", "runs are missing", "open"])
    found, verdict = sensitivity(results)
    return [
        *rows,
        ["tanh is less sensitive to l than clip", "Fig. 3", f"(best - worst) / best over l: {found}", verdict],
    ]


def summary_gridworld(results: Results) -> list[list[str]]:
    """Figure 6: a line a board."""
    path = results.folder / "gridworld.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["board", "contender"])
    rows = []
    for board, claim in (
        ("GridWorld", "a flow keeps several ways to the goal, a Gaussian one; target: >= 1 bit against < 0.3"),
        ("JumpWorld", "the same, where only aimed actions pay"),
    ):
        found = dict(list(table[table.board == board].groupby("contender")))
        if not {"NFPO", "PPO"} <= found.keys():
            rows.append([claim, "Fig. 6", "no runs yet", "open"])
            continue
        bits = {name: group.entropy_bits.median() for name, group in found.items()}
        shown = [
            f"{name}: median of {len(group)} seeds {bits[name]:.2f} bit, "
            f"untrained {group.untrained_bits.median():.2f}, success {group.success_rate.median():.2f}, "
            f"{group.modes.max()} mode(s) at the start at most"
            for name, group in found.items()
        ]
        verdict = "target reached" if bits["NFPO"] >= 1 and bits["PPO"] < 0.3 else "target **fell short**"
        if bits["NFPO"] >= 1 and found["NFPO"].modes.median() < 2:
            verdict += ", **but by breadth**: at the start the flow's density has one mode"
        more = improvement(*(found[name].entropy_bits.to_numpy()[:, None] for name in ("NFPO", "PPO")))
        text, claimed = judge(more, 5, "above")
        rows.append([claim, "Fig. 6", "; ".join([*shown, f"NFPO over PPO: {text}"]), f"{verdict}; claim: {claimed}"])
    return rows


def speed_rounds(results: Results) -> dict[str, pd.DataFrame]:
    """Environment to wall-clock seconds of whole runs, one row a round and one column a contender, from speed.csv."""
    path = results.folder / "speed.csv"
    if not path.exists():
        return {}
    speed = pd.read_csv(path)
    speed = speed[speed.what.str.startswith("seconds")].astype({"value": float})
    speed["round"] = 1 + speed.groupby(["env_id", "contender"]).cumcount()
    by_env = speed.groupby("env_id", sort=False)
    return {env_id: rows.pivot(index="round", columns="contender", values="value") for env_id, rows in by_env}


def summary_cost(results: Results) -> list[list[str]]:
    """What the flow costs: medians of the ratios within a round, since the machine's speed changes between rounds."""
    seconds = speed_rounds(results)
    rows = []
    for env_id, theirs, text, limit in (
        ("Humanoid-v4", "ppo", "wall clock against PPO (the Gaussian twin)", 1.10),
        ("Humanoid-v4", "cleanrl", "speed against CleanRL's PPO, Humanoid", 2.0),
        ("HalfCheetah-v4", "cleanrl", "speed against CleanRL's PPO, HalfCheetah", 2.5),
    ):
        if env_id not in seconds or not {"nfpo", theirs} <= set(seconds[env_id]):
            continue
        ratios = seconds[env_id].nfpo / seconds[env_id][theirs]
        if theirs == "ppo":
            target, source = f"<= {limit:g} x", "Tab. S2: 1.19 x on the robot g1"
        else:
            target, source, ratios = f">= {limit:g} x", "our target", 1 / ratios
        value, each = ratios.median(), ", ".join(f"{ratio:.2f}" for ratio in ratios)
        good = value <= limit if theirs == "ppo" else value >= limit
        verdict = "reached" if good else "**fell short**"
        if ratios.min() < limit < ratios.max():
            verdict += ", by the median: rounds are on both sides"
        rows.append([f"{text}; target {target}", source, f"{value:.2f} x (rounds: {each})", verdict])
    return rows


def summary(results: Results) -> str:
    """Claim, paper, here, verdict: one line a claim."""
    parts = summary_s1, summary_ablations, summary_gridworld, summary_cost
    return markdown(["Claim or target", "Source", "Here", "Verdict"], [row for part in parts for row in part(results)])


def state(results: Results) -> str:
    """How much of the grid stands, experiment by experiment."""
    have = {Run(*key) for key in results.runs[KEY].itertuples(index=False)}
    rows = {}
    for experiment in GRID:
        wanted = {
            Run(env_id, variant, seed, experiment.total_timesteps)
            for env_id in experiment.env_ids
            for variant in experiment.variants
            for seed in range(1, experiment.seeds + 1)
        }
        rows[experiment.name] = rows.get(experiment.name, set()) | wanted
    shown = [f"Figure {name}: {len(wanted & have)} of {len(wanted)}" for name, wanted in rows.items()]
    return "Runs that stand, of those the grid wants: " + ", ".join(shown) + "."


def table_ablation(results: Results, name: str) -> str:
    """The scores behind an ablation's figure."""
    parts = []
    for title, variants in ABLATION_ROWS[name].items():
        scores = table_scores(results, ABLATION, variants, STEPS_ABLATION, TRAINING)
        parts += [f"{title}, return over the last 100 training episodes:", "", scores, ""]
    return "\n".join(parts).rstrip()


def table_gridworld(results: Results) -> str:
    """Every run of Figure 6, from multimodality.py's file."""
    path = results.folder / "gridworld.csv"
    if not path.exists():
        return "No runs yet."
    table = pd.read_csv(path)
    return markdown([name.replace("_", " ") for name in table], table.astype(object).to_numpy().tolist())


def table_cost(results: Results) -> str:
    """Value and, in brackets, its ratio to PPO's, from cost.py's file."""
    path = results.folder / "cost.csv"
    if not path.exists():
        return "Not measured yet."
    parts = []
    for sizes, group in pd.read_csv(path).groupby(["env_id", "obs_dim", "action_dim"], sort=False):
        names = list(dict.fromkeys(group.contender))
        rows = []
        for what, cells in group.groupby("what", sort=False):
            by_name = {c.contender: f"{c.value:,.0f} ({c.relative_to_ppo:.2f} x)" for c in cells.itertuples()}
            rows.append([what, *(by_name.get(name, "") for name in names)])
        parts.append(markdown(["{}: {} observations, {} actions".format(*sizes), *names], rows))
    return "\n\n".join(parts)


def table_speed(results: Results) -> str:
    """Seconds of whole runs, round by round, and medians of the ratios within a round."""
    parts = []
    for env_id, seconds in speed_rounds(results).items():
        heads = [env_id, *(f"round {number}, s" for number in seconds.index)]
        rows = {
            name: [SPEED_NAMES[name], *(f"{x:.0f}" for x in seconds[name])] for name in SPEED_NAMES if name in seconds
        }
        for head, other, sign in (("speed / CleanRL's", "cleanrl", -1), ("time / twin's", "ppo", 1)):
            if other in seconds:
                heads.append(head)
                for name, row in rows.items():
                    row.append(f"{((seconds[name] / seconds[other]) ** sign).median():.2f}")
        parts.append(markdown(heads, list(rows.values())))
    return "\n\n".join(parts) or "Not measured yet."


def write_readme(path: Path, parts: dict[str, str]) -> None:
    """Put each part between its markers. Exits with one line where a marker is missing."""
    text = path.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- report: {name} -->", f"<!-- end: {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            sys.exit(f"error: {path} needs the markers {begin} and {end}, once each")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


def main() -> None:
    args = tyro.cli(ReportArgs, description=__doc__.split("\n")[0])
    ended = [path.parent for path in args.runs_dir.glob("*/run.json")]
    collect(ended, args.results)
    results = Results(args.results)
    print(f"{len(ended)} ended runs in {args.runs_dir}; {len(results.runs)} in {args.results / 'runs.csv'}")
    figure_s1(results, args.figures)
    figure_s1_aggregate(results, args.figures)
    figure_s1_updates(results, args.figures)
    for name in ABLATION_ROWS:
        figure_ablation(results, name, args.figures)
    pages = {"S1": table_s1(results), **{name: table_ablation(results, name) for name in ABLATION_ROWS}}
    pages |= {"updates": table_updates(results), "6": table_gridworld(results), "cost": table_cost(results)}
    pages["speed"] = table_speed(results)
    parts = {"summary": summary(results), "state": state(results)}
    for name, text in pages.items():
        # A picture is shown where there is one: a figure without runs is not drawn.
        pictures = [f"![{path}](figures/{path})\n" for path in PICTURES[name] if (args.figures / path).exists()]
        parts[name] = "\n".join([*pictures, text])
    write_readme(args.readme, parts)
    write_readme(args.docs, {"results": table_docs(results)})
    print(state(results))


if __name__ == "__main__":
    main()
