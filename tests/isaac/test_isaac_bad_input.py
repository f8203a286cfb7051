"""Promise: bad input is named: its flag, what was given, what is allowed. Status 2, and nothing is left behind."""

import pytest
import torch

import nfpo_isaacgym as nfpo
from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

from .conftest import SCRIPT, SMALL, assert_one_line, run, small_args

TASK = "--env-id cartpole"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--device gpu0", ["device", "gpu0", "cpu"]),
        ("--num-minibatches 5", ["--num-minibatches is 5", "48"]),
        ("--num-minibatches 48", ["--num-minibatches is 48", "two samples"]),
        ("--total-timesteps 47", ["--total-timesteps is 47", "48"]),
        ("--num-envs 0", ["num_envs", "0", "greater than 0"]),
        ("--critic-hidden-dims 0", ["critic_hidden_dims", "0", "greater than 0"]),
        ("--scale-bound nan", ["scale_bound", "nan", "finite"]),
        ("--base-std 0", ["base_std", "0", "greater than 0"]),
        ("--gamma 1.1", ["gamma", "1.1", "less than or equal to 1"]),
        ("--clip-coef 1", ["clip_coef", "1", "less than 1"]),
        ("--seed -1", ["seed", "-1", "greater than or equal to 0"]),
        ("--desired-kl 0.01 --anneal-lr", ["--desired-kl", "--anneal-lr"]),
        ("--export-jit a.pt", ["--evaluate"]),
        ("--evaluate a --export-onnx a.onnx --temperature 0.3", ["a"]),
        ("--scale-fn relu", ["relu", "tanh"]),
    ],
)
def test_flags(flags, words, cli, tmp_path):
    """What a flag may be is checked before anything is written; tyro prints it in a frame of its own."""
    status, _, err = cli(SMALL, TASK, flags)
    said = " ".join(err.replace("│", " ").split())
    assert status == 2 and list(tmp_path.iterdir()) == []
    for word in words:
        assert word in said, (word, said)


@pytest.mark.refused
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id cartpol", ["--env-id is cartpol", "allowed are cartpole, pointmass"]),
        ("--env-id no_such_module:task", ["--env-id", "no_such_module"]),
        ("--env-id isaacgymenvs:Cartpol", ["--env-id is isaacgymenvs:Cartpol"]),
        ("--env-id isaacgymenvs:AnymalTerrain", ["AnymalTerrain", "does not reset like the other tasks"]),
        ("--env-id isaacgymenvs:Cartpole", ["--device cpu", "isaacgymenvs:Cartpole"]),
        ("--env-id isaacgymenvs:Cartpole --no-randomize", ["--no-randomize", "isaacgymenvs:Cartpole"]),
        ("--env-id cartpole --device cuda:0", ["cartpole on cuda:0"]),
        ("--resume nowhere", ["nowhere", "checkpoint"]),
        ("--evaluate nowhere", ["nowhere", "checkpoint"]),
        ("--resume=", ["checkpoint"]),  # a variable of the shell that is not set
    ],
)
def test_one_line(flags, words, cli, tmp_path):
    """What only the simulator or the disk can tell is one line, and nothing is left behind."""
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert_one_line(cli(SMALL, flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_reason_without_words(cli, monkeypatch):
    """A simulator that fails with an empty message is named by the type of its failure."""
    import legged_gym.envs

    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(legged_gym.envs.CartPoleTask, "__init__", fails)
    assert_one_line(cli(SMALL, TASK), "--env-id is cartpole", "AssertionError")


@pytest.mark.parametrize(
    "env_id, missing", [("g1", "isaacgym"), ("g1", "legged_gym"), ("isaacgymenvs:Ant", "isaacgymenvs")]
)
def test_missing_package(env_id, missing, tmp_path):
    """Whoever lacks a simulator learns in one line what to install from where."""
    (tmp_path / "hide.py").write_text(
        f"import runpy, sys\nsys.modules[{missing!r}] = None\nsys.argv[:] = sys.argv[1:]\n"
        "import torch\ntorch.cuda.set_device = print\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
        if missing == "isaacgymenvs"
        else f"import runpy, sys\nsys.modules[{missing!r}] = None\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = SMALL.replace("--device cpu", "--device cuda:0") if missing == "isaacgymenvs" else SMALL
    ended = run(tmp_path / "hide.py", SCRIPT, "--env-id", env_id, flags, cwd=tmp_path)
    words = ["https://developer.nvidia.com/isaac-gym", "unitreerobotics/unitree_rl_gym", "isaac-sim/IsaacGymEnvs"]
    assert_one_line(ended, env_id, missing, "Python 3.8", *words)
    assert not (tmp_path / "runs").exists()


def test_simulator_after_pytorch(tmp_path):
    """Isaac Gym refuses to be imported after PyTorch; the script imports it first, and says why where it could not."""
    ended = run(SCRIPT, SMALL, TASK, "--total-timesteps 48", cwd=tmp_path)
    assert ended.status == 0, ended
    (tmp_path / "late.py").write_text(
        "import torch, runpy, sys\nsys.argv[:] = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    ended = run(tmp_path / "late.py", SCRIPT, SMALL, TASK, cwd=tmp_path)
    assert_one_line(ended, "PyTorch was imported before isaacgym")


def test_foreign_checkpoints(cli, tmp_path):
    """Another policy's run, a damaged checkpoint and one of a stranger, whose code is not run, are refused."""
    run_dir = nfpo.Path(nfpo.train(small_args(runs_dir=str(tmp_path / "runs"), total_timesteps=48))["run_dir"])
    file, right = run_dir / "checkpoint.pt", (run_dir / "checkpoint.pt").read_bytes()

    class Stranger:
        def __reduce__(self):
            return (nfpo.Path.touch, (tmp_path / "code was run",))

    for flag in ("--evaluate", "--resume"):
        assert_one_line(cli(f"{flag} {run_dir}", policy_class=GaussianPolicy), run_dir.name, "policy.")
        for damage in ("truncated", "stranger", "other arguments"):
            if damage == "truncated":
                file.write_bytes(right[:1000])
            else:
                args = {"no_such_flag": 1} if damage == "other arguments" else Stranger()
                torch.save({"args": args}, file)
            assert_one_line(cli(f"{flag} {run_dir}"), run_dir.name, "no checkpoint that fits")
            file.write_bytes(right)
    assert not (tmp_path / "code was run").exists()


def test_unwritable_runs_dir(cli, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(cli(SMALL, TASK, "--runs-dir file/runs"), "file/runs")
