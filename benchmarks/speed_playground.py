"""How fast is NFPO on MuJoCo Playground? Whole runs of four contenders in turn, each a process of its own.

Run:     python benchmarks/speed_playground.py --env-id CartpoleBalance --num-envs 256 --iterations 160
Needs:   what nfpo_playground_jax.py needs, and on first use the network: Brax's PPO gets a virtual environment of its
         own, with older versions. On an NVIDIA GPU: --env-id Go1JoystickFlatTerrain --num-envs 8192

Contenders: the script, its Gaussian twin, Brax's PPO, and the environment alone, which is the upper limit. All take the
same steps in the same environments, and nobody finds a compilation cache. Steps/s are those after compilation: from a
fifth of the run, by when Brax has compiled its second and last time, to its end. `first iteration` is the time from
the start of the process until the first iteration of PPO is done, imports and compilation included. Ratios are taken
within a round and their median is reported, absolute numbers only beside it. Memory is that of the host.
"""

import csv
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, Optional

import tyro

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 24  # of each environment in an iteration, the default of nfpo_playground_jax.py
PARTS = 10  # equal ones of a run; Brax and the bare environment tell the time after each of them
WARM_UP = 2  # of these parts
NAMES = {"nfpo": "NFPO", "ppo": "Gaussian twin", "brax": "Brax's PPO", "bare": "the environment alone"}

# What Brax gets beside a JAX it runs on (--brax-jax). Warp is the version that mujoco-mjx asks for.
BRAX_PINS = """brax==0.14.2 playground==0.2.0 mujoco==4.0.0 mujoco-mjx==3.17.0 warp-lang==1.18.0
               flax==0.12.6 optax==0.2.8 orbax-checkpoint==0.12.8 numpy==2.4.6""".split()
PACKAGES = ("jax", "brax", "playground", "mujoco", "mujoco-mjx", "warp-lang")


@dataclasses.dataclass
class SpeedArgs:
    env_id: str = "CartpoleBalance"
    """name of a MuJoCo Playground environment"""
    num_envs: int = 256
    """parallel environments, a multiple of 4"""
    iterations: int = 160
    """iterations of PPO in each run, a multiple of 10; one is 24 steps of every environment"""
    repeats: int = 3
    """rounds: how often each contender runs"""
    contenders: tuple[Literal["nfpo", "ppo", "brax", "bare"], ...] = ("nfpo", "ppo", "brax", "bare")
    """who runs: the script, its Gaussian twin, Brax's PPO, the environment alone"""
    impl: Optional[Literal["jax", "warp"]] = None
    """implementation of the physics; by default everybody's own: warp on an NVIDIA GPU, and jax elsewhere"""
    brax_python: Optional[Path] = None
    """interpreter that has Brax and a JAX it runs on; by default one is made in --brax-folder"""
    brax_folder: Path = Path("~/.cache/nfpo/brax")
    """where the virtual environment for Brax is made on first use"""
    brax_jax: str = "0.8.3"
    """JAX in that environment; 0.9.2 is the last on which Brax 0.14.2 runs"""
    csv: Path = ROOT / "benchmarks" / "results" / "speed_playground.csv"
    """file for the measurements, written anew"""
    worker: bool = False
    """be the environment alone, in this process (used by the script itself)"""

    @property
    def steps(self) -> int:
        return self.iterations * self.num_envs * NUM_STEPS


def bare(args: SpeedArgs) -> None:
    """The upper limit: the environments with random actions and nothing else, in one compiled scan for each part."""
    import jax
    from mujoco_playground import registry, wrapper

    impl = args.impl or ("warp" if "NVIDIA" in jax.devices()[0].device_kind else "jax")
    env = registry.load(args.env_id, config_overrides={"impl": impl})
    config = registry.get_default_config(args.env_id)
    envs = wrapper.wrap_for_brax_training(env, config.episode_length, config.get("action_repeat", 1))

    def step(state, key):
        state = envs.step(state, jax.random.uniform(key, (args.num_envs, envs.action_size), minval=-1, maxval=1))
        return state, state.reward.mean()

    def part(state, key):
        return jax.lax.scan(step, state, jax.random.split(key, args.iterations // PARTS * NUM_STEPS))

    state = jax.jit(envs.reset)(jax.random.split(jax.random.PRNGKey(1), args.num_envs))
    part = jax.jit(part, donate_argnums=0).lower(state, jax.random.PRNGKey(0)).compile()
    marks = []
    for number in range(1, PARTS + 1):
        state, rewards = part(state, jax.random.PRNGKey(number))
        jax.block_until_ready((state, rewards))
        marks.append((number * args.steps // PARTS, time.time()))
    print(json.dumps({"marks": marks, "impl": impl}))


def brax_python(args: SpeedArgs) -> str:
    """The interpreter for Brax. Makes its virtual environment where that is missing or has other versions."""
    if args.brax_python:
        return str(args.brax_python.absolute())
    folder = args.brax_folder.expanduser().absolute()
    python, stamp = str(folder / "bin" / "python"), folder / "pins.txt"
    jax = "jax[cuda12]" if shutil.which("nvidia-smi") else "jax"
    pins = [f"{jax}=={args.brax_jax}", f"jaxlib=={args.brax_jax}", *BRAX_PINS]
    if not (stamp.exists() and stamp.read_text().split() == pins):
        print(f"Making the virtual environment for Brax in {args.brax_folder}: once, some minutes.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins], check=True)
        stamp.write_text("\n".join(pins) + "\n")
    return python


def command(contender: str, args: SpeedArgs, python: str, runs_dir: str) -> list[str]:
    """The command line of one run."""
    flags = ["--env-id", args.env_id, "--num-envs", str(args.num_envs), *(["--impl", args.impl] if args.impl else [])]
    baselines = ROOT / "benchmarks" / "baselines"
    if contender == "brax":
        return [python, str(baselines / "brax_ppo.py"), *flags, "--iterations", str(args.iterations)]
    if contender == "bare":
        return [python, __file__, "--worker", *flags, "--iterations", str(args.iterations)]
    script = ROOT / "nfpo_playground_jax.py" if contender == "nfpo" else baselines / "ppo_playground_jax.py"
    # As a user runs it, but for checkpoints, which the others do not write: only the first and the last are left.
    flags += ["--total-timesteps", str(args.steps), "--checkpoint-interval", "1000000", "--runs-dir", runs_dir]
    return [python, str(script), *flags]


def run_to_end(arguments: list[str], folder: str) -> tuple[str, float, float, float]:
    """Standard output of one process, unix time of its start, its seconds, and the most MiB it had resident.

    Raises CalledProcessError, having shown its last output, where the process fails.
    """
    log, errors = Path(folder, "stdout"), Path(folder, "stderr")
    with log.open("w") as stdout, errors.open("w") as stderr:
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
        start = time.time()
        process = subprocess.Popen(arguments, cwd=folder, env=environment, stdout=stdout, stderr=stderr)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.time() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            process.kill()  # after Ctrl-C or SIGTERM; nothing happens to a process that has ended
            process.wait()
    if process.returncode:
        print(log.read_text()[-2000:], errors.read_text()[-4000:], file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return log.read_text(), start, seconds, usage.ru_maxrss / 1024


def logged_marks(run_dir: Path) -> list[tuple[int, float]]:
    """(global step, unix time) after each iteration of a run, from its TensorBoard files."""
    from tensorboardX.proto.event_pb2 import Event

    marks = []
    for path in run_dir.glob("events.out.tfevents.*"):
        with path.open("rb") as file:
            while header := file.read(12):  # length, its checksum, then the event and its checksum
                event = Event.FromString(file.read(struct.unpack("<Q", header[:8])[0]))
                file.read(4)
                if any(value.tag == "charts/SPS" for value in event.summary.value):
                    marks.append((event.step, event.wall_time))
    return sorted(marks)


def measure(contender: str, args: SpeedArgs, python: str) -> dict:
    """One run, as a row of the CSV file.

    Raises CalledProcessError where the run fails, ValueError where it takes other steps than wanted.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, start, seconds, memory = run_to_end(command(contender, args, python, folder), folder)
        if contender in ("brax", "bare"):
            report = json.loads(output.strip().splitlines()[-1])
            marks, physics = report["marks"], report["impl"]
        else:
            marks = logged_marks(next(Path(folder).glob("*/checkpoint")).parent)
            physics = args.impl or ("warp" if shutil.which("nvidia-smi") else "jax")  # the script's own choice
    (steps, end), (warm_steps, warm_end) = marks[-1], marks[len(marks) * WARM_UP // PARTS - 1]
    if steps != args.steps:
        raise ValueError(f"{NAMES[contender]} took {steps} steps instead of {args.steps}")
    steps_per_second = (steps - warm_steps) / (end - warm_end)
    # The first mark may come after several iterations: the time of all but one is subtracted.
    more_seconds = (marks[0][0] - args.num_envs * NUM_STEPS) / steps_per_second
    return {
        "contender": contender,
        "env_id": args.env_id,
        "num_envs": args.num_envs,
        "physics": physics,
        "steps": steps,
        "steps_per_second": round(steps_per_second, 1),
        "seconds": round(seconds, 2),
        "first_iteration_seconds": round(marks[0][1] - start - more_seconds, 2),
        "peak_memory_mib": round(memory),
    }


def versions(python: str) -> dict[str, str]:
    """Those of PACKAGES that an interpreter has."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({x: m.version(x) for x in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *PACKAGES], check=True, capture_output=True, text=True)
    return json.loads(found.stdout)


def hardware() -> str:
    """The processor and, where there is one, the GPU, without JAX, which would take the GPU's memory."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{len(os.sched_getaffinity(0))} x {found[1] if found else platform.processor()}"
    if not shutil.which("nvidia-smi"):
        return cores
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return f"{subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]}, {cores}"


def table(rows: list[dict], contenders: tuple[str, ...]) -> str:
    """Medians over the rounds as Markdown, with NFPO's targets beside the numbers they are about."""

    def values(name: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["contender"] == name]

    def ratio(name: str, other: str, column: str) -> float:
        pairs = zip(values(name, column), values(other, column))
        return statistics.median([mine / theirs for mine, theirs in pairs] or [math.nan])

    lines = []
    for name in contenders:
        steps_per_second, seconds, first, memory = (
            statistics.median(values(name, column))
            for column in ("steps_per_second", "seconds", "first_iteration_seconds", "peak_memory_mib")
        )
        speed, wall = ratio(name, "brax", "steps_per_second"), ratio(name, "ppo", "seconds")
        cells = {
            "contender": NAMES[name],
            "steps/s after compilation": f"{steps_per_second:,.0f}",
            "x Brax": "-" if math.isnan(speed) else f"{speed:.2f}",
            "whole run, s": f"{seconds:.1f}",
            "x twin": "-" if math.isnan(wall) else f"{wall:.2f}",
            "first iteration, s": f"{first:.1f}",
            "peak memory, MiB": f"{memory:,.0f}",
        }
        if name == "nfpo":
            for column, target, met in (
                ("x Brax", "≥ 1.00", speed >= 1),
                ("x twin", "≤ 1.15", wall <= 1.15),
                ("first iteration, s", "< 60", first < 60),
            ):
                verdict = "open" if cells[column] == "-" else "met" if met else "**missed**"
                cells[column] += f" (target {target}: {verdict})"
        lines = lines or [list(cells), ["-"] * len(cells)]
        lines.append(cells.values())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    args = tyro.cli(SpeedArgs, description=__doc__.split("\n")[0])
    if args.num_envs % 4 or args.iterations % PARTS or args.iterations < PARTS:
        raise SystemExit("error: --num-envs must be a multiple of 4, --iterations a multiple of 10")
    if args.worker:
        return bare(args)
    pythons = {name: brax_python(args) if name == "brax" else sys.executable for name in args.contenders}
    installed = {name: versions(python) for name, python in pythons.items()}
    machine, rows = hardware(), []
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends the run in progress as well
    for number in range(1, args.repeats + 1):
        for name in args.contenders:
            print(f"round {number}/{args.repeats}  {NAMES[name]:22s}", end="", flush=True)
            row = measure(name, args, pythons[name])
            print(
                f"{row['steps_per_second']:10,.0f} steps/s  {row['seconds']:7.1f} s, "
                f"the first iteration after {row['first_iteration_seconds']:.1f} s",
                flush=True,
            )
            rows.append({"round": number, **row, **installed[name], "processor": machine})
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    jax_versions = ", ".join(f"{NAMES[name]} {found['jax']}" for name, found in installed.items())
    print(f"\n{args.env_id}, {args.num_envs} environments, {args.steps:,} steps a run, median of {args.repeats} rounds")
    print(f"{machine}; physics {', '.join(sorted({row['physics'] for row in rows}))}; JAX: {jax_versions}\n")
    print(table(rows, args.contenders))


if __name__ == "__main__":
    main()
