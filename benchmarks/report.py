"""The report: from the tables of finished runs to the figures and the tables of the pages.

Run:     python benchmarks/report.py                # after benchmarks/run.py, at any time, finished or not
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

What has ended in the runs folder is added to `results/` first. Figures and tables are then made from `results/` alone,
so that a fresh clone, which has no runs, gives the same ones. A table goes between `<!-- report: NAME -->` and
`<!-- end: NAME -->` on every page that has these markers. Statistics are those of Agarwal et al. (2021): interquartile
mean (IQM) over seeds, probability of improvement, and 95 % intervals by the stratified bootstrap of their rliable.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Optional

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from rliable import library

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import run  # noqa: E402
from benchmarks.run import ABLATION, DEPLOYED, KEY, MUJOCO, ROOT, TRAINING  # noqa: E402

Tasks = tuple[str, ...]
LOG_DET, ENTROPY = "last_log_det", "entropy_bits"  # the log-determinant at a run's end; of the goals that it reaches
SCORES = {TRAINING: "over the last 100 training episodes", DEPLOYED: "as deployed, at temperature 0"}
RESAMPLES = 2000  # rliable's own 50,000 are slow, and an interval's second digit settles long before
ROWS = [  # of the ablations' figures: which figure, of what, and its curves
    ("2", "scale function, l = 0.5", ["NFPO", "scale-none", "scale-zero", "scale-clip", "scale-asymmetric"]),
    ("3", "l * tanh(s)", ["tanh-0.1", "tanh-0.25", "NFPO", "tanh-1", "tanh-2"]),
    ("3", "clamp(s, -l, l)", ["clip-0.1", "clip-0.25", "scale-clip", "clip-1", "clip-2"]),
    ("4", "entropy coefficient", ["NFPO", "entropy-0.001", "entropy-0.01"]),
    ("4", "action noise", ["NFPO", "noise-0.05", "noise-0.2"]),
    ("S2", "coupling layers", ["layers-2", "NFPO", "layers-6", "layers-8"]),
    ("S2", "hidden dimension", ["hidden-32", "NFPO", "hidden-128", "hidden-256"]),
]
TANH, CLIP = ROWS[1][2], ROWS[2][2]
# Source, claim, ours, theirs, tasks, what is claimed of P(ours above theirs), and the score where it is no return.
CLAIMS = [
    ("Figure S1", "NFPO beats PPO on Humanoid", "NFPO", "PPO", MUJOCO[:1], "above"),
    ("Figure S1", "NFPO performs like PPO on the other four tasks", "NFPO", "PPO", MUJOCO[1:], "equal"),
    ("Figure S1b", "today's defaults: NFPO beats PPO on Humanoid", "NFPO", "PPO", MUJOCO[:1], "above"),
    ("Figure S1b", "today's defaults: NFPO performs like PPO on the other four", "NFPO", "PPO", MUJOCO[1:], "equal"),
    ("Figure S1", "NFPO beats PPO with a mixture of five Gaussians", "NFPO", "PPO-mixture", MUJOCO[:3:2], "above"),
    ("Figure S1", "our control: NFPO-std-flat beats PPO-flat", "NFPO-std-flat", "PPO-flat", MUJOCO, "above"),
    ("Figure 6", "a flow keeps several ways to the goal", "NFPO", "PPO", ("GridWorld",), "above", ENTROPY),
    ("Figure 6", "the same, where only aimed actions pay", "NFPO", "PPO", ("JumpWorld",), "above", ENTROPY),
    ("Figure S2", "2 coupling layers are clearly worse than 4", "NFPO", "layers-2", ABLATION, "above"),
    ("Figure S2", "6 layers do about as well as 4", "layers-6", "NFPO", ABLATION, "equal"),
    ("Figure S2", "8 layers do about as well as 4", "layers-8", "NFPO", ABLATION, "equal"),
    ("Figure S2", "wider networks help on the harder task", "hidden-256", "NFPO", ABLATION[:1], "above"),
    ("Figure 4", "entropy bonus 0.01 does not help", "entropy-0.01", "NFPO", ABLATION, "not above"),
    ("Figure 4", "action noise 0.05 hurts", "NFPO", "noise-0.05", ABLATION, "above"),
    ("Figure 4", "action noise 0.2 hurts", "NFPO", "noise-0.2", ABLATION, "above"),
    ("Figure 2", "with no bound (`none`) the determinant is larger", "scale-none", "NFPO", ABLATION, "above", LOG_DET),
    ("Figure 2", "with `asymmetric` the determinant is larger", "scale-asymmetric", "NFPO", ABLATION, "above", LOG_DET),
    ("Figure 2", "with no bound (`none`) performance is insufficient", "NFPO", "scale-none", ABLATION, "above"),
    ("Figure 2", "without scales (`zero`) the policy underfits", "NFPO", "scale-zero", ABLATION, "above"),
    ("Figure 2", "`clip` does about as well as `tanh`", "scale-clip", "NFPO", ABLATION, "equal"),
]


@dataclasses.dataclass
class ReportArgs:
    runs_dir: Path = ROOT / "runs" / "grid"  # the grid's runs; what has ended replaces an earlier run of its name
    results: Path = run.RESULTS  # folder of the CSV files
    figures: Path = ROOT / "benchmarks" / "figures"  # folder of the figures
    pages: tuple[Path, ...] = (ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))  # with markers


class Estimate(NamedTuple):
    """A statistic with its 95 % interval and the numbers of seeds and tasks it comes from."""

    value: float
    low: float
    high: float
    seeds: int
    tasks: int = 1


def bootstrap(scores, statistic: Callable, level: float = 0.95, fewer: int = 1) -> tuple[np.ndarray, ...]:
    """Value, lower and upper end of a statistic (K,) of scores (seeds, tasks, ...), or of a pair of such."""
    arrays = scores if isinstance(scores, list) else [scores]
    if all(len(x) == 1 for x in arrays):  # one seed has no interval, and nothing to draw from
        return (statistic(*arrays),) * 3
    np.random.seed(0)  # rliable draws from the global generator: the same results give the same table
    options = {"reps": RESAMPLES // fewer, "confidence_interval_size": level}
    values, intervals = library.get_interval_estimates({"": scores}, statistic, **options)
    return values[""], *intervals[""]


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the first axis, which is scipy's `trim_mean` by a quarter, but ten times as fast."""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0)


def improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """P(a run of ours scores above a run of theirs), averaged over tasks, (1,); both are (seeds, tasks)."""
    return np.array([np.mean(ours[:, None] > theirs) + np.mean(ours[:, None] == theirs) / 2])


def read(paths: Iterable[Path], columns: list[str]) -> pd.DataFrame:
    """CSV files in one; without any, an empty one with these columns."""
    found = [pd.read_csv(path) for path in sorted(paths) if path.exists()]
    return pd.concat(found) if found else pd.DataFrame(columns=columns)


class Results:
    """Every run that some experiments of the grid want, with its scores where it has been made."""

    def __init__(self, runs: pd.DataFrame, curves: Optional[pd.DataFrame] = None):
        self.runs, self.curves = runs.copy(), curves
        self.runs.loc[runs.status == "broke", [TRAINING, DEPLOYED]] = -np.inf  # below all that did not
        self.variants = list(dict.fromkeys(runs.variant[runs.status.notna()]))  # of which there are runs, in order

    @classmethod
    def load(cls, folder: Path, *names: str) -> "Results":
        """From the CSV files, the runs of the experiments of these names."""
        grid = [experiment for experiment in run.GRID if experiment.name in names]
        wanted = pd.DataFrame(run.select(run.RunArgs(), grid) if grid else [], columns=run.Run._fields)
        key = pd.MultiIndex.from_frame(wanted[KEY])
        tables = {run.table(edition, folder) for edition in wanted.edition}
        runs = read(tables, [*KEY, "status", TRAINING, DEPLOYED]).set_index(KEY).reindex(key).reset_index()
        files = {run.curve_file(edition, folder, env_id) for env_id, edition in zip(wanted.env_id, wanted.edition)}
        curves = read(files, [*KEY, "step", *run.SCALARS]).set_index(KEY)
        runs[LOG_DET] = curves.sort_values("step").groupby(KEY).log_det.last().reindex(key).to_numpy()
        return cls(runs, curves[curves.index.isin(key[runs.status == "finished"])].reset_index())

    def scores(self, env_id: str, variant: str, column: str = TRAINING) -> pd.Series:
        """One score a seed, in the order of the seeds; -inf for a run that broke."""
        rows = self.runs[(self.runs.env_id == env_id) & (self.runs.variant == variant)]
        return rows.set_index("seed")[column].astype(float).dropna().sort_index()

    def matrix(self, env_ids: Iterable[str], variant: str, column: str = TRAINING) -> np.ndarray:
        """Scores (seeds, tasks), of as many seeds as all tasks have."""
        scores = [self.scores(env_id, variant, column).to_numpy() for env_id in env_ids]
        return np.stack([x[: min(map(len, scores))] for x in scores], axis=1)

    def planned(self, env_ids: Iterable[str], *variants: str) -> int:
        """How many seeds the grid wants of each of these variants on each of these tasks."""
        counts = self.runs.value_counts(["env_id", "variant"])
        return min((counts.get(cell, 0) for cell in itertools.product(env_ids, variants)), default=0)

    def curve(self, env_id: str, variant: str, column: str) -> pd.DataFrame:
        """One row a seed and one column a step, of the runs that did not break. A bin without an episode takes what
        lies around it, and the curves end where the first seed's ends."""
        rows = self.curves[(self.curves.env_id == env_id) & (self.curves.variant == variant)]
        table = rows.pivot(index="seed", columns="step", values=column).astype(float)
        return table.interpolate(axis=1, limit_area="inside").bfill(axis=1).dropna(axis=1)


@functools.cache  # for a table and a verdict alike
def compare(results: Results, env_ids: Tasks, ours: str, theirs: str, column=TRAINING, several=1) -> Optional[Estimate]:
    """P(a run of `ours` scores above a run of `theirs`), or None where a task has no run. The value is of all runs; the
    interval, which needs as many on each task, is of the first seeds. It is wider where it is one of `several`
    comparisons, so that 95 % holds for all of them (Bonferroni)."""
    pair = [results.matrix(env_ids, variant, column) for variant in (ours, theirs)] if env_ids else [[]]
    if not all(map(len, pair)):
        return None
    _, low, high = bootstrap(pair, improvement, 1 - 0.05 / several)
    tasks = [[results.matrix([env_id], variant, column) for variant in (ours, theirs)] for env_id in env_ids]
    value = np.mean([improvement(*task) for task in tasks])
    return Estimate(value, low[0], high[0], min(map(len, pair)), len(env_ids))


def ratio(results: Results, env_id: str, ours: str, theirs: str, column: str = TRAINING) -> str:
    """IQM of a contender's scores over another's, of the seeds that both have: one more on one side is no gain. Empty
    without such seeds or where theirs broke, `broke` where ours did (of five runs one may, and is cut off)."""
    ours, theirs = (results.scores(env_id, variant, column) for variant in (ours, theirs))
    seeds = ours.index.intersection(theirs.index)
    above, below = (iqm(x[seeds].to_numpy()) if len(seeds) else -np.inf for x in (ours, theirs))
    return "" if below == -np.inf else "broke" if above == -np.inf else f"{above / below:.2f} x"


def side(found: Estimate) -> Optional[str]:
    """Where of 1/2 the interval lies, or None where it is not to be trusted: that takes three seeds a task and five
    runs in all. The bootstrap of three against three is too narrow, one in five is on one side by chance."""
    if found.seeds < 3 or found.seeds * found.tasks < 5:
        return None
    return "above" if found.low > 0.5 else "below" if found.high < 0.5 else "both"


def probability(found: Optional[Estimate]) -> str:
    """An estimate of `compare` as text; of one or two seeds an interval would only pretend to be one."""
    if found is None:
        return "-"
    few = f" (from {found.seeds} seed{'s' * (found.seeds > 1)} a task)"
    return f"{found.value:.2f}" + (f" [{found.low:.2f}, {found.high:.2f}]" if found.seeds > 2 else few)


def judge(found: Optional[Estimate], planned: int, claim: str) -> tuple[str, str]:
    """What was found, and the verdict on a claim about P(ours above theirs), by the `side` of 1/2 that its interval is
    on. Where it is on both, `equal` and `not above` ask that it excludes more than one standard deviation between
    seeds, which is a P of 3/4. With `any`, nothing is claimed."""
    if found is None:
        return "runs are missing", "open"
    text = f"P = {probability(found)}"
    if side(found) is None:
        return text, f"open ({found.seeds} of {planned} seeds)"
    near = found.high < 0.75 and (claim == "not above" or found.low > 0.25)
    both = "agrees: no difference seen" if near and claim in ("equal", "not above") else "not decidable here"
    verdict = {
        "above": {"above": "reproduced", "below": "**not reproduced**, the opposite was seen"},
        "not above": {"above": "**not reproduced**", "below": "reproduced"},
        "equal": {"above": "**not reproduced**, ahead", "below": "**not reproduced**, behind"},
        "any": {"above": "ahead", "below": "behind"},
    }[claim].get(side(found), both)
    return text, verdict + (f" ({found.seeds} of {planned} seeds)" if found.seeds < planned else "")


def judge_tasks(
    results: Results, env_ids: Tasks, ours: str, theirs: str, claim: str, column=TRAINING
) -> tuple[str, str]:
    """`judge`, but tasks on which the two differ must not make up for each other where a claim is that they do not."""
    together = compare(results, env_ids, ours, theirs, column)
    text, verdict = judge(together, results.planned(env_ids, ours, theirs), claim)
    if claim == "above" or together is None or side(together) != "both":
        return text, verdict
    words = {"above": "ahead"} if claim == "not above" else {"above": "ahead", "below": "behind"}
    singles = {e: compare(results, (e,), ours, theirs, column, len(env_ids)) for e in env_ids}
    sure = ", ".join(f"{words[side(found)]} on {e}" for e, found in singles.items() if side(found) in words)
    if sure:
        return text, f"{verdict}; {sure}" if claim == "any" else f"**not reproduced**: {sure}"
    # Fewer than five runs against five decide nothing, but then they do not agree either.
    apart = {e: {1: "above", 0: "below"}.get(found.value) for e, found in singles.items()}
    seen = ", ".join(f"{words[place]} on {e}" for e, place in apart.items() if place in words)
    return text, f"not decidable here: {seen} in every run" if seen else verdict


def verdict(results: Results, text: str, ours: str, theirs: str, env_ids: Tasks, claim: str, column=TRAINING) -> list:
    """A line of the table of verdicts: claim, what was found, verdict."""
    shown = []
    for env_id in env_ids:
        ratios = [ratio(results, env_id, ours, theirs, which) for which in SCORES]
        if column == TRAINING and all(ratios):
            shown.append(f"{env_id} {', deployed '.join(ratios)}")
        elif column != TRAINING:
            mine, other = (results.scores(env_id, variant, column).median() for variant in (ours, theirs))
            shown.append(f"{env_id} {mine:.2f} against {other:.2f}")
    found, decided = judge_tasks(results, env_ids, ours, theirs, claim, column)
    if ours == "NFPO-std-flat":  # the control: ahead with the noise on, and not without it, is no verdict
        deployed = compare(results, env_ids, ours, theirs, DEPLOYED)
        found += f"; deployed P = {probability(deployed)}"
        if decided.startswith("reproduced") and side(deployed) != "above":
            decided = "not decidable here: in training only"
    return [text, f"{ours} against {theirs}: {'; '.join([*shown, found])}", decided]


def verdict_broken(results: Results) -> list[str]:
    """Whether numbers break without a bound, of the seeds that both have on each task."""
    pair = "scale-none", "NFPO"
    seeds = {e: min(len(results.scores(e, v)) for v in pair) for e in ABLATION}
    broke, usual = (sum((results.scores(e, v)[:n] == -np.inf).sum() for e, n in seeds.items()) for v in pair)
    decided = "reproduced" if broke - usual >= sum(seeds.values()) / 2 else "not decidable here"
    decided = decided if broke > usual else "**not reproduced** in 500k steps: it breaks no more often"
    found = f"{broke} of {sum(seeds.values())} runs broke, with tanh {usual}"
    return ["with no bound (`none`) numbers break in the end", found, decided if min(seeds.values()) >= 3 else "open"]


def verdict_bound(results: Results) -> list[str]:
    """The best other l against l = 0.5; its interval is that of the best of several."""
    text, others = "l = 0.5 is a good default: no other is better", [v for v in TANH if v != "NFPO"]
    found = {v: compare(results, ABLATION, v, "NFPO", several=len(others)) for v in others}
    if None in found.values():
        return [text, "runs are missing", "open"]
    best = max(found, key=lambda variant: found[variant].low)
    fewest = found[best]._replace(seeds=min(estimate.seeds for estimate in found.values()))
    shown, decided = judge(fewest, 3, "not above")
    return [text, f"the best other: {best}: {shown}", decided]


def verdict_sensitivity(results: Results) -> list[str]:
    """How much l matters to tanh and to clip, (best - worst) / best of the IQMs over l, and whether it is less to tanh:
    by the interval of the difference, averaged over tasks. A run that broke counts as a return of 0."""
    text, scores = "tanh is less sensitive to l than clip", [results.matrix(ABLATION, v) for v in (*TANH, *CLIP)]
    seeds = min(map(len, scores))
    if seeds < 3:
        return [text, "runs are missing", f"open ({seeds} of 3 seeds)"]
    scores = np.concatenate([x[:seeds] for x in scores], axis=1).clip(0)  # (seeds, sweeps * l * tasks)

    def spreads(x: np.ndarray) -> np.ndarray:
        found = iqm(x).reshape(2, len(TANH), len(ABLATION))
        return (found.max(1) - found.min(1)) / found.max(1)  # (sweeps, tasks)

    _, (low,), (high,) = bootstrap(scores, lambda x: np.diff(spreads(x), axis=0).mean(1))
    shown = "; ".join(f"{e} {x:.0%} against {y:.0%}" for e, x, y in zip(ABLATION, *spreads(scores)))
    decided = "reproduced" if low > 0 else "**not reproduced**" if high < 0 else "not decidable here"
    return [text, f"(best - worst) / best over l: {shown}; difference [{low:.0%}, {high:.0%}]", decided]


def markdown(frame: pd.DataFrame, corner: str = "") -> str:
    """A table of texts as the pages have it."""
    if frame.empty:
        return "No runs yet."
    lines = [[corner, *frame], *frame.fillna("-").itertuples()]
    head, *body = ("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return "\n".join([head, "|-" * len(lines[0]) + "|", *body])


def summary(s1: Results, s1b: Results, ablations: Results, boards: Results) -> str:
    """The table of verdicts: one line a claim, with a link to the details."""
    of = {"Figure S1": s1, "Figure S1b": s1b, "Figure 6": boards}
    rows = [[source, *verdict(of.get(source, ablations), *claim)] for source, *claim in CLAIMS]
    rows += [["Figure 2", *verdict_broken(ablations)], ["Figure 3", *verdict_bound(ablations)]]
    rows += [["Figure 3", *verdict_sensitivity(ablations)]]
    table = pd.DataFrame(rows, columns=["Details", "Claim", "Here", "Verdict"]).set_index("Claim")
    pages = {"Figure S1b": "README.md", "Figure 6": "../docs/results_multimodality.md"}
    links = [(name, pages.get(name, "../docs/results_first_edition.md"), name.lower()) for name in table.Details]
    table["Details"] = [f"[{name}]({page}#{anchor.replace(' ', '-')})" for name, page, anchor in links]
    return markdown(table[["Here", "Verdict", "Details"]], "Claim")


@functools.cache  # two pages show the same cells
def cell(results: Results, env_id: str, variant: str, column: str) -> str:
    """IQM and interval of the runs that did not break, their number where there are few, and how many broke."""
    scores = results.scores(env_id, variant, column)
    fine, broke = scores[scores > -np.inf].to_numpy()[:, None], (scores == -np.inf).sum()
    text = "-"
    if len(fine):
        (value,), (low,), (high,) = bootstrap(fine, iqm)
        text = f"{value:.0f}" + (f" [{low:.0f}, {high:.0f}]" if len(fine) > 1 else "")
        text += f" ({len(fine)})" if len(fine) < max(5, results.planned([env_id], variant)) else ""
    return text + (f", {broke} broke" if broke else "")


def table_scores(results: Results, env_ids: Tasks, variants: list[str], what="Return", columns=tuple(SCORES)) -> str:
    """IQM and interval of each variant on each task, a table for each score."""
    parts = []
    for column in columns:
        cells = {env_id: [cell(results, env_id, variant, column) for variant in variants] for env_id in env_ids}
        parts += [f"{what} {SCORES[column]}:", markdown(pd.DataFrame(cells, index=variants))]
    return "\n\n".join(parts)


def table_above_ppo(results: Results) -> str:
    """P(a run is above a run of PPO), task by task and over all that both have, and the verdict."""
    parts = []
    for column, text in SCORES.items():
        rows = {}
        for variant in [variant for variant in results.variants if variant != "PPO"]:
            single = {env_id: compare(results, (env_id,), variant, "PPO", column) for env_id in MUJOCO}
            both = tuple(env_id for env_id, found in single.items() if found)
            found, decided = judge_tasks(results, both, variant, "PPO", "any", column)
            few = "" if len(both) == len(MUJOCO) else f", {len(both)} of {len(MUJOCO)} tasks"
            cells = {env_id: probability(found) for env_id, found in single.items()}
            rows[variant] = {**cells, "all tasks": found.removeprefix("P = ") + few, "verdict": decided}
        parts += [f"P(a run is above a run of PPO), return {text}:", markdown(pd.DataFrame(rows).T)]
    return "\n\n".join(parts)


def table_boxes(results: Results) -> str:
    """The return of each seed in each box."""
    parts = []
    for column, text in SCORES.items():
        table = results.runs.pivot(index="env_id", columns="seed", values=column)
        table.index = table.index.str.split(":").str[-1]
        parts += [f"Return {text}:", markdown(table.map("{:.0f}".format, na_action="ignore"), "seed")]
    return "\n\n".join(parts)


def table_tuning(results: Results) -> str:
    """Mean over tasks of the return of each setting, divided by the best of any on the task; the best of a contender is
    bold once all of its runs are there. A run that broke earned nothing."""
    score = results.runs[TRAINING].replace(-np.inf, 0)
    contender, setting = results.runs.variant.str.extract(r"(.+)-(lr.+-e\d+)$").to_numpy().T
    means = score.groupby([setting, contender, results.runs.env_id]).mean().unstack()
    means = (means / means.max()).mean(axis=1).unstack()  # (settings, contenders)
    missing = score.isna().groupby([setting, contender]).sum().unstack()
    text = means.map("{:.2f}".format).replace("nan", "-")
    text = text.mask((means == means.max()) & (missing.sum() == 0), "**" + text + "**")
    return markdown(text.mask(missing > 0, missing.map("{:.0f} runs missing".format)), "setting")


def figure(results: Results, path: Path, rows: list[tuple], columns=("episodic_return",)) -> str:
    """Draw IQM over seeds with its interval, a line a variant. A row is (title of its legend, variants, environments).
    Returns the line that shows the figure on a page, empty where there are no runs."""
    if not results.variants:
        return ""
    width = max(len(columns) * len(env_ids) + bool(title) for title, _, env_ids in rows)
    picture = Figure(figsize=(4.3 * width, 3.7 * len(rows)), layout="constrained")
    for (title, variants, env_ids), places in zip(rows, picture.subplots(len(rows), width, squeeze=False)):
        panels = list(itertools.product(env_ids, columns))
        colors = {v: color for v, color in zip(variants, matplotlib.colormaps["tab10"].colors) if v in results.variants}
        for axes, (env_id, column) in zip(places, panels):
            for variant, color in colors.items():
                lines = results.curve(env_id, variant, column)
                if lines.size:
                    middle, *band = bootstrap(lines.to_numpy()[:, None], lambda x: iqm(x)[0], fewer=5)
                    axes.plot(lines.columns / 1e6, middle, color=color)
                    axes.fill_between(lines.columns / 1e6, *band, color=color, alpha=0.2, linewidth=0)
            axes.set(title=env_id, xlabel="million steps", ylabel=column.replace("_", " "))
            axes.grid(alpha=0.25)
        for axes in places[len(panels) :]:
            axes.axis("off")
        for variant, color in colors.items() if title else ():
            places[len(panels)].plot([], [], color=color, label=variant)
            places[len(panels)].legend(loc="center", title=title)
    picture.savefig(path, dpi=100, metadata={"Software": None})
    return f"![{path.name}](figures/{path.name})\n\n"


def write(pages: Iterable[Path], figures: Path, parts: dict[str, str]) -> None:
    """Put each part between its markers. Exits with one line where no page has them."""
    for name, part in parts.items():
        begin, end = f"<!-- report: {name} -->\n", f"<!-- end: {name} -->"
        there = [page for page in pages if begin in page.read_text() and end in page.read_text()]
        if not there:
            sys.exit(f"error: no page has the markers {begin.strip()} and {end}")
        for page in there:
            before, rest = page.read_text().split(begin)
            text = part.replace("](figures/", f"]({os.path.relpath(figures, page.parent)}/")
            page.write_text(f"{before}{begin}{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    args = tyro.cli(ReportArgs, description=__doc__.split("\n")[0])
    run.collect([path.parent for path in args.runs_dir.glob("*/run.json")], args.results)  # what has ended
    args.figures.mkdir(parents=True, exist_ok=True)
    load = functools.partial(Results.load, args.results)
    s1, screened, s1b, ablations = load("S1"), load("S1", "S1-screen"), load("S1b"), load(*(row[0] for row in ROWS))
    boards = read([args.results / "gridworld.csv"], ["board", "contender", "seed", ENTROPY])
    boards = Results(boards.rename(columns={"board": "env_id", "contender": "variant"}).assign(status="finished"))
    parts = {"summary": summary(s1, s1b, ablations, boards), "results": table_scores(screened, MUJOCO, s1.variants)}
    parts |= {"boxes": table_boxes(load("boxes")), "tuning": table_tuning(load("tuning"))}
    for name, results, variants in ("S1", screened, s1.variants), ("S1b", s1b, s1b.variants):
        rows = [("", variants, MUJOCO[:3]), ("contenders", variants, MUJOCO[3:])]
        picture = figure(results, args.figures / f"figure_{name}.png", rows)
        parts[name] = picture + "\n\n".join([table_scores(results, MUJOCO, results.variants), table_above_ppo(results)])
    for name in ("2", "3", "4", "S2"):
        rows = [(title, variants, ABLATION) for which, title, variants in ROWS if which == name]
        columns = ("episodic_return", "log_det") if name == "2" else ("episodic_return",)
        tables = [table_scores(ablations, tasks, vs, f"{title}, return", [TRAINING]) for title, vs, tasks in rows]
        parts[name] = figure(ablations, args.figures / f"figure_{name}.png", rows, columns) + "\n\n".join(tables)
    write(args.pages, args.figures, parts)


if __name__ == "__main__":
    main()
