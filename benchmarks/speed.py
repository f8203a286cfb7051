"""How fast is NFPO? Whole runs of several contenders in turn on this machine, start-up and compilation included.

Run:     python benchmarks/speed.py --env-id Humanoid-v4 --rounds 3 --cleanrl PATH_OF_A_CHECKOUT
Needs:   pip install -r requirements.txt -r requirements/benchmarks.txt

Every contender is a fresh process on one thread, all of them take the same number of environment steps with CleanRL's
hyperparameters, and the rounds go A B C A B C ..., so that a busy machine slows all of them alike. Ratios are taken
within a round and their median is reported, absolute times only beside it. `--cold` gives every run an empty compiler
cache; without it the first round fills the cache and the later ones find it, as on a user's machine.
"""

import csv
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal, Optional

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class SpeedArgs:
    env_id: str = "Humanoid-v4"
    """Gymnasium environment"""
    total_timesteps: int = 98 * 2048
    """environment steps of each run; of whole rollouts, since some contenders round up and others down"""
    rounds: int = 3
    """how often each contender runs"""
    contenders: tuple[Literal["nfpo", "ppo", "sb3", "cleanrl", "bare"], ...] = ("nfpo", "ppo", "sb3", "cleanrl", "bare")
    """who runs: the script, its Gaussian twin, Stable-Baselines3's PPO, CleanRL's PPO, the environment alone"""
    cleanrl: Optional[Path] = None
    """checkout of CleanRL; without one it is left out"""
    cleanrl_python: str = sys.executable
    """interpreter that has CleanRL's requirements (it needs Gymnasium below 1.0)"""
    cold: bool = False
    """give every run an empty compiler cache"""
    memory: bool = False
    """measure instead the resident memory of one NFPO run, at a tenth of its steps and at its end"""
    profile: bool = False
    """show instead where the time of one NFPO step goes, without start-up"""
    csv: Optional[Path] = None
    """append the measurements to this file"""
    worker: Optional[Literal["sb3", "bare"]] = None
    """be this contender, in this process (used by the script itself)"""


def bare(args: SpeedArgs) -> None:
    """The physical limit: the environment with random actions and nothing else."""
    import gymnasium as gym

    env = gym.make(args.env_id, disable_env_checker=True)
    env.action_space.seed(1)
    env.reset(seed=1)
    for _ in range(args.total_timesteps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()


def sb3(args: SpeedArgs) -> None:
    """Stable-Baselines3's PPO with CleanRL's hyperparameters and normalization."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    env = VecNormalize(make_vec_env(args.env_id, n_envs=1, seed=1), gamma=0.99)
    PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda left: 3e-4 * left,
        n_steps=2048,
        batch_size=64,
        n_epochs=10,
        clip_range_vf=0.2,
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}},
        seed=1,
        device="cpu",
    ).learn(args.total_timesteps)


def command(contender: str, args: SpeedArgs, runs_dir: str) -> list[str]:
    """The command line of one run."""
    flags = ["--env-id", args.env_id, "--total-timesteps", str(args.total_timesteps)]
    if contender == "nfpo":
        return [sys.executable, str(ROOT / "nfpo_continuous_action.py"), *flags, "--runs-dir", runs_dir]
    if contender == "ppo":
        twin = ROOT / "benchmarks" / "baselines" / "ppo_continuous_action.py"
        return [sys.executable, str(twin), *flags, "--runs-dir", runs_dir]
    if contender == "cleanrl":
        return [args.cleanrl_python, str(args.cleanrl / "cleanrl" / "ppo_continuous_action.py"), *flags, "--no-cuda"]
    return [sys.executable, __file__, "--worker", contender, *flags]


def environment(args: SpeedArgs, folder: str) -> dict[str, str]:
    """One thread for everybody; with --cold, an empty compiler cache."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "cache")} if args.cold else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **cache}


def measure(contender: str, args: SpeedArgs) -> float:
    """Wall-clock seconds of one whole run. Raises CalledProcessError, with its output, where the run fails."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            command(contender, args, folder), env=environment(args, folder), cwd=folder, capture_output=True, text=True
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
            done.check_returncode()
    return seconds


def memory(args: SpeedArgs) -> None:
    """Resident memory of one NFPO run, read whenever it prints its progress."""
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command("nfpo", args, folder), env=environment(args, folder), cwd=folder, stdout=subprocess.PIPE, text=True
        )
        for line in process.stdout:
            if line.startswith("step "):
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = next(int(row.split()[1]) / 1024 for row in status.splitlines() if row.startswith("VmRSS"))
                samples.append((int(line.split()[1].split("/")[0]), resident))
        if process.wait():
            raise SystemExit("the run failed")
    early = next(sample for sample in samples if sample[0] >= args.total_timesteps // 10)
    late = samples[-1]
    print(f"resident memory: {early[1]:.1f} MiB at step {early[0]}, {late[1]:.1f} MiB at step {late[0]}", end=": ")
    print(f"{100 * (late[1] / early[1] - 1):+.2f} %")
    write_rows(args, [("memory", "nfpo", args.env_id, step, f"{resident:.1f} MiB") for step, resident in (early, late)])


def profile(args: SpeedArgs) -> None:
    """Wall-clock time of the parts of one NFPO step, by timers around the script's own functions; parts may nest."""
    import gymnasium as gym

    sys.path.insert(0, str(ROOT))
    import nfpo_continuous_action as script

    seconds = Counter()

    def timed(function, name):
        def timer(*arguments, **keywords):
            start = time.perf_counter()
            result = function(*arguments, **keywords)
            seconds[name] += time.perf_counter() - start
            return result

        return timer

    def timed_compiled(*arguments):
        sample, gradient = compile_functions(*arguments)
        seconds.clear()  # start-up ends here
        return timed(sample, "sample"), timed(gradient, "gradient of a minibatch, all of them")

    compile_functions, script.compile_functions = script.compile_functions, timed_compiled
    for owner, name in (
        (script, "collect_rollout"),
        (script, "ppo_update"),
        (script, "compute_gae"),
        (script.ResumableEnv, "step"),
        (gym.vector.SyncVectorEnv, "step"),
        (script.Collector, "step"),
        (script.Collector, "observe"),
        (script.RewardNormalizer, "__call__"),
    ):
        setattr(owner, name, timed(getattr(owner, name), f"{owner.__name__}.{name}"))
    with tempfile.TemporaryDirectory() as folder:
        run = script.train(script.Args(env_id=args.env_id, total_timesteps=args.total_timesteps, runs_dir=folder))
    for name, total in seconds.most_common():
        print(f"{name:40s} {total / run['global_step'] * 1e6:7.1f} µs a step")


def write_rows(args: SpeedArgs, rows: list[tuple]) -> None:
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(("what", "contender", "env_id", "steps", "value"))
            writer.writerows(rows)


def main() -> None:
    args = tyro.cli(SpeedArgs, description=__doc__.split("\n")[0])
    if args.worker:
        return {"sb3": sb3, "bare": bare}[args.worker](args)
    if args.memory or args.profile:
        return memory(args) if args.memory else profile(args)
    contenders = [name for name in args.contenders if name != "cleanrl" or args.cleanrl]
    seconds = {name: [] for name in contenders}
    kind = "cold" if args.cold else "warm"
    for round_number in range(args.rounds):
        for name in contenders:
            elapsed = measure(name, args)
            seconds[name].append(elapsed)
            print(
                f"round {round_number + 1}  {name:8s} {elapsed:7.1f} s  {args.total_timesteps / elapsed:6.0f} steps/s"
            )
            # Without --cold, only the first round can have had to compile.
            label = "first" if kind == "warm" and round_number == 0 else kind
            write_rows(args, [(f"seconds ({label})", name, args.env_id, args.total_timesteps, f"{elapsed:.1f}")])
            sys.stdout.flush()

    print(f"\n{args.env_id}, {args.total_timesteps} steps, whole runs, median of {args.rounds} rounds")
    print("speed relative to: " + "".join(f"{other:>10s}" for other in contenders))
    for name in contenders:
        ratios = [statistics.median(o / s for o, s in zip(seconds[other], seconds[name])) for other in contenders]
        steps_per_second = args.total_timesteps / statistics.median(seconds[name])
        print(f"{name:19s}" + "".join(f"{ratio:10.2f}" for ratio in ratios) + f"   ({steps_per_second:.0f} steps/s)")


if __name__ == "__main__":
    main()
