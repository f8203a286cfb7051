"""What several test files share: running the script, here or as a process of its own, and reading what it left."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nfpo_continuous_action as nfpo

ROOT = Path(nfpo.__file__).parent
SCRIPT = ROOT / "nfpo_continuous_action.py"
TWIN = ROOT / "benchmarks" / "baselines" / "ppo_continuous_action.py"
# Two iterations of two environments: every promise but learning needs no more.
SMALL = "--no-compile --num-envs 2 --num-steps 32 --num-minibatches 2 --update-epochs 1 --total-timesteps 128".split()

torch.set_num_threads(1)


class Ended(NamedTuple):
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


def environment(**variables: str) -> dict[str, str]:
    """This process's variables, one thread, the tests' environments importable, and `variables`."""
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **paths, **variables}


def start(*flags, cwd: Path, script: Path = SCRIPT, launcher: tuple = (), **variables: str) -> subprocess.Popen:
    """Start a script as a user does, in a process group of its own."""
    command = [sys.executable, *launcher, str(script), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment(**variables), start_new_session=True, **pipes)


def finish(process: subprocess.Popen, timeout: float = 180) -> Ended:
    """Wait for a process; one that hangs is killed with all its children and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hung for {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    return Ended(process.returncode, out, err)


def run(*flags, cwd: Path, **options) -> Ended:
    """Run a script to its end."""
    return finish(start(*flags, cwd=cwd, **options))


def wait_for(condition, process: subprocess.Popen, timeout: float = 120) -> None:
    """Wait until `condition()` is true, while `process` lives."""
    deadline = time.time() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "waited too long"
        time.sleep(0.005)


def run_folders(folder: Path) -> list[Path]:
    """The run folders below `folder`/runs."""
    return sorted((folder / "runs").glob("*")) if (folder / "runs").exists() else []


def scalars(run_dir: Path, purge: bool = True) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run as TensorBoard reads it, {name: [(step, value)]}; without `purge` also what it purges."""
    sizes = {"scalars": 0}
    events = EventAccumulator(str(run_dir), size_guidance=sizes, purge_orphaned_data=purge).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def differences(a, b, where: str = "") -> list[str]:
    """Where two nests of dicts, lists, tensors and plain values differ in a single bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        same = type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where}: {sorted(map(str, a))} against {sorted(map(str, b))}"]
        return [x for key in a for x in differences(a[key], b[key], f"{where}/{key}")]
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{where}: lengths {len(a)} and {len(b)}"]
        return [x for i, (left, right) in enumerate(zip(a, b)) for x in differences(left, right, f"{where}/{i}")]
    else:
        same = a == b
    return [] if same else [where]


class Cli(NamedTuple):
    """`main` inside this process, in an empty folder."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture

    def __call__(self, *flags, **options) -> Ended:
        """Call `main(**options)` with these flags; no exit counts as status 0."""
        self.monkeypatch.setattr(sys, "argv", ["nfpo_continuous_action.py", *map(str, flags)])
        self.capsys.readouterr()
        status = 0
        try:
            nfpo.main(**options)
        except SystemExit as error:
            status = error.code or 0
        return Ended(status, *self.capsys.readouterr())


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, monkeypatch, capsys)


def assert_one_line(ended: Ended, *words) -> None:
    """Status 2 and one line on stderr that holds all these words, progress bars and Gymnasium's warnings aside."""
    noise = re.compile(r"^$|WARN|logger.deprecation|(step|episode)/s")
    lines = [line for line in ended.err.splitlines() if not noise.search(line)]
    assert ended.status == 2 and len(lines) == 1 and lines[0].startswith("error: "), ended
    assert "Traceback" not in ended.err + ended.out
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def gaussian() -> type:
    """The Gaussian twin's policy class."""
    from benchmarks.baselines.ppo_continuous_action import GaussianPolicy

    return GaussianPolicy


SMALL_ARGS = {
    "num_envs": 2,
    "num_steps": 32,
    "num_minibatches": 2,
    "update_epochs": 1,
    "total_timesteps": 128,
    "compile": False,
}


@pytest.fixture(scope="session")
def train_small(tmp_path_factory):
    """Train for two short iterations in a folder of its own; returns the run folder."""

    def train(env_id: str, policy_class: type = nfpo.FlowPolicy, **flags) -> Path:
        folder = tmp_path_factory.mktemp("runs")
        args = nfpo.Args(env_id=env_id, runs_dir=str(folder), **{**SMALL_ARGS, **flags})
        return Path(nfpo.train(args, policy_class)["run_dir"])

    return train


@pytest.fixture(scope="session")
def hopper_run(train_small) -> Path:
    """A short flow run on Hopper-v4. Read only."""
    return train_small("Hopper-v4")


@pytest.fixture
def hopper_copy(hopper_run, tmp_path) -> Path:
    """The same run, to be changed."""
    copy = tmp_path / "runs" / hopper_run.name
    copy.mkdir(parents=True)
    for file in hopper_run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture(scope="session")
def gaussian_run(train_small, gaussian) -> Path:
    """A short run of the Gaussian twin on Hopper-v4. Read only."""
    return train_small("Hopper-v4", gaussian, exp_name="ppo_continuous_action")


def make_agent(
    obs_dim: int = 5,
    action_dim: int = 3,
    policy_class: type = nfpo.FlowPolicy,
    seed: int = 0,
    size: float = 0.0,
    low: float = -1.0,
    high: float = 1.0,
    **args,
) -> nfpo.Agent:
    """An agent in one box without environments, `size` away from its initialization."""
    torch.manual_seed(seed)
    low, high = (np.full(action_dim, bound, np.float32) for bound in (low, high))
    observed = {"policy_obs": slice(None), "critic_obs": slice(None), "obs": torch.zeros(1, obs_dim)}
    agent = nfpo.Agent(nfpo.Args(**args), policy_class, SimpleNamespace(**observed, low=low, high=high))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += size * torch.randn_like(parameter)
    return agent


def noisy_obs(run_dir: Path, batch: int, seed: int = 0) -> np.ndarray:
    """Raw observations around those a run has seen, some of them far out, float32 (batch, obs_dim)."""
    stats = nfpo.load_checkpoint(run_dir)["agent"]
    noise = np.random.default_rng(seed).standard_normal((batch, len(stats["obs_stats.mean"]))) * 4
    mean, var = (stats[f"obs_stats.{name}"].numpy() for name in ("mean", "var"))
    return (mean + np.sqrt(var) * noise).astype(np.float32)
