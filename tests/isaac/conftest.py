"""What the tests of `nfpo_isaacgym.py` share. They run on Python 3.8 and PyTorch 2.4.1, in nox's session `isaacgym`,
over a stand-in for the simulator (see ../isaacgym_standin/README.md)."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests" / "isaacgym_standin"
SCRIPT = ROOT / "nfpo_isaacgym.py"
TWIN = ROOT / "benchmarks" / "baselines" / "ppo_isaacgym.py"

if sys.version_info >= (3, 9):  # noqa: UP036  # the other sessions come by here too
    collect_ignore_glob = ["*"]
else:
    sys.path.insert(0, str(STANDIN))
    import nfpo_isaacgym as nfpo  # imports the stand-in for Isaac Gym, and only then PyTorch

    nfpo.torch.set_num_threads(1)

# Iterations that take milliseconds.
SMALL = "--device cpu --no-compile --num-envs 8 --num-steps 6 --num-minibatches 2 --update-epochs 2 --hidden-dim 8"


class Ended(NamedTuple):
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


def environment(simulator=True):
    """This process's variables, one thread, and the stand-in where `simulator` says so."""
    paths = [str(STANDIN)] if simulator else []
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}


def pytest_configure(config):
    config.addinivalue_line("markers", "refused: IsaacGymEnvs' tasks are refused on the CPU, as for users")


def run(*command, cwd, simulator=True, timeout=300, split=True) -> Ended:
    """Run the script, or `command` if it starts with a path, as a user does."""
    command = [str(x) for part in command for x in (part.split() if split and isinstance(part, str) else [part])]
    script = [] if command[0].endswith(".py") or command[0].startswith("-m") else [str(SCRIPT)]
    ended = subprocess.run(
        [sys.executable, *script, *command],
        cwd=str(cwd),
        env=environment(simulator),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def small_args(**flags):
    """The same as `SMALL`, for `train`."""
    small = {"device": "cpu", "compile": False, "num_envs": 8, "num_steps": 6, "num_minibatches": 2}
    small.update({"update_epochs": 2, "hidden_dim": 8, "env_id": "cartpole"})
    return nfpo.Args(**{**small, **flags})


def make(args, policy_class=None):
    """Environments and an agent whose outputs are far from zero everywhere, before the first reset."""
    envs = nfpo.make_envs(args, args.num_envs, args.seed)
    nfpo.torch.manual_seed(3)
    agent = nfpo.Agent(args, policy_class or nfpo.FlowPolicy, *envs.sizes)
    for parameter in agent.parameters():
        parameter.data += 0.3 * nfpo.torch.randn_like(parameter)
    return envs, agent


def make_optimizer(agent, args):
    """One over the vector that the agent's parameters become views of, as in `train`."""
    parameters = nfpo.nn.Parameter(nfpo.parameters_to_vector(agent.trained()).detach())
    nfpo.vector_to_parameters(parameters.data, agent.trained())
    return nfpo.torch.optim.Adam([parameters], lr=args.learning_rate, fused=True)


def assert_one_line(ended, *words):
    """Status 2 and one line on stderr with all these words."""
    lines = ended.err.strip().splitlines()
    assert ended.status == 2 and len(lines) == 1, ended
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


class Cpu(str):
    """The device `cpu` for PyTorch, and a GPU for the script, which keeps IsaacGymEnvs' tasks off the CPU."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return False

    def __getitem__(self, key):
        return "0"


@pytest.fixture(autouse=True)
def isaacgymenvs_on_the_cpu(request, monkeypatch):
    """The stand-in's tasks run there as well; `refused` marks tests of the refusal."""
    if "refused" in request.keywords:
        return
    right = nfpo.make_isaacgymenvs

    def make_isaacgymenvs(module, task, num_envs, seed, args):
        return right(module, task, num_envs, seed, argparse.Namespace(**{**vars(args), "device": Cpu("cpu")}))

    monkeypatch.setattr(nfpo, "make_isaacgymenvs", make_isaacgymenvs)


@pytest.fixture(autouse=True)
def fresh_configuration():
    """A task's configuration is global; what one test switched off must not be off in the next one."""
    yield
    if "legged_gym.envs" in sys.modules:
        cfg = sys.modules["legged_gym.envs"].EnvCfg
        cfg.noise.add_noise = cfg.domain_rand.randomize_friction = cfg.domain_rand.push_robots = True


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call `main` in this process, in an empty folder: (status, out, err)."""

    def call(*flags, policy_class=None):
        words = [word for part in flags for word in str(part).split()]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["nfpo_isaacgym.py", *words])
        status, _ = 0, capsys.readouterr()
        try:
            nfpo.main(policy_class or nfpo.FlowPolicy)
        except SystemExit as exit:
            status = exit.code
        return Ended(status, *capsys.readouterr())

    return call
