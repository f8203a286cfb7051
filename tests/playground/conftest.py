"""What the tests of `nfpo_playground_jax.py` share. They run in an environment of their own (see noxfile.py), together
with the PyTorch script's packages, since both are compared."""

import atexit
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "nfpo_playground_jax.py"

# Two devices on any machine, and programs that compile sooner and run slower. Read when JAX starts, here and in the
# processes that tests start: all share one cache of compiled programs, and compile each of them once.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="nfpo-jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["PYTHONPATH"] = str(ROOT)

if importlib.util.find_spec("mujoco_playground") is None:
    collect_ignore_glob = ["*"]  # nox passes them in the session `playground`
else:
    import jax
    import numpy as np

    import nfpo_playground_jax as nfpo
    import tests.playground.envs  # noqa: F401  # registers them

# Networks and batches with which an iteration takes milliseconds; what counts is compilation.
SMALL = {
    "env_id": "tests.playground.envs:Lane",
    "num_envs": 4,
    "num_steps": 8,
    "num_minibatches": 2,
    "update_epochs": 2,
    "hidden_dim": 8,
    "num_flow_layers": 2,
    "critic_hidden_dims": (8,),
    "total_timesteps": 64,
}
FLAGS = "--env-id tests.playground.envs:Lane --num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 2".split()
FLAGS += "--hidden-dim 8 --num-flow-layers 2 --critic-hidden-dims 8 --total-timesteps 64".split()


def small_args(**flags):
    """`FLAGS`, for `train`."""
    return nfpo.Args(**{**SMALL, **flags})


AGENTS = {}


def first_agent(policy_class=None, **flags):
    """Arguments, environments and the agent before the first iteration; each is made once."""
    key = repr((policy_class, sorted(flags.items())))
    if key not in AGENTS:
        args = small_args(**flags)
        envs = nfpo.make_envs(args)
        make = functools.partial(nfpo.make_agent, args, policy_class or nfpo.FlowPolicy, envs)
        AGENTS[key] = args, envs, jax.jit(make)()
    return AGENTS[key]


def collect(agent, envs, args):
    """A compiled rollout: the agent after it, the buffer and the metrics."""
    return jax.jit(functools.partial(nfpo.collect_rollout, envs=envs, args=args))(agent)


def update(agent, args, rollout):
    """A compiled update on one device: the agent after it and the metrics."""
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("envs",))):
        return jax.jit(functools.partial(nfpo.ppo_update, args=args))(agent, rollout=rollout)


@pytest.fixture
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`main` inside this process, in an empty folder; returns status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, **options):
        monkeypatch.setattr(sys, "argv", ["nfpo_playground_jax.py", *map(str, flags)])
        capsys.readouterr()
        status = 0
        try:
            nfpo.main(**options)
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


def start(*flags, cwd, script=(SCRIPT,), **variables) -> subprocess.Popen:
    """Start the script as a user does."""
    command = [sys.executable, *map(str, (*script, *flags))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **variables}, start_new_session=True, **pipes)


def finish(process, status=0, timeout=240) -> str:
    """Wait for a process and return what it printed; one that hangs is killed and fails the test."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hung for {timeout} s\n{process.communicate()[0][-3000:]}")
    assert process.returncode == status, out[-3000:]
    return out


def wait_for(condition, process) -> None:
    deadline = time.time() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline, "waited too long"
        time.sleep(0.005)


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def steps_in(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in a folder."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def saved(run_dir, policy_class=None, **flags) -> list:
    """Every array of a run's newest checkpoint."""
    args, _, agent = first_agent(policy_class, **flags)
    found = nfpo.load_checkpoint(run_dir, policy_class or nfpo.FlowPolicy, agent)["agent"]
    return [np.asarray(x) for x in jax.tree.leaves(found)]


def scalars(run_dir: Path) -> dict:
    """Every scalar of a run as TensorBoard shows it: {name: [(step, value)]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return {name: [(x.step, x.value) for x in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture(scope="session")
def lane_run(tmp_path_factory) -> Path:
    """A run of two iterations. Read only."""
    return Path(nfpo.train(small_args(runs_dir=str(tmp_path_factory.mktemp("runs"))))["run_dir"])


@pytest.fixture(scope="session")
def menagerie(tmp_path_factory):
    """The meshes of Unitree's Go1 and G1, which Playground would clone from the network: from a wheel of mjlab."""
    from mujoco_playground._src import mjx_env

    if mjx_env.MENAGERIE_PATH.exists():
        yield
        return
    folder = tmp_path_factory.mktemp("menagerie")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "mjlab==1.6.0"]
    if subprocess.run(download, check=False).returncode:
        pytest.skip("no robot meshes: neither MuJoCo Menagerie nor the wheel of mjlab can be had here")
    (wheel,) = folder.glob("*.whl")
    robots = "mjlab/asset_zoo/robots/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(robots) and "/xmls/assets/" in name and not name.endswith("/"):
                robot, file = name.removeprefix(robots).split("/xmls/assets/")
                target = folder / robot / "assets" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mjx_env, "MENAGERIE_PATH", type(mjx_env.MENAGERIE_PATH)(folder))
        yield
