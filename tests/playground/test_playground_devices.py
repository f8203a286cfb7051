"""Promise: several devices and several processes compute what one device computes, and share the work."""

import functools
import os
import socket
from pathlib import Path

import jax
import numpy as np
import pytest

import nfpo_playground_jax as nfpo
from playground.conftest import FLAGS, finish, first_agent, run_folder, saved, small_args, start

PARALLEL = {"num_envs": 8, "num_steps": 16, "total_timesteps": 256, "hidden_dim": 32, "critic_hidden_dims": (32, 32)}
PARALLEL_FLAGS = [*FLAGS, *"--num-envs 8 --num-steps 16 --total-timesteps 256 --hidden-dim 32".split()]
PARALLEL_FLAGS += ["--critic-hidden-dims", 32, 32]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_device")
    return Path(nfpo.train(small_args(runs_dir=str(folder), **PARALLEL))["run_dir"])


def assert_close(run_dir, expected) -> None:
    ours, theirs = saved(run_dir, **PARALLEL), saved(expected, **PARALLEL)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_two_devices_are_as_one(one_device, tmp_path):
    """Two virtual devices give one device's result up to rounding, each holds half of the environments, and one may
    read their state."""
    assert jax.device_count() == 2
    args = small_args(runs_dir=str(tmp_path), num_devices=2, **PARALLEL)
    run_dir = nfpo.train(args)["run_dir"]
    assert_close(run_dir, one_device)
    _, envs, agent = first_agent(**PARALLEL)
    shapes = nfpo.place(jax.eval_shape(lambda: agent), args)
    agent = nfpo.load_checkpoint(run_dir, nfpo.FlowPolicy, shapes)["agent"]
    assert {x.data.shape for x in agent.env_state.data.addressable_shards} == {(4, 3)}
    assert {x.device for x in agent.env_state.data.addressable_shards} == set(jax.devices())
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(agent.params))


def test_two_devices_share_the_work():
    """The compiled iteration computes half of the environments and half of each minibatch on each of two devices."""
    _, envs, agent = first_agent(**PARALLEL)
    flops = []
    for num_devices in (1, 2):
        args = small_args(num_devices=num_devices, **PARALLEL)
        shapes = nfpo.place(jax.eval_shape(lambda: agent), args)
        iterate = jax.jit(functools.partial(nfpo.train_iteration, envs=envs, args=args))
        with jax.set_mesh(shapes.key.sharding.mesh):
            flops.append(iterate.lower(shapes).compile().cost_analysis()["flops"])
    print(flops)
    assert flops[1] < 0.6 * flops[0]


def run_two_processes(folder: Path, *flags, **options) -> list[str]:
    """What two processes print that find each other as on a cluster with SLURM."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    cluster |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    cluster |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=2", "count=1")}
    processes = [start(*flags, cwd=folder, SLURM_PROCID=str(rank), **cluster, **options) for rank in range(2)]
    return [finish(process) for process in processes]


def test_two_processes_are_as_one(one_device, tmp_path):
    """Two processes give one process's result up to rounding, in one folder, with one log and one progress bar."""
    outs = run_two_processes(tmp_path, *PARALLEL_FLAGS, "--distributed")
    run_dir = run_folder(tmp_path)
    assert "KL" in outs[0] and "KL" not in outs[1]
    assert len(list(run_dir.glob("events.*"))) == 1
    assert_close(run_dir, one_device)


PHYSICS = """
import jax
import nfpo_playground_jax as nfpo
jax.distributed.initialize()
envs = nfpo.make_envs(nfpo.Args(num_envs=2))
print(jax.jit(envs.reset)(jax.random.split(jax.random.PRNGKey(0), 2)).obs.shape)
"""


def test_every_process_can_read_the_physics(tmp_path):
    """Playground puts the simulator's model on the first process's device, from which no other process can read."""
    outs = run_two_processes(tmp_path, "-c", PHYSICS, script=())
    assert all("(2, 5)" in out for out in outs)
