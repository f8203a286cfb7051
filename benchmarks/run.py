"""The grid: every training run behind a figure, launched, continued after an interruption, skipped once finished.

Run:     python benchmarks/run.py                          # everything that is missing, two runs at a time
         python benchmarks/run.py --experiments S1 --seeds 1 --workers 1
         python benchmarks/run.py --experiments S1 --show  # print the commands and run nothing
         python benchmarks/run.py --cluster slurm --partition cpu --workers 200
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

Runs are launched through submitit: a process a run on this machine, a job a run on a SLURM cluster. Killed at any
moment, the same command goes on, and a run loses what it did since its last checkpoint. What `results/runs.csv` holds
is finished and skipped, so that a fresh clone only computes what nobody has; `--repeat` computes it again. Afterwards
`report.py` reads the runs.
"""

import csv
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

import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benchmarks" / "results" / "runs.csv"
REQUEUED = -1  # submitit leaves a process with it, once it has asked for the job to be run again
BUSY = -2

NFPO = "nfpo_continuous_action.py"
PPO = "benchmarks/baselines/ppo_continuous_action.py"
GRIDWORLD_FLAGS = "--num-envs 64 --num-steps 64 --num-minibatches 4 --gamma 0.9 --no-compile"
# A variant is a command. Its name becomes the run's --exp-name.
VARIANTS = {
    "NFPO": NFPO,
    "PPO": PPO,
    "PPO-mixture": "benchmarks/baselines/ppo_mixture.py",
    # What may close the gap on the easier tasks: noise that can shrink below what the bounded scales allow, and steps
    # as small as the Gaussian's, by a learning rate that is smaller, and then need not be annealed, by scales that
    # hardly depend on the state, or by leaving an update early.
    "NFPO-std": f"{NFPO} --learned-base-std",
    "NFPO-std-2e-4": f"{NFPO} --learned-base-std --learning-rate 2e-4",
    "NFPO-std-lr": f"{NFPO} --learned-base-std --learning-rate 1e-4",
    "NFPO-std-flat": f"{NFPO} --learned-base-std --learning-rate 1e-4 --no-anneal-lr",
    "NFPO-std-tight": f"{NFPO} --learned-base-std --scale-bound 0.1",
    "NFPO-std-kl": f"{NFPO} --learned-base-std --target-kl 0.05",
    # The control: would the Gaussian gain as much from the learning rate alone?
    "PPO-flat": f"{PPO} --learning-rate 1e-4 --no-anneal-lr",
    # Figure 6: the same flags for all, without tuning any.
    "NFPO-grid": f"{NFPO} {GRIDWORLD_FLAGS}",
    "PPO-grid": f"{PPO} {GRIDWORLD_FLAGS}",
    "PPO-mixture-grid": f"benchmarks/baselines/ppo_mixture.py {GRIDWORLD_FLAGS}",
    # Figures 2 to 4 and S2: one flag at a time.
    **{f"scale-{fn}": f"{NFPO} --scale-fn {fn}" for fn in ("none", "zero", "clip", "asymmetric")},
    **{f"tanh-{bound:g}": f"{NFPO} --scale-bound {bound:g}" for bound in (0.1, 0.25, 1, 2)},
    **{f"clip-{bound:g}": f"{NFPO} --scale-fn clip --scale-bound {bound:g}" for bound in (0.1, 0.25, 1, 2)},
    **{f"entropy-{coefficient:g}": f"{NFPO} --ent-coef {coefficient:g}" for coefficient in (0.001, 0.01)},
    **{f"noise-{deviation:g}": f"{NFPO} --action-noise {deviation:g}" for deviation in (0.05, 0.2)},
    **{f"layers-{layers}": f"{NFPO} --num-flow-layers {layers}" for layers in (2, 6, 8)},
    **{f"hidden-{dim}": f"{NFPO} --hidden-dim {dim}" for dim in (32, 128, 256)},
}


class Experiment(NamedTuple):
    """What one figure needs: every environment x variant x seed."""

    name: str
    env_ids: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: int
    total_timesteps: int


MUJOCO = ("Humanoid-v4", "Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
EASIER = ("HalfCheetah-v4", "Hopper-v4", "Walker2d-v4")
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
    Experiment("3", ABLATION, ("NFPO", *(name for name in VARIANTS if name.startswith("tanh-"))), 3, 500_000),
    Experiment("3", ABLATION, ("scale-clip", *(name for name in VARIANTS if name.startswith("clip-"))), 3, 500_000),
    Experiment("S2", ABLATION, ("NFPO", "layers-2", "layers-6", "layers-8"), 3, 500_000),
    Experiment("S2", ABLATION, ("hidden-32", "hidden-128", "hidden-256"), 3, 500_000),
    Experiment("S2", ("Humanoid-v4",), ("NFPO", "hidden-256"), 5, 500_000),  # a claim about one task needs five seeds
    Experiment("4", ABLATION, ("NFPO", "entropy-0.001", "entropy-0.01", "noise-0.05", "noise-0.2"), 3, 500_000),
]


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
    """folder that receives one folder a run; on a cluster, on a disk that all machines see"""
    recorded: Path = RECORDED
    """table of the finished runs, which are skipped"""
    repeat: bool = False
    """do not skip what the table holds, only what the folder holds"""
    show: bool = False
    """print the command of each run that is missing, and run nothing"""
    cluster: Literal["local", "slurm"] = "local"
    """submitit's executor: processes on this machine, or jobs of a SLURM cluster"""
    partition: Optional[str] = None
    """SLURM partition"""
    timeout_min: int = 24 * 60
    """time limit of a job in minutes; a run that meets it is submitted again and goes on"""


class Run(NamedTuple):
    """One training run; the four fields are its identity everywhere."""

    env_id: str
    variant: str
    seed: int
    total_timesteps: int

    def __str__(self) -> str:
        return f"{self.env_id} {self.variant} seed {self.seed} ({self.total_timesteps:,} steps)"

    def name(self) -> str:
        """The same as a part of a file's name."""
        return "__".join(map(str, self)).replace("/", "-").replace(":", "-")

    def command(self) -> list[str]:
        """What a reader types, after `python`, to repeat it."""
        flags = f"--env-id {self.env_id} --seed {self.seed} --total-timesteps {self.total_timesteps}"
        return [*VARIANTS[self.variant].split(), *flags.split()]

    def find(self, runs_dir: Path) -> Optional[Path]:
        """Its newest folder, if it was ever started."""
        prefix = f"{self.env_id}__{self.variant}__{self.seed}__".replace("/", "-").replace(":", "-")
        found = [folder for folder in runs_dir.glob(f"{prefix}*") if identify(folder) == self]
        return max(found, default=None, key=lambda folder: int(folder.name.rsplit("__", 1)[1]))


def identify(run_dir: Path) -> Run:
    """The run that a folder holds, from its args.json."""
    args = json.loads((run_dir / "args.json").read_text())
    return Run(args["env_id"], args["exp_name"], args["seed"], args["total_timesteps"])


class Job:
    """What a worker does: start or continue one run, play what it learned, and note beside it how it went.

    submitit pickles the instance, calls it in a process of its own, and on a cluster's time limit submits it again.
    """

    patience = 60  # seconds; a job that is submitted again may start before its predecessor is quite dead

    def __init__(self, run: Run, runs_dir: Path):
        self.run, self.command, self.runs_dir = run, run.command(), runs_dir

    def __call__(self) -> int:
        """Returns the script's exit status (0 finished, 2 bad input, 3 non-finite, 128 + n stopped by signal n), or
        `BUSY` where another process is at this run."""
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        deadline = time.time() + self.patience
        with (self.runs_dir / f".{self.run.name()}.lock").open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the kernel, however a process ends
                    return self.train()
                except BlockingIOError:
                    if time.time() > deadline:
                        return BUSY
                    time.sleep(1)

    def train(self) -> int:
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))
        run_dir = self.run.find(self.runs_dir)
        if is_finished(run_dir):  # by another process, while this job was waiting
            return 0
        # A run that is interrupted may go on with another commit: all of them count.
        origin, commits = provenance(), self.runs_dir / f".{self.run.name()}.commits"
        known = commits.read_text().split() if commits.exists() else []
        origin["commit"] = "+".join(dict.fromkeys([*known, origin["commit"]]))
        commits.write_text(origin["commit"].replace("+", "\n") + "\n")
        script, *flags = self.command
        where = ["--exp-name", self.run.variant, "--runs-dir", str(self.runs_dir)]
        sys.argv = [script, *flags, *where, *(["--resume", str(run_dir)] if run_dir else [])]
        status, namespace = 0, {}
        try:
            namespace = runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code == REQUEUED:
                raise
            status = end.code or 0
        run_dir = self.run.find(self.runs_dir)
        if run_dir and status in (0, 3):
            record = {"status": status, **origin}
            if status == 0:
                record["evaluation"] = play(run_dir, namespace)
            temporary = run_dir / "run.json.tmp"
            temporary.write_text(json.dumps(record, indent=2) + "\n")
            temporary.replace(run_dir / "run.json")
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called by submitit at a time limit or a preemption: the same again, which resumes."""
        return submitit.helpers.DelayedSubmission(self)


def play(run_dir: Path, namespace: dict) -> list[float]:
    """Returns of 20 episodes of the finished policy as it would be deployed, at temperature 0."""
    import nfpo_continuous_action as module

    # The flow's script has just run as `__main__`: its classes are not the module's, and go with its own functions.
    evaluate = namespace.get("evaluate", module.evaluate)
    return evaluate(run_dir, namespace[module.load_checkpoint(run_dir)["policy_class"]], eval_episodes=20)


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


def is_finished(run_dir: Optional[Path]) -> bool:
    """Whether a run has ended by itself, be it at its last step or because its numbers broke."""
    return run_dir is not None and (run_dir / "run.json").exists()


def recorded_runs(path: Path) -> set[Run]:
    """The runs that a table of finished runs holds."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {
            Run(row["env_id"], row["variant"], int(row["seed"]), int(row["total_timesteps"]))
            for row in csv.DictReader(file)
        }


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
        Run(env_id, variant, seed, experiment.total_timesteps)
        for seed in range(1, 1 + max(experiment.seeds for experiment in grid))
        for experiment in grid
        if seed <= experiment.seeds and (not args.experiments or experiment.name in args.experiments)
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


def steps_done(job: submitit.Job) -> int:
    """How far a running job is, from the progress lines of the script."""
    found = re.findall(r"^step (\d+)/", tail(job.paths.stdout), re.MULTILINE)
    return int(found[-1]) if found else 0


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
                finished += status in (0, 3)
                failed += status not in (0, 3, BUSY)
                left_alone += status == BUSY
                what = {0: "finished", 3: "stopped: its numbers broke", BUSY: "left alone: another process is at it"}
                bar.write(f"{run}: {what[status] if status in what else f'FAILED{chr(10)}{status}'}")
            steps = {run: steps_done(job) for run, job in running.items()}
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
    wanted = select(args)
    recorded = set() if args.repeat else recorded_runs(args.recorded)
    missing = [run for run in wanted if run not in recorded and not is_finished(run.find(args.runs_dir))]
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
