"""What the tests of `rfo_rewarped.py` share. They run in nox's session `rewarped`."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "rfo_rewarped.py"
SMALL = "--num-envs 4 --horizon 8 --critic-epochs 2 --total-timesteps 96".split()

if find_spec("rewarped") is None:  # the other sessions come by here too
    collect_ignore_glob = ["*"]
else:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "baselines"), str(Path(__file__).parent)]
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import rfo_rewarped as rfo

    torch.set_num_threads(1)


class Ended(NamedTuple):
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


def small_args(**flags):
    """Arguments of runs that take a second."""
    small = {"env_id": "rfo_envs:Linear", "num_envs": 4, "horizon": 8, "critic_epochs": 2, "total_timesteps": 96}
    return rfo.Args(**{**small, **flags})


def make(args, policy_class=None, double=False):
    """Environments and an agent, whose field is far from zero."""
    torch.manual_seed(3)
    envs = rfo.make_envs(args, args.num_envs)
    agent = rfo.Agent(args, policy_class or rfo.FlowPolicy, envs)
    for parameter in agent.policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return envs, agent.double() if double else agent


def run(*flags, cwd, path=()) -> Ended:
    """Run the script as a user does, with folders on PYTHONPATH before the tests' own."""
    folders = os.pathsep.join([*map(str, path), str(Path(__file__).parent)])
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    ended = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=170)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`main` inside this process, in an empty folder."""

    def call(*flags, **options) -> Ended:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["rfo_rewarped.py", *map(str, flags)])
        status = 0
        try:
            rfo.main(**options)
        except SystemExit as error:
            status = error.code or 0
        return Ended(status, *capsys.readouterr())

    return call


def scalars(run_dir) -> dict:
    """Every scalar of a run, {name: [(step, value)]}."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
