"""Learning curves of runs as CSV and as a picture.

Run:     python benchmarks/learning_curve.py runs/Humanoid-v4__*
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

Writes `benchmarks/results/<env_id>.csv` (one row for each run and bin of 10,000 steps: mean return and length of the
episodes that ended in it, update statistics) and, drawn from that file alone, `benchmarks/figures/<env_id>.png`. Prints
for every run the mean return of its last 100 episodes. Runs already in the file stay, runs given again are replaced.
"""

import csv
import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).resolve().parent
BIN = 10_000
SCALARS = (
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/SPS",
    "losses/approx_kl",
    "losses/clipfrac",
    "losses/value_loss",
    "losses/explained_variance",
    "losses/entropy",
    "flow/log_det",
    "flow/scale_abs_mean",
    "flow/scale_saturation",
)
COLUMNS = ("contender", "seed", "step", *SCALARS, "last_100_episodes")


@dataclasses.dataclass
class CurveArgs:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, all of one environment; none: only draw what the CSV holds"""
    env_id: str = "Humanoid-v4"
    """environment to draw"""


def read_run(run_dir: Path) -> list[dict]:
    """One row a bin of a run's scalars, with the run's final score in each."""
    args = json.loads((run_dir / "args.json").read_text())
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    bins = defaultdict(lambda: defaultdict(list))
    for name in set(SCALARS) & set(events.Tags()["scalars"]):
        for event in events.Scalars(name):
            bins[(event.step - 1) // BIN][name].append(event.value)
    last_100 = np.mean([event.value for event in events.Scalars("charts/episodic_return")[-100:]])
    contender = {"nfpo_continuous_action": "NFPO", "ppo_continuous_action": "PPO"}.get(
        args["exp_name"], args["exp_name"]
    )
    return [
        {
            "contender": contender,
            "seed": str(args["seed"]),
            "step": str((index + 1) * BIN),
            **{name: f"{np.mean(values):.6g}" for name, values in sorted(bins[index].items())},
            "last_100_episodes": f"{last_100:.1f}",
        }
        for index in sorted(bins)
    ]


def main() -> None:
    args = tyro.cli(CurveArgs, description=__doc__.split("\n")[0])
    path = FOLDER / "results" / f"{args.env_id}.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    for run_dir in args.run_dirs:
        new = read_run(run_dir)
        rows = [row for row in rows if (row["contender"], row["seed"]) != (new[0]["contender"], new[0]["seed"])] + new
    rows.sort(key=lambda row: (row["contender"], int(row["seed"]), int(row["step"])))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    curves, finals = defaultdict(dict), defaultdict(dict)
    for row in rows:
        finals[row["contender"]][row["seed"]] = float(row["last_100_episodes"])
        if row["charts/episodic_return"]:
            curve = curves[row["contender"]].setdefault(row["seed"], ([], []))
            curve[0].append(int(row["step"]))
            curve[1].append(float(row["charts/episodic_return"]))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for color, (contender, by_seed) in zip(("tab:blue", "tab:orange", "tab:green"), sorted(curves.items())):
        for steps, returns in by_seed.values():
            axes.plot(steps, returns, color=color, alpha=0.3, linewidth=0.8)
        grid = np.arange(BIN, max(steps[-1] for steps, _ in by_seed.values()) + 1, BIN)
        mean = np.mean([np.interp(grid, steps, returns) for steps, returns in by_seed.values()], axis=0)
        axes.plot(grid, mean, color=color, linewidth=2, label=f"{contender}, mean of {len(by_seed)} seeds")
        scores = finals[contender]
        print(f"{contender}: {np.mean(list(scores.values())):.0f} over the last 100 episodes of seeds {scores}")
    axes.set(xlabel="environment steps", ylabel="episode return", title=args.env_id)
    axes.legend()
    axes.grid(alpha=0.3)
    (FOLDER / "figures").mkdir(exist_ok=True)
    figure.savefig(FOLDER / "figures" / f"{args.env_id}.png", dpi=130)


if __name__ == "__main__":
    main()
