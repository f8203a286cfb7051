"""Promise: bad input gets one line naming the flag, what was given and what is allowed, and leaves nothing behind."""

import json
import sys

import pytest

import nfpo_isaacgym as nfpo
from benchmarks.baselines.ppo_isaacgym import GaussianPolicy

from .conftest import SCRIPT, SMALL, run, small_args

TASK = "--env-id cartpole"


def assert_one_line(ended, *words):
    """Status 2, one line on stderr with all these words."""
    status, _, err = ended
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1, ended
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id cartpol", ["--env-id", "cartpol,", "cartpole"]),
        ("--env-id isaacgymenvs:Cartpol", ["--env-id", "Cartpol,", "Cartpole"]),
        ("--env-id isaacgymenvs:AnymalTerrain", ["--env-id", "AnymalTerrain", "anymal_c_rough", "leggedrobotics"]),
        ("--env-id isaacgymenvs:FactoryTaskNutBoltPick", ["--env-id", "FactoryTaskNutBoltPick", "isaacgymenvs.make"]),
        ("--env-id isaacgymenvs:FactoryBase", ["--env-id", "FactoryBase", "isaacgymenvs.make"]),
        ("--env-id isaacgymenvs:AllegroHandDextremeADR", ["--env-id", "AllegroHandDextremeADR", "dictionary"]),
        ("--env-id isaacgymenvs:Cartpole --total-timesteps 48", ["--device", "cpu", "cuda:0", "isaacgymenvs:Cartpole"]),
        ("--env-id isaacgymenvs:Cartpole --no-randomize --total-timesteps 48", ["--no-randomize", "Cartpole.yaml"]),
        ("--env-id no_such_module:task", ["--env-id", "no_such_module"]),
        ("--device gpu0", ["--device", "gpu0", "cpu"]),
        ("--device cuda", ["--device", "cuda,", "cuda:0"]),
        ("--device cuda:0", ["--device", "cuda:0", "0 GPUs", "cpu"]),
        ("--num-minibatches 5", ["--num-minibatches", "5", "48"]),
        ("--num-minibatches 48", ["--num-minibatches", "48", "24"]),
        ("--total-timesteps 47", ["--total-timesteps", "47", "48"]),
        ("--num-envs 0", ["--num-envs", "0", "at least 1"]),
        ("--critic-hidden-dims 0", ["--critic-hidden-dims", "0", "at least 1"]),
        ("--scale-bound nan", ["--scale-bound", "nan", "above 0"]),
        ("--reward-scale 0", ["--reward-scale", "0", "above 0"]),
        ("--gamma 1.1", ["--gamma", "1.1", "between 0 and 1"]),
        ("--clip-coef 1", ["--clip-coef", "1", "below 1"]),
        ("--ent-coef -1", ["--ent-coef", "-1", "at least 0"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--desired-kl 0", ["--desired-kl", "0", "above 0"]),
        ("--keep-interval 0 --total-timesteps 48", ["--keep-interval", "0", "at least 1"]),
        ("--desired-kl 0.01 --anneal-lr", ["--desired-kl", "--anneal-lr"]),
        ("--export-jit a.pt", ["--export-jit", "--evaluate"]),
        ("--export-onnx a.onnx", ["--export-onnx", "--evaluate"]),
        ("--eval-episodes 0", ["--eval-episodes", "0", "at least 1"]),
        ("--resume nowhere", ["--resume", "nowhere"]),
        ("--evaluate nowhere", ["--evaluate", "nowhere"]),
        ("--resume=", ["--resume", "holds no"]),  # a variable of the shell that is not set
        ("--evaluate=", ["--evaluate", "holds no"]),
        ("--resume nowhere --evaluate nowhere", ["--resume", "--evaluate", "one of them"]),
    ],
)
def test_flags(flags, words, cli, tmp_path):
    """Each wrong flag is named with its value and what is allowed, before anything is written."""
    assert_one_line(cli(SMALL, TASK, flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_nearest_names_can_be_had(cli):
    """What is proposed instead of a wrong name is not refused in turn."""
    ended = cli(SMALL, "--env-id isaacgymenvs:AllegroHandDextrem")
    assert_one_line(ended, "AllegroHandDextrem,", "nearest names")
    assert "Dextreme" not in ended.err.partition("nearest")[2]


def test_evaluation_of_isaacgymenvs(cli, tmp_path, monkeypatch):
    """What IsaacGymEnvs' configuration decides is refused in an evaluation too, but an export asks for none of it."""
    args = small_args(env_id="isaacgymenvs:Cartpole", runs_dir=str(tmp_path / "runs"), total_timesteps=48)
    with monkeypatch.context() as patch:
        patch.setattr(nfpo, "check_isaacgymenvs", lambda *_: None)
        run_dir = nfpo.train(args)["run_dir"]
    assert_one_line(cli(f"--evaluate {run_dir}"), "--device", "cpu")
    assert_one_line(cli(f"--evaluate {run_dir} --no-randomize"), "--no-randomize")
    assert cli(f"--evaluate {run_dir} --eval-episodes 0 --export-jit policy.pt").status == 0


def test_unwritable_runs_dir(cli, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(cli(SMALL, TASK, "--runs-dir file/runs"), "--runs-dir", "file/runs")


def test_twin_has_no_flow_flags(cli):
    assert_one_line(cli(TASK, "--device cpu --scale-bound 0.3", policy_class=GaussianPolicy), "--scale-bound", "0.3")


@pytest.mark.parametrize(
    "env_id, missing, words",
    [
        ("g1", "isaacgym", ["Isaac Gym", "https://developer.nvidia.com/isaac-gym", "Python 3.8"]),
        ("g1", "legged_gym", ["legged_gym", "https://github.com/unitreerobotics/unitree_rl_gym"]),
        ("isaacgymenvs:Ant", "isaacgymenvs", ["isaacgymenvs", "https://github.com/isaac-sim/IsaacGymEnvs"]),
    ],
)
def test_missing_package(env_id, missing, words, tmp_path):
    """Whoever lacks a simulator learns in one line what to install from where."""
    (tmp_path / "hide.py").write_text(
        f"import runpy, sys\nsys.modules[{missing!r}] = None\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    ended = run(tmp_path / "hide.py", SCRIPT, "--env-id", env_id, SMALL, cwd=tmp_path)
    assert_one_line(ended, "--env-id", env_id, *words)
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
    """Another policy's run, a damaged checkpoint and a contradicting flag are named."""
    run_dir = nfpo.Path(nfpo.train(small_args(runs_dir=str(tmp_path / "runs"), total_timesteps=48))["run_dir"])
    for flag in ("--evaluate", "--resume"):
        assert_one_line(cli(f"{flag} {run_dir}", policy_class=GaussianPolicy), flag, "FlowPolicy", "GaussianPolicy")
        assert_one_line(cli(f"{flag} {run_dir} --hidden-dim 9"), "--hidden-dim", "9", "8")
    assert_one_line(cli(f"--evaluate {run_dir} --export-jit nowhere/a.pt"), "--export-jit", "nowhere/a.pt")
    ended = cli(f"--evaluate {run_dir} --export-jit a.pt --temperature 0.3")  # the file would be another policy
    assert_one_line(ended, "--temperature is 0.3", "allowed is 0 with --export-jit")
    (run_dir / "checkpoint.pt").write_bytes((run_dir / "checkpoint.pt").read_bytes()[:1000])
    assert_one_line(cli(f"--evaluate {run_dir}"), "--evaluate", "truncated")
    assert_one_line(cli(f"--resume {run_dir}"), "--resume", "truncated")
    saved = json.loads((run_dir / "args.json").read_text())
    (run_dir / "args.json").write_text(json.dumps({**saved, "no_such_flag": 1}))
    assert_one_line(cli(f"--resume {run_dir}"), "--resume", "no_such_flag")
    for name, value in (("num_steps", "many"), ("critic_hidden_dims", 32)):
        (run_dir / "args.json").write_text(json.dumps({**saved, name: value}))
        assert_one_line(cli(f"--resume {run_dir}"), "--resume")


def test_total_timesteps_of_a_resumed_run(cli, tmp_path):
    """Fewer steps than are done, or another number for a learning rate that is annealed over it, are named."""
    for flags, total, words in (
        ({}, 95, ["95", "at least the 96 steps"]),
        ({"anneal_lr": True}, 192, ["192", "96", "annealed"]),
    ):
        args = small_args(runs_dir=str(tmp_path / "runs"), total_timesteps=96, **flags)
        run_dir = nfpo.Path(nfpo.train(args)["run_dir"])
        before = (run_dir / "args.json").read_text()
        assert_one_line(cli(f"--resume {run_dir} --total-timesteps {total}"), "--total-timesteps", *words)
        assert (run_dir / "args.json").read_text() == before
    assert_one_line(cli(f"--evaluate {run_dir} --total-timesteps 192"), "--total-timesteps", "192", "96")
    saved = json.loads(before)
    (run_dir / "args.json").write_text(json.dumps({**saved, "total_timesteps": 192}))
    assert_one_line(cli(f"--resume {run_dir}"), "--total-timesteps", "96", "192")  # nor by hand


def test_non_finite_stops(cli, tmp_path, monkeypatch):
    """A simulator that gives NaN ends the run with status 3 and one line; the checkpoint before it is kept."""
    nfpo.import_simulator("cartpole")
    from legged_gym.envs import CartPoleTask

    step, calls = CartPoleTask.step, []

    def broken(self, actions):
        calls.append(1)
        result = step(self, actions)
        if len(calls) > 10:
            self.rew_buf[:] = float("nan")
        return result

    monkeypatch.setattr(CartPoleTask, "step", broken)
    status, _, err = cli(SMALL, TASK, "--total-timesteps 480")
    assert status == 3 and "not finite" in err and "simulator" in err and len(err.strip().splitlines()) == 1, err
    (run_dir,) = (tmp_path / "runs").iterdir()
    checkpoint = nfpo.load_checkpoint(run_dir)
    assert checkpoint["iteration"] == 1
    assert all(value.isfinite().all() for value in checkpoint["policy"].values())
    assert sys.argv[0] == "nfpo_isaacgym.py"
