"""What does the flow cost on Isaac Gym? Learning from one rollout of the paper's batch, NFPO against the Gaussian twin.

Run:     python benchmarks/speed_isaacgym.py                  # on the CPU
         python benchmarks/speed_isaacgym.py --device cuda:0
Needs:   pip install -r requirements/isaacgym.txt, on Python 3.8; no simulator

4096 environments x 24 steps at the sizes of Unitree's g1, filled with random numbers: what is timed is `ppo_update`,
all of an iteration but the simulator and the 24 decisions, which are timed beside it. Each contender is a process of
its own in each round, the rounds go A B C D A B C D ..., and the ratio is taken within a round; its median is
reported. The paper's Table S2 says 1.19.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nfpo_isaacgym as nfpo  # noqa: E402, I001  # before PyTorch
from benchmarks.baselines.ppo_isaacgym import GaussianPolicy  # noqa: E402

import torch  # noqa: E402
import tyro  # noqa: E402
from torch.nn.utils import parameters_to_vector, vector_to_parameters  # noqa: E402
from tqdm import tqdm  # noqa: E402

CONTENDERS = {
    "PPO": (GaussianPolicy, False),
    "NFPO": (nfpo.FlowPolicy, False),
    "PPO compiled": (GaussianPolicy, True),
    "NFPO compiled": (nfpo.FlowPolicy, True),
}
SIZES = {"obs_dim": 47, "privileged_dim": 50, "action_dim": 12}


@dataclasses.dataclass
class SpeedArgs:
    device: str = "cpu"
    """device of networks and batches"""
    torch_threads: int = 1
    """PyTorch threads on the CPU"""
    rounds: int = 3
    """how often each contender runs"""
    iterations: int = 5
    """timed iterations of learning in a run"""
    num_envs: int = 4096
    """parallel environments of the imagined rollout"""
    csv: Optional[Path] = None
    """append the measurements to this file"""
    worker: Optional[str] = None
    """be this contender, in this process (used by the script itself)"""


def random_rollout(agent: nfpo.Agent, args: nfpo.Args, device: torch.device) -> tuple:
    """Random numbers in the shapes of a rollout, log-probabilities those of the policy."""
    shape = (args.num_steps, args.num_envs)
    obs = torch.randn(*shape, SIZES["obs_dim"] + SIZES["privileged_dim"], device=device)
    with torch.no_grad():
        _, actions, log_probs = agent.act(obs)
    rewards, values, next_values = torch.randn(3, *shape, device=device)
    done = torch.rand(shape, device=device) < 0.001
    return obs, actions, log_probs, rewards, values, next_values, done, done, torch.zeros_like(done)


def work(args: SpeedArgs) -> dict:
    """Time one contender in this process."""
    policy_class, compiled = CONTENDERS[args.worker]
    torch.set_num_threads(args.torch_threads)
    torch.manual_seed(1)
    device, on_gpu = torch.device(args.device), args.device.startswith("cuda")
    settings = nfpo.Args(num_envs=args.num_envs, compile=compiled, device=args.device)
    if policy_class is GaussianPolicy:
        settings.ent_coef = 1e-3
    agent = nfpo.Agent(settings, policy_class, **SIZES).to(device)
    parameters = torch.nn.Parameter(parameters_to_vector(agent.trained()).detach())
    vector_to_parameters(parameters.data, agent.trained())
    optimizer = torch.optim.Adam([parameters], lr=1e-5, fused=True)
    act, gradient_fn = agent.act, partial(nfpo.ppo_gradient, agent, settings)
    is_compiled = compiled and shutil.which("g++") is not None
    if is_compiled:
        act, gradient_fn = torch.compile(act), torch.compile(gradient_fn)

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = clock()
    rollout = random_rollout(agent, settings, device)
    with torch.no_grad():
        act(rollout[0][0])
    nfpo.ppo_update(agent, optimizer, settings, rollout, gradient_fn)
    compilation = clock() - start
    learning, acting = [], []
    for _ in range(args.iterations):
        start = clock()
        nfpo.ppo_update(agent, optimizer, settings, rollout, gradient_fn)
        learning.append(clock() - start)
        start = clock()
        with torch.no_grad():
            for obs in rollout[0]:
                act(obs)
        acting.append(clock() - start)
    compilation = max(0.0, compilation - learning[0]) if is_compiled else 0.0
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "learning_s": statistics.median(learning),
        "acting_s": statistics.median(acting),
        "compilation_s": compilation,
        "peak_memory_mib": peak / 2**20,
        "parameters": sum(p.numel() for p in agent.policy.parameters() if p.requires_grad),
        "is_compiled": is_compiled,
    }


def main() -> None:
    args = tyro.cli(SpeedArgs, description=__doc__.split("\n")[0])
    if args.worker:
        print(json.dumps(work(args)))
        return
    rows = []
    flags = f"--device {args.device} --torch-threads {args.torch_threads} --iterations {args.iterations}".split()
    for number, name in tqdm([(i, name) for i in range(args.rounds) for name in CONTENDERS], unit="run"):
        command = [sys.executable, __file__, *flags, "--num-envs", str(args.num_envs), "--worker", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"round": number, "contender": name, "device": args.device, **json.loads(out.splitlines()[-1])})
    if args.csv:
        is_new = not args.csv.exists()
        with open(args.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if is_new:
                writer.writeheader()
            writer.writerows(rows)

    print("\n" + table(rows))


def table(rows: list[dict]) -> str:
    """The rows of all rounds as Markdown: medians, and of ratios to PPO the medians of those within a round."""
    lines = [
        "| | learning, x PPO in the same mode | x PPO uncompiled | learning, s | 24 decisions, x PPO in the same mode "
        "| peak memory, MiB | compilation, s | parameters of the policy |",
        "|-|-|-|-|-|-|-|-|",
    ]
    of = {name: [row for row in rows if row["contender"] == name] for name in CONTENDERS}
    for name, mine in of.items():
        median = {key: statistics.median(row[key] for row in mine) for key in mine[0] if key.endswith(("_s", "_mib"))}
        same, plain, acting = (
            statistics.median(a[key] / b[key] for a, b in zip(mine, of[other]))
            for key, other in (
                ("learning_s", name.replace("NFPO", "PPO")),
                ("learning_s", "PPO"),
                ("acting_s", name.replace("NFPO", "PPO")),
            )
        )
        is_eager = "compiled" in name and not all(row["is_compiled"] for row in mine)
        lines.append(
            f"| {name}{' (fell back to eager)' if is_eager else ''} | {same:.2f} | {plain:.2f} "
            f"| {median['learning_s']:.2f} | {acting:.2f} | {median['peak_memory_mib']:.0f} "
            f"| {median['compilation_s']:.0f} | {mine[0]['parameters']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
