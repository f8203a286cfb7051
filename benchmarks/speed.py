"""How fast is NFPO? Whole runs of several contenders in turn on this machine, and their rate once they have started.

Run:     python benchmarks/speed.py --cleanrl PATH_OF_A_CHECKOUT --cleanrl-python PYTHON
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt -r requirements/envpool.txt, a quiet machine

Every contender is a fresh process on a core of its own (with EnvPool, two), all of them take the same number of steps,
and the rounds go A B C A B C ..., so that a busy machine slows all of them alike. A short run of each comes first and
fills the compiler's cache, as it is on a user's machine. From each run three numbers, and of each the median:
  seconds   the whole run, from the start of the process to its end
  rate      steps per second without start-up, from the first iteration's time in the event file to the last one's
  start-up  seconds before the first step: when the first iteration is logged, less its steps at that rate
Ratios are taken within a round, and their median is reported. `results/speed.csv` is the first edition's, by the
script and this file at commit 4078e50; this one writes `results/speed_v2.csv`.
"""

import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Optional

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.run import NFPO, PPO, provenance  # noqa: E402

CONTENDERS = {  # {name: (command, cores)}; cleanrl is CleanRL's own file
    "nfpo": (NFPO, 1),
    "nfpo-envpool": (f"{NFPO} --envpool", 2),
    "nfpo-1x2048": (f"{NFPO} --num-envs 1 --num-steps 2048", 1),
    "ppo": (PPO, 1),
    "cleanrl": ("cleanrl/ppo_continuous_action.py --no-cuda", 1),
}


@dataclasses.dataclass
class SpeedArgs:
    env_ids: tuple[str, ...] = ("Humanoid-v4", "HalfCheetah-v4")
    """Gymnasium environments"""
    total_timesteps: int = 98 * 2048
    """environment steps of each run, of whole rollouts"""
    rounds: int = 3
    """how often each contender runs"""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """who runs"""
    cleanrl: Optional[Path] = None
    """checkout of github.com/vwxyzjn/cleanrl; without one it is left out"""
    cleanrl_python: str = sys.executable
    """interpreter that has CleanRL's requirements (it needs Gymnasium below 1.0)"""
    csv: Path = ROOT / "benchmarks" / "results" / "speed_v2.csv"
    """file to write; other environments' rows in it stay"""


class Measured(NamedTuple):
    """One run."""

    seconds: float
    rate: float
    startup: float


def command(name: str, env_id: str, total_timesteps: int, args: SpeedArgs) -> list[str]:
    """The command line of one run."""
    script, *flags = CONTENDERS[name][0].split()
    python, root = (args.cleanrl_python, args.cleanrl) if name == "cleanrl" else (sys.executable, ROOT)
    return [python, str(root / script), *flags, "--env-id", env_id, "--total-timesteps", str(total_timesteps)]


def measure(name: str, env_id: str, total_timesteps: int, args: SpeedArgs) -> Measured:
    """One whole run. Raises CalledProcessError, with its output, where it fails."""
    cores = sorted(os.sched_getaffinity(0))[-CONTENDERS[name][1] :]
    with tempfile.TemporaryDirectory() as folder:  # whose `runs` all contenders write to
        start = time.time()
        done = subprocess.run(
            command(name, env_id, total_timesteps, args),
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        seconds = time.time() - start
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            done.check_returncode()
        (run_dir,) = Path(folder, "runs").iterdir()
        return Measured(seconds, *without_startup(run_dir, start))


def without_startup(run_dir: Path, start: float) -> tuple[float, float]:
    """Steps per second between the first and the last iteration that a run logged, and seconds until its first step;
    `start` is the time at which its process was started."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload().Scalars("losses/value_loss")
    first, last = events[0], events[-1]
    rate = (last.step - first.step) / (last.wall_time - first.wall_time)
    return rate, first.wall_time - start - first.step / rate


def summarize(rounds: dict[str, list[Measured]]) -> dict[str, dict[str, str]]:
    """{contender: {column: median over the rounds}}; how many times as fast as CleanRL and as the twin it is, too."""
    rows = {}
    for name, runs in rounds.items():
        medians = [statistics.median(numbers) for numbers in zip(*runs)]
        rows[name] = {"seconds": f"{medians[0]:.1f}", "rate": f"{medians[1]:.0f}", "startup": f"{medians[2]:.1f}"}
        for other in ("cleanrl", "ppo"):
            pairs = list(zip(runs, rounds.get(other, [])))
            whole, rate = [x.seconds / y.seconds for y, x in pairs], [y.rate / x.rate for y, x in pairs]
            rows[name][f"whole_vs_{other}"] = f"{statistics.median(whole):.2f}" if pairs else ""
            rows[name][f"rate_vs_{other}"] = f"{statistics.median(rate):.2f}" if pairs else ""
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Into the CSV file, instead of its rows of the same environments."""
    env_ids = {row["env_id"] for row in rows}
    old = list(csv.DictReader(path.open())) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows([row for row in old if row["env_id"] not in env_ids] + rows)


def main() -> None:
    args = tyro.cli(SpeedArgs, description=__doc__.split("\n")[0])
    names = [name for name in args.contenders if name != "cleanrl" or args.cleanrl]
    if unknown := set(names) - set(CONTENDERS):
        sys.exit(f"error: --contenders has {', '.join(sorted(unknown))}, allowed are {', '.join(CONTENDERS)}")
    args.cleanrl = args.cleanrl and args.cleanrl.absolute()
    for env_id in args.env_ids:
        for name in names:
            measure(name, env_id, 2 * 2048, args)
        rounds = {name: [] for name in names}
        for number in range(1, args.rounds + 1):
            for name in names:
                found = measure(name, env_id, args.total_timesteps, args)
                rounds[name].append(found)
                numbers = "  ".join(f"{column} {value:.1f}" for column, value in found._asdict().items())
                print(f"{env_id}  round {number}  {name:13s} {numbers}", flush=True)
        origin = {name: provenance()[name] for name in ("commit", "processor")}
        rows = [
            {"env_id": env_id, "steps": args.total_timesteps, "rounds": args.rounds, "contender": name}
            | {"cores": CONTENDERS[name][1], **row, **origin}
            for name, row in summarize(rounds).items()
        ]
        write_rows(args.csv, rows)
        columns = [column for column in rows[0] if column not in origin]
        for cells in (columns, ["-"] * len(columns), *([row[column] for column in columns] for row in rows)):
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
