"""Promise: torchrun trains one policy on the data of all processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, differences, finish, make_agent, run_folders, scalars, start

import nfpo_continuous_action as nfpo

DRIVER = ROOT / "tests" / "distributed_driver.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
RUN = "--env-id Hopper-v4 --no-compile --num-envs 2 --num-steps 64 --num-minibatches 4 --update-epochs 1".split()
RUN += "--total-timesteps 1024 --checkpoint-interval 2 --target-kl 0.001".split()  # 4 iterations of 2 * 2 * 64


def launch(*flags, cwd: Path):
    return finish(start(*flags, cwd=cwd, script=DRIVER, launcher=TORCHRUN, AGENTS=str(cwd)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    ended = launch(*RUN, cwd=folder)
    assert ended.status == 0, ended.err
    assert ended.out.count("Play it") == 1
    return folder


def test_every_rank_ends_with_the_same_agent(trained):
    """Networks and statistics are bit-identical on all ranks, saved, and made of every rank's steps."""
    first, second = (torch.load(trained / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert differences(first["agent"], second["agent"]) == []
    checkpoint = nfpo.load_checkpoint(run_folders(trained)[0])
    assert differences(first["agent"], dict(checkpoint["agent"])) == []
    assert first["agent"]["obs_stats.count"].item() == pytest.approx(1024, abs=1e-3)
    assert first["agent"]["return_stats.count"].item() == pytest.approx(1024, abs=1e-3)


def test_ranks_have_data_of_their_own(trained):
    """Each rank's environments and noise are its own: two copies of one rollout would be no second process."""
    first, second = (torch.load(trained / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(first["obs"], second["obs"])


def test_rank_0_logs(trained):
    """There is one run folder with one event file; steps count over all processes."""
    (run_dir,) = run_folders(trained)
    assert len(list(run_dir.glob("events*"))) == 1
    assert [step for step, _ in scalars(run_dir)["losses/value_loss"]] == [256 * i for i in range(1, 5)]


def test_resume_goes_on_with_new_episodes(trained):
    """Two processes continue from a checkpoint; the step count goes on, the episodes start again and a line says so."""
    (run_dir,) = run_folders(trained)
    ended = launch("--resume", run_dir, "--total-timesteps", 1536, cwd=trained)
    assert ended.status == 0, ended.err
    assert "new ones have started" in ended.out
    assert run_folders(trained) == [run_dir] and nfpo.load_checkpoint(run_dir)["global_step"] == 1536


def test_bad_input_ends_all(tmp_path):
    """No process waits for another that has given up."""
    assert launch(*RUN, "--env-id", "NoSuch-v0", cwd=tmp_path).status != 0
    assert not run_folders(tmp_path)


def batches(rank: int) -> list[torch.Tensor]:
    """What each process sees: data of its own, far from zero. Each step brings as many rows to every process."""
    rng = np.random.default_rng(rank)
    return [torch.from_numpy(1000 + 10 * rank + rng.standard_normal((20, 3)) * [1, 5, 0.1]) for _ in range(4)]


def minibatch(rows: slice) -> list[torch.Tensor]:
    """Some rows of a fixed batch of 64."""
    torch.manual_seed(1)
    obs, actions, rest = torch.randn(64, 5), torch.randn(64, 3), torch.randn(4, 64)
    return [x[rows] for x in (obs, actions, *rest)]


def updated(rows: slice) -> torch.Tensor:
    """The parameters after one step of `ppo_update` on some rows, all processes together."""
    agent, args = (
        make_agent(5, 3),
        nfpo.Args(num_envs=32, num_steps=1, num_minibatches=1, update_epochs=1, norm_adv=False),
    )
    parameters = torch.nn.Parameter(nfpo.parameters_to_vector(agent.trained()).detach())
    nfpo.vector_to_parameters(parameters.data, agent.trained())
    optimizer = torch.optim.SGD([parameters], lr=1.0)
    obs, actions, log_probs, rewards, values, next_values = (x[None] for x in minibatch(rows))
    flags = torch.zeros_like(rewards)
    rollout = obs, actions, log_probs, rewards, values, next_values, flags, flags
    nfpo.ppo_update(agent, optimizer, args, rollout, nfpo.partial(nfpo.ppo_gradient, agent, args))
    return parameters.detach()


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stats = nfpo.RunningMeanStd(3)
    for batch in batches(rank):
        stats.update(batch)
    result = {"stats": stats.state_dict(), "parameters": updated(slice(32 * rank, 32 * rank + 32))}
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """What each of two processes makes of its half."""
    folder = tmp_path_factory.mktemp("two")
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_step_is_that_of_the_pooled_batch(two_processes):
    """The step on two half batches is the step on the whole batch, on both ranks."""
    expected = updated(slice(0, 64))
    for result in two_processes:
        torch.testing.assert_close(result["parameters"], expected, atol=1e-5, rtol=1e-4)
    assert (updated(slice(0, 32)) - expected).abs().max() > 1e-3


def test_statistics_are_those_of_the_pooled_data(two_processes):
    """They are mean and variance over what all processes saw, and the same on both."""
    assert differences(two_processes[0]["stats"], two_processes[1]["stats"]) == []
    data = torch.cat([batch for rank in range(2) for batch in batches(rank)])
    alone = nfpo.RunningMeanStd(3)
    alone.update(data)
    merged = two_processes[0]["stats"]
    assert merged["count"].item() == pytest.approx(len(data), abs=1e-3)
    torch.testing.assert_close(merged["mean"], alone.mean, rtol=1e-9, atol=0)
    torch.testing.assert_close(merged["var"], alone.var, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged["mean"], data.mean(0), rtol=1e-5, atol=0)
