"""What the tests of `nfpo_playground_jax.py` share. They run in an environment of their own (see noxfile.py), together
with the PyTorch script's packages, since both are compared."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

# Two devices on any machine, and programs that compile sooner and run slower. Read when JAX starts.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
)
# The tests train the same few programs again and again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="nfpo-jax-"))
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

if importlib.util.find_spec("mujoco_playground") is None:
    collect_ignore_glob = ["*"]  # nox passes them in the session `playground`
else:
    import jax

    import nfpo_playground_jax as nfpo
    import tests.playground.envs  # noqa: F401  # registers them

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "nfpo_playground_jax.py"
TWIN = ROOT / "benchmarks" / "baselines" / "ppo_playground_jax.py"
# Networks and batches with which an iteration takes milliseconds; what counts is compilation.
SMALL = (
    "--num-envs 4 --num-steps 8 --num-minibatches 2 --update-epochs 2 --hidden-dim 8 --critic-hidden-dims 8 "
    "--num-flow-layers 2"
).split()


def small_args(**flags):
    """The same as `SMALL`, for `train`."""
    small = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "hidden_dim": 8}
    small |= {"critic_hidden_dims": (8,), "num_flow_layers": 2, "env_id": "tests.playground.envs:Lane"}
    return nfpo.Args(**{**small, **flags})


def learner_and_state(policy_class=None, **flags):
    """A learner on two iterations' worth of flags, and its first state, without compilation of an iteration."""
    args = small_args(**flags)
    learner = nfpo.make_learner(args, policy_class or nfpo.FlowPolicy, nfpo.make_envs(args))
    return learner, jax.jit(lambda: nfpo.init_state(learner, args.seed))()


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


@pytest.fixture(scope="session")
def lane_run(tmp_path_factory) -> Path:
    """A short run. Read only."""
    folder = tmp_path_factory.mktemp("runs")
    return Path(nfpo.train(small_args(runs_dir=str(folder), total_timesteps=64))["run_dir"])


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
