"""The grid: every training run behind a figure, launched, continued after an interruption, skipped once finished.

Run:     python benchmarks/run.py                          # everything that is missing, two runs at a time
         python benchmarks/run.py --experiments S1 --seeds 1 --workers 1
         python benchmarks/run.py --experiments S1 --show  # print the commands and run nothing
         python benchmarks/run.py --cluster slurm --partition cpu --workers 200
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

Runs are launched through submitit: a process per run on this machine, a job per run on a SLURM cluster. Killed at any
moment, the same command goes on, and a run loses what it did since its last checkpoint. What the tables in `results/`
hold is finished and skipped, so that a fresh clone only computes what nobody has; `--repeat` computes it again.

There are two editions, and a variant's name means another command in each:
  1. Figures S1 to S2, in `runs.csv`: the paper's Section A.3, one environment, a base of deviation 1. Its rows were
     made by the script as it stood at commit 4078e50 or before (column `commit`), where actions were raw: clipped to
     the environment's box, not rescaled to it. Check that commit out to repeat them. The flags below are the same
     settings for today's script, which gives the same task only where the box is ±1: not on Humanoid (±0.4) and
     JumpWorld (±4). `report.py` takes what has ended into the table.
  2. S1b, tuning and boxes, in `runs_v2.csv`: the script's defaults. Each run is added when it ends.
"""

import dataclasses
import fcntl
import json
import os
import platform
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple, Optional

import numpy as np
import pandas as pd
import submitit
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REQUEUED = -1  # submitit leaves a process with it, once it has asked for the job to be run again
BUSY = -2

NFPO = "nfpo_continuous_action.py"
PPO, MIXTURE = "benchmarks/baselines/ppo_continuous_action.py", "benchmarks/baselines/ppo_mixture.py"
MEAN = "benchmarks/baselines/nfpo_mean.py"
TUNED = {"NFPO": NFPO, "NFPO-mean": MEAN, "PPO": PPO}  # each at three learning rates, with 4 and with 10 epochs
A3 = "--num-envs 1 --num-steps 2048 --base-std 1"  # the paper's Section A.3, with one of these two:
PAPER, STD = f"{NFPO} {A3} --no-learned-base-std", f"{NFPO} {A3} --learned-base-std"
BOARD = "--num-envs 64 --num-steps 64 --num-minibatches 4 --gamma 0.9 --no-compile --base-std 1"
# {edition: {variant: its command}}. A variant's name becomes the run's --exp-name.
VARIANTS = {
    1: {
        "NFPO": PAPER,
        "PPO": f"{PPO} {A3}",
        "PPO-mixture": f"{MIXTURE} {A3}",
        # What may close the gap on the easier tasks: noise that can shrink below what the bounded scales allow, and
        # steps as small as the Gaussian's, by a learning rate that is smaller, and then need not be annealed, by scales
        # that hardly depend on the state, or by leaving an update early.
        "NFPO-std": STD,
        "NFPO-std-2e-4": f"{STD} --learning-rate 2e-4",
        "NFPO-std-lr": f"{STD} --learning-rate 1e-4",
        "NFPO-std-flat": f"{STD} --learning-rate 1e-4 --no-anneal-lr",
        "NFPO-std-tight": f"{STD} --scale-bound 0.1",
        "NFPO-std-kl": f"{STD} --target-kl 0.05",
        # The control: would the Gaussian gain as much from the learning rate alone?
        "PPO-flat": f"{PPO} {A3} --learning-rate 1e-4 --no-anneal-lr",
        # Figure 6: the same flags for all, without tuning any.
        "NFPO-grid": f"{NFPO} {BOARD} --no-learned-base-std",
        "PPO-grid": f"{PPO} {BOARD}",
        "PPO-mixture-grid": f"{MIXTURE} {BOARD}",
        # Figures 2 to 4 and S2: one flag at a time.
        **{f"scale-{fn}": f"{PAPER} --scale-fn {fn}" for fn in ("none", "zero", "clip", "asymmetric")},
        **{f"tanh-{bound:g}": f"{PAPER} --scale-bound {bound:g}" for bound in (0.1, 0.25, 1, 2)},
        **{f"clip-{bound:g}": f"{PAPER} --scale-fn clip --scale-bound {bound:g}" for bound in (0.1, 0.25, 1, 2)},
        **{f"entropy-{coefficient:g}": f"{PAPER} --ent-coef {coefficient:g}" for coefficient in (0.001, 0.01)},
        **{f"noise-{deviation:g}": f"{PAPER} --action-noise {deviation:g}" for deviation in (0.05, 0.2)},
        **{f"layers-{layers}": f"{PAPER} --num-flow-layers {layers}" for layers in (2, 6, 8)},
        **{f"hidden-{dim}": f"{PAPER} --hidden-dim {dim}" for dim in (32, 128, 256)},
    },
    2: {
        "NFPO": f"{NFPO} --envpool",
        "NFPO-paper": f"{NFPO} --envpool --base-std 1 --no-learned-base-std",  # base N(0, I)
        "NFPO-volume": f"{NFPO} --envpool --scale-fn zero",
        "NFPO-mean": f"{MEAN} --envpool",
        "PPO": f"{PPO} --envpool",
        "PPO-mixture": f"{MIXTURE} --envpool",
        "NFPO-gymnasium": NFPO,
        **{
            f"{name}-lr{rate}-e{epochs}": f"{script} --envpool --learning-rate {rate} --update-epochs {epochs}"
            for name, script in TUNED.items()
            for rate in ("1.5e-4", "3e-4", "6e-4")
            for epochs in (4, 10)
        },
    },
}


class Experiment(NamedTuple):
    """What one figure needs: every environment x variant x seed, the seeds counted from `first_seed`."""

    name: str
    env_ids: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: int
    total_timesteps: int
    edition: int = 1
    first_seed: int = 1


MUJOCO = ("Humanoid-v4", "Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
EASIER = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
S1B = "NFPO", "NFPO-paper", "NFPO-volume", "NFPO-mean", "PPO"
TUNING = tuple(name for name in VARIANTS[2] if "-lr" in name)
BOXES = "Humanoid-v4", "benchmarks.envs.raw:RawHumanoid-v4"  # actions rescaled to the box, and clipped to it
ABLATION = ("Humanoid-v4", "Hopper-v4")
GRIDWORLD, JUMPWORLD = "benchmarks.envs.gridworld:GridWorld-v0", "benchmarks.envs.gridworld:JumpWorld-v0"
CONTENDERS_6 = "NFPO-grid", "PPO-grid", "PPO-mixture-grid"
GRID = [
    Experiment("S1", MUJOCO, ("NFPO", "PPO", "NFPO-std-flat"), 5, 1_000_000),
    Experiment("S1", MUJOCO, ("PPO-flat",), 3, 1_000_000),
    Experiment("S1", ("Humanoid-v4", "HalfCheetah-v4"), ("PPO-mixture",), 5, 1_000_000),
    Experiment("S1-screen", MUJOCO, ("NFPO-std-lr",), 1, 1_000_000),
    Experiment("S1-screen", EASIER, ("NFPO-std", "NFPO-std-2e-4"), 1, 1_000_000),
    Experiment("S1-screen", ("HalfCheetah-v4", "Hopper-v4"), ("NFPO-std-tight",), 1, 1_000_000),
    Experiment("S1-screen", ("HalfCheetah-v4",), ("NFPO-std-kl",), 1, 1_000_000),
    Experiment("6", (GRIDWORLD,), CONTENDERS_6, 5, 131_072),
    Experiment("6", (JUMPWORLD,), CONTENDERS_6, 5, 262_144),
    Experiment("2", ABLATION, ("NFPO", "scale-none", "scale-zero", "scale-clip", "scale-asymmetric"), 3, 500_000),
    Experiment("3", ABLATION, ("NFPO", *(name for name in VARIANTS[1] if name.startswith("tanh-"))), 3, 500_000),
    Experiment("3", ABLATION, ("scale-clip", *(name for name in VARIANTS[1] if name.startswith("clip-"))), 3, 500_000),
    Experiment("S2", ABLATION, ("NFPO", "layers-2", "layers-6", "layers-8"), 3, 500_000),
    Experiment("S2", ABLATION, ("hidden-32", "hidden-128", "hidden-256"), 3, 500_000),
    Experiment("S2", ("Humanoid-v4",), ("NFPO", "hidden-256"), 5, 500_000),  # a claim about one task needs five seeds
    Experiment("4", ABLATION, ("NFPO", "entropy-0.001", "entropy-0.01", "noise-0.05", "noise-0.2"), 3, 500_000),
    Experiment("S1b", MUJOCO[:1], S1B, 10, 1_000_000, edition=2),
    Experiment("S1b", MUJOCO[1:], S1B, 5, 1_000_000, edition=2),
    Experiment("S1b", ("Humanoid-v4",), ("PPO-mixture",), 10, 1_000_000, edition=2),
    Experiment("S1b", ("HalfCheetah-v4",), ("PPO-mixture",), 5, 1_000_000, edition=2),
    # Two seeds that no comparison uses choose a contender's setting.
    Experiment("tuning", MUJOCO, TUNING, 2, 1_000_000, edition=2, first_seed=101),
    Experiment("boxes", BOXES, ("NFPO-gymnasium",), 3, 1_000_000, edition=2),
]

BINS = 50
KEY = ["env_id", "variant", "seed", "total_timesteps"]  # what names a run in its edition's files
TRAINING, DEPLOYED = "last_100_episodes", "evaluation"
SCALARS = {
    "episodic_return": "charts/episodic_return",
    "episodic_length": "charts/episodic_length",
    "approx_kl": "losses/approx_kl",
    "clipfrac": "losses/clipfrac",
    "value_loss": "losses/value_loss",
    "explained_variance": "losses/explained_variance",
    "entropy": "losses/entropy",
    "log_det": "flow/log_det",
    "scale_abs_mean": "flow/scale_abs_mean",
    "scale_saturation": "flow/scale_saturation",
}


@dataclasses.dataclass
class RunArgs:
    experiments: tuple[str, ...] = ()
    """figures whose runs are wanted, as in GRID; none: all"""
    env_ids: tuple[str, ...] = ()
    """only these environments"""
    variants: tuple[str, ...] = ()
    """only these variants"""
    seeds: tuple[int, ...] = ()
    """only these seeds"""
    workers: int = 2
    """runs at a time, each on one thread"""
    runs_dir: Path = ROOT / "runs" / "grid"
    """folder that receives one folder per run; on a cluster, on a disk that all machines see"""
    results: Path = RESULTS
    """folder of the tables of finished runs, which are skipped"""
    repeat: bool = False
    """do not skip what the tables hold, only what the folder holds"""
    show: bool = False
    """print the command of each run that is missing, and run nothing"""
    cluster: Literal["local", "slurm"] = "local"
    """submitit's executor: processes on this machine, or jobs of a SLURM cluster"""
    partition: Optional[str] = None
    """SLURM partition"""
    timeout_min: int = 24 * 60
    """time limit of a job in minutes; a run that meets it is submitted again and goes on"""


class Run(NamedTuple):
    """One training run. Within an edition the first four fields, `KEY`, are its identity."""

    env_id: str
    variant: str
    seed: int
    total_timesteps: int
    edition: int = 1

    def __str__(self) -> str:
        return f"{self.env_id} {self.variant} seed {self.seed} ({self.total_timesteps:,} steps)"

    def command(self) -> list[str]:
        """What a reader types, after `python`, to repeat it."""
        flags = f"--env-id {self.env_id} --seed {self.seed} --total-timesteps {self.total_timesteps}"
        return [*VARIANTS[self.edition][self.variant].split(), *flags.split()]

    def folder(self, runs_dir: Path) -> Path:
        """Where it leaves the script's run folder, and `run.json` once it has ended."""
        name = "__".join(map(str, self[:4])) + ("" if self.edition == 1 else f"__v{self.edition}")
        return runs_dir / name.replace("/", "-").replace(":", "-")

    def is_finished(self, runs_dir: Path) -> bool:
        """Whether it has ended by itself, be it at its last step or because its numbers broke."""
        return (self.folder(runs_dir) / "run.json").exists()


def newest(folder: Path) -> Optional[Path]:
    """The script's newest run folder in a run's folder: those before it were killed before their first checkpoint."""
    return max(folder.glob("*__*/"), default=None, key=lambda path: int(path.name.rsplit("__", 1)[1]))


class Job:
    """What a worker does: start or continue one run, play what it learned, and note beside it how it went.

    submitit pickles the instance, calls it in a process of its own, and on a cluster's time limit submits it again.
    """

    patience = 60  # seconds; a job that is submitted again may start before its predecessor is quite dead

    def __init__(self, run: Run, runs_dir: Path):
        self.run, self.command, self.runs_dir = run, run.command(), runs_dir

    def __call__(self) -> int:
        """Returns the script's exit status (0 finished, 2 bad input, 3 non-finite), or `BUSY` where another process is
        at this run."""
        folder = self.run.folder(self.runs_dir)
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.time() + self.patience
        with (folder / ".lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the kernel, however a process ends
                    return self.train(folder)
                except BlockingIOError:
                    if time.time() > deadline:
                        return BUSY
                    time.sleep(1)

    def train(self, folder: Path) -> int:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        os.sched_getaffinity = lambda pid: {0}  # EnvPool would get a thread per core
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        if self.run.is_finished(self.runs_dir):  # by another process, while this job was waiting
            return 0
        # A run that is interrupted may go on with another commit: all of them count.
        origin, commits = provenance(), folder / "commits"
        known = commits.read_text().split() if commits.exists() else []
        origin["commit"] = "+".join(dict.fromkeys([*known, origin["commit"]]))
        commits.write_text(origin["commit"].replace("+", "\n") + "\n")
        script, *flags = self.command
        flags += ["--exp-name", self.run.variant, "--runs-dir", str(folder)]
        begun = newest(folder)
        if begun and (begun / "checkpoint.pt").exists():
            flags += ["--resume", str(begun)]
        sys.argv = [script, *flags]
        status, namespace = 0, {}
        try:
            namespace = runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code == REQUEUED:
                raise
            status = end.code or 0
        if status in (0, 3):
            record = {"run": self.run, "status": status, **origin}
            if status == 0:
                record["evaluation"] = play(newest(folder), namespace)
            temporary = folder / "run.json.tmp"
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(folder / "run.json")
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit at a time limit or a preemption: the same again, which resumes."""
        return submitit.helpers.DelayedSubmission(self)


def play(run_dir: Path, namespace: dict) -> list[float]:
    """Returns of 20 episodes of the finished policy as it would be deployed, at temperature 0."""
    from nfpo_continuous_action import evaluate

    (policy_class,) = (value for name, value in namespace.items() if name.endswith("Policy"))
    return evaluate(run_dir, policy_class, eval_episodes=20)


def provenance() -> dict[str, str]:
    """Versions, commit and processor: what a number in a table depends on beside its command."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "gymnasium", "mujoco")},
        "processor": processor[1] if processor else platform.processor(),
    }


def table(edition: int, results: Path) -> Path:
    """The file that holds a row per finished run."""
    return results / ("runs.csv" if edition == 1 else f"runs_v{edition}.csv")


def curve_file(edition: int, results: Path, env_id: str) -> Path:
    return results / ("curves" if edition == 1 else f"curves_v{edition}") / f"{env_id.split(':')[-1]}.csv"


def recorded_runs(results: Path) -> set[Run]:
    """The runs that the tables of finished runs hold."""
    found = set()
    for edition in VARIANTS:
        if table(edition, results).exists():
            rows = pd.read_csv(table(edition, results))[KEY].itertuples(index=False)
            found |= {Run(*key, edition) for key in rows}
    return found


def read_run(folder: Path) -> tuple[Run, pd.DataFrame, pd.DataFrame]:
    """An ended run, its row, and its curves: one row per bin, the means of what was logged within it."""
    record = json.loads((folder / "run.json").read_text())
    run = Run(*record["run"])
    events = EventAccumulator(str(newest(folder)), size_guidance={"scalars": 0}).Reload()
    logged = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    width = run.total_timesteps / BINS
    columns = {}
    for name, tag in SCALARS.items():
        if tag in logged:
            points = pd.DataFrame(logged[tag], columns=["step", name])
            columns[name] = points.groupby(np.ceil(points.step / width) * width)[name].mean()
    curves = pd.DataFrame(columns).rename_axis("step").reset_index().astype({"step": int})
    steps, speed = logged.get("charts/SPS", [(0, np.nan)])[-1]  # none where the first update broke
    returns = [value for _, value in logged.get("charts/episodic_return", [])]
    key = dict(zip(KEY, run))
    row = {
        **key,
        "status": {0: "finished", 3: "broke"}[record["status"]],
        "steps": steps,
        TRAINING: np.mean(returns[-100:]) if returns else np.nan,
        DEPLOYED: np.mean(record.get("evaluation", np.nan)),
        "steps_per_second": speed,
        **{name: record[name] for name in ("commit", "python", "torch", "gymnasium", "mujoco", "processor")},
    }
    return run, pd.DataFrame([row]), curves.assign(**key)[[*KEY, *curves.columns]]


def replace_rows(path: Path, new: list[pd.DataFrame]) -> None:
    """Add rows to a CSV file; those that it held under the same run go."""
    new = pd.concat(new)
    if path.exists():
        old = pd.read_csv(path)
        same = old.set_index(KEY).index.isin(new.set_index(KEY).index)
        new = pd.concat([old[~same], new])
    by = [*KEY, "step"] if "step" in new else KEY
    path.parent.mkdir(parents=True, exist_ok=True)
    new.sort_values(by).to_csv(path, index=False, float_format="%.5g", lineterminator="\n")


def collect(folders: list[Path], results: Path) -> None:
    """Bring these ended runs into the files of their editions."""
    if not folders:
        return
    files = {}  # of one read and one write each
    for run, row, curves in map(read_run, folders):
        files.setdefault(table(run.edition, results), []).append(row)
        files.setdefault(curve_file(run.edition, results, run.env_id), []).append(curves)
    with (folders[0].parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another grid may be running
        for path, rows in files.items():
            replace_rows(path, rows)


def select(args: RunArgs, grid: list[Experiment] = GRID) -> list[Run]:
    """The wanted runs, seed by seed, so that a grid that is cut short is still a balanced one."""
    for flag, wanted, known in (
        ("--experiments", args.experiments, {experiment.name for experiment in grid}),
        ("--env-ids", args.env_ids, {env_id for experiment in grid for env_id in experiment.env_ids}),
        ("--variants", args.variants, {variant for experiment in grid for variant in experiment.variants}),
    ):
        if unknown := set(wanted) - known:
            sys.exit(f"error: {flag} has {', '.join(sorted(unknown))}, allowed are {', '.join(sorted(known))}")
    runs = [
        Run(env_id, variant, experiment.first_seed + number, experiment.total_timesteps, experiment.edition)
        for number in range(max(experiment.seeds for experiment in grid))
        for experiment in grid
        if number < experiment.seeds and (not args.experiments or experiment.name in args.experiments)
        for env_id in experiment.env_ids
        for variant in experiment.variants
    ]
    return [
        run
        for run in dict.fromkeys(runs)  # some runs serve several figures
        if (not args.env_ids or run.env_id in args.env_ids)
        and (not args.variants or run.variant in args.variants)
        and (not args.seeds or run.seed in args.seeds)
    ]


def tail(path: Path, length: int = 4096) -> str:
    """The end of a text file, empty where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        return file.read().decode(errors="replace")


def steps_done(run: Run, job: submitit.Job) -> int:
    """How far a running job is, from the script's progress bar."""
    found = re.findall(r"(\d+)%\|[^\r\n]*step/s", tail(job.paths.stderr))
    return int(found[-1]) * run.total_timesteps // 100 if found else 0


def outcome(job: submitit.Job) -> int | str:
    """The status that an ended job returned, or its last lines where it died."""
    try:
        status = job.results()[0]
    except Exception:
        # submitit raises one error for a job that failed and others for one that left nothing behind.
        status = 1
    if status in (0, 3, BUSY):
        return status
    lines = (tail(job.paths.stdout) + "\n" + tail(job.paths.stderr)).splitlines()
    return "\n".join(["    " + x for x in lines if x.strip() and not x.startswith("submitit ")][-8:]) or "    no output"


def launch(runs: list[Run], args: RunArgs) -> int:
    """Keep `workers` runs going until all have ended. Returns the number of those that did not end here."""
    limits = {"local_max_num_timeout": 1000, "slurm_max_num_timeout": 1000}  # resume as often as it takes
    executor = submitit.AutoExecutor(folder=args.runs_dir / "jobs", cluster=args.cluster, **limits)
    executor.update_parameters(timeout_min=args.timeout_min, cpus_per_task=1, mem_gb=4)
    if args.cluster == "slurm":
        executor.update_parameters(slurm_partition=args.partition, slurm_job_name="nfpo")
    waiting, running, failed, finished, left_alone, ended_steps = list(runs), {}, 0, 0, 0, 0
    had = {}  # steps at a run's first sign of life: what it resumed was computed before, and tells nothing of the speed
    on_terminal = sys.stderr.isatty()
    total = sum(run.total_timesteps for run in runs)
    bar = tqdm(total=total, unit="step", unit_scale=True, dynamic_ncols=True, disable=not on_terminal)
    start = last_line = time.time()
    try:
        while waiting or running:
            while waiting and len(running) < args.workers:
                run = waiting.pop(0)
                running[run] = executor.submit(Job(run, args.runs_dir))
            time.sleep(1)
            for run, job in list(running.items()):
                if not job.done():
                    continue
                del running[run]
                ended_steps += run.total_timesteps
                status = outcome(job)
                if run.edition > 1 and run.is_finished(args.runs_dir):
                    collect([run.folder(args.runs_dir)], args.results)
                finished += status in (0, 3)
                failed += status not in (0, 3, BUSY)
                left_alone += status == BUSY
                what = {0: "finished", 3: "stopped: its numbers broke", BUSY: "left alone: another process is at it"}
                bar.write(f"{run}: {what[status] if status in what else f'FAILED{chr(10)}{status}'}")
            steps = {run: steps_done(run, job) for run, job in running.items()}
            had = {run: count for run, count in steps.items() if count} | had
            done, bar.initial = ended_steps + sum(steps.values()), sum(had.values())
            state = f"{finished} of {len(runs)} finished, {len(running)} running, {failed} failed"
            bar.set_postfix_str(state, refresh=False)
            bar.update(done - bar.n)
            if not on_terminal and time.time() - last_line >= 60:
                last_line = time.time()
                speed = (done - bar.initial) / (last_line - start)  # steps/s of all workers together
                left = f"about {(total - done) / speed / 3600:.1f} h left" if speed > 0 else "time left unknown yet"
                print(f"{done / total:.1%}  {state}  {left}", flush=True)
    except KeyboardInterrupt:
        for job in running.values():
            job.cancel()
        for job in running.values():
            while not job.done():
                time.sleep(0.1)
        sys.exit(f"\nInterrupted with {finished} of {len(runs)} finished; the same command goes on.")
    finally:
        bar.close()
    others = f", {left_alone} left to another process" if left_alone else ""
    print(f"{finished} of {len(runs)} finished, {failed} failed{others}. Next: python benchmarks/report.py")
    return failed + left_alone


def main() -> None:
    args = tyro.cli(RunArgs, description=__doc__.split("\n")[0])
    if args.workers < 1:
        sys.exit(f"error: --workers is {args.workers}, allowed is at least 1")
    args.runs_dir = args.runs_dir.absolute()
    wanted = select(args, GRID)
    recorded = set() if args.repeat else recorded_runs(args.results)
    missing = [run for run in wanted if run not in recorded and not run.is_finished(args.runs_dir)]
    print(f"{len(wanted)} runs wanted, {len(wanted) - len(missing)} finished before, {len(missing)} missing")
    if args.show:
        for run in missing:
            print("python " + shlex.join(run.command()))
        return
    # A kill ends like Ctrl-C: the workers go too. Started with `nohup ... &` this process would ignore SIGINT, and so
    # would the workers, which submitit cancels by SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(1 if missing and launch(missing, args) else 0)


if __name__ == "__main__":
    main()
