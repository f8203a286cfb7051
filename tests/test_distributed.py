"""Promise: torchrun trains one policy on the data of all processes, and one that is killed resumes like any other."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, differences, finish, run_folders, scalars, start, wait_for

import nfpo_continuous_action as nfpo

DRIVER = ROOT / "tests" / "distributed_driver.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
RUN = "--env-id Hopper-v4 --no-compile --num-envs 2 --num-steps 64 --num-minibatches 4 --update-epochs 1".split()
RUN += "--total-timesteps 3072 --checkpoint-interval 2".split()  # 12 iterations of 2 processes * 2 environments * 64


def launch(*flags, cwd: Path):
    return start(*flags, cwd=cwd, script=DRIVER, launcher=TORCHRUN, WEIGHTS=str(cwd))


def family(pid: int) -> list[int]:
    """A process and all that descend from it, in whatever session."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid] + [member for child in children for member in family(int(child))]


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory) -> Path:
    """Folder of a run of two processes that nobody killed."""
    folder = tmp_path_factory.mktemp("never_killed")
    ended = finish(launch(*RUN, cwd=folder))
    assert ended.status == 0, ended.err
    return folder


def test_every_rank_ends_with_the_same_weights(never_killed):
    """Networks and normalizer statistics are bit-identical on all ranks, and were really trained."""
    first, second = (torch.load(never_killed / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 2 and differences(first, second) == []
    checkpoint = nfpo.load_checkpoint(run_folders(never_killed)[0])
    assert differences(first[0], dict(checkpoint["policy"])) == []
    assert len(checkpoint["processes"]) == 2
    mine, other = (process["collector"] for process in checkpoint["processes"])
    for name in ("obs_stats", "reward_stats"):
        assert differences(mine[name], other[name]) == [], name
    assert mine["obs_stats"]["count"].item() == pytest.approx(3072 + 4, abs=1e-3)  # every step and every first reset
    assert mine["reward_stats"]["count"].item() == pytest.approx(3072, abs=1e-3)


def test_ranks_have_data_of_their_own(never_killed):
    """Each rank's environments and noise are its own: two copies of one rollout would be no second process."""
    processes = nfpo.load_checkpoint(run_folders(never_killed)[0])["processes"]
    assert not torch.equal(processes[0]["collector"]["obs"], processes[1]["collector"]["obs"])
    assert not torch.equal(processes[0]["random"]["torch"], processes[1]["random"]["torch"])


def test_rank_0_logs(never_killed):
    """There is one run folder with one event file; steps count over all processes, and so do the episodes."""
    (run_dir,) = run_folders(never_killed)
    assert len(list(run_dir.glob("events*"))) == 1
    points = scalars(run_dir)
    assert [step for step, _ in points["losses/value_loss"]] == [256 * i for i in range(1, 13)]
    played = sum(length for _, length in points["charts/episodic_length"])
    assert 3072 * 0.8 < played <= 3072  # the rest is in episodes that had not ended
    assert json.loads((run_dir / "args.json").read_text())["num_envs"] == 2


def test_stopped_and_killed_and_resumed(never_killed, tmp_path):
    """Two processes stopped by SIGTERM, resumed, killed with -9 and resumed end like two never killed."""
    process = launch(*RUN, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")), process)
    os.kill(process.pid, signal.SIGTERM)  # which torchrun hands on
    assert finish(process).status != 0
    (run_dir,) = run_folders(tmp_path)
    stopped = nfpo.load_checkpoint(run_dir)["global_step"]
    assert stopped == max(step for step, _ in scalars(run_dir)["losses/value_loss"]) < 3072

    written = (run_dir / "checkpoint.pt").stat().st_mtime_ns
    process = launch("--resume", run_dir, cwd=tmp_path)
    wait_for(lambda: (run_dir / "checkpoint.pt").stat().st_mtime_ns != written, process)
    time.sleep(0.1)
    for member in family(process.pid):
        os.kill(member, signal.SIGKILL)
    assert finish(process).status == -signal.SIGKILL

    ended = finish(launch("--resume", run_dir, cwd=tmp_path))
    assert ended.status == 0, ended.err
    assert run_folders(tmp_path) == [run_dir]
    ours, theirs = (nfpo.load_checkpoint(run_folders(folder)[0]) for folder in (tmp_path, never_killed))
    for checkpoint in (ours, theirs):
        del checkpoint["args"], checkpoint["event_files"]
    assert differences(ours, theirs) == []
    theirs = scalars(run_folders(never_killed)[0])
    for name in theirs.keys() - {"charts/SPS"}:
        assert scalars(run_dir)[name] == theirs[name], name


def test_one_process_does_not_continue_two(never_killed, monkeypatch, capsys):
    """Resuming with another number of processes is bad input."""
    monkeypatch.setattr("sys.argv", ["nfpo", "--resume", str(run_folders(never_killed)[0])])
    with pytest.raises(SystemExit) as ended:
        nfpo.main(type("WatchedPolicy", (nfpo.FlowPolicy,), {}))
    assert ended.value.code == 2 and "2 processes" in capsys.readouterr().err


def batches(rank: int) -> list[np.ndarray]:
    """What each process sees: different data, differently much of it, far from zero."""
    rng = np.random.default_rng(rank)
    return [1000 + 10 * rank + rng.standard_normal((20 + 10 * rank, 3)) * [1, 5, 0.1] for _ in range(4)]


def gradient(rows: slice) -> torch.Tensor:
    """The gradient of the loss over some rows of a fixed batch of 64."""
    torch.manual_seed(0)
    policy, critic = nfpo.FlowPolicy(5, 3), nfpo.Critic(5)
    obs, actions, rest = torch.randn(64, 5), torch.randn(64, 3), torch.randn(4, 64)
    rest[0] = policy.log_prob(obs, actions).detach() + 0.3 * rest[0]
    minibatch = obs[rows], actions[rows], *rest[:, rows]
    return nfpo.minibatch_gradient(policy, critic, nfpo.Args(norm_adv=False), *minibatch)[0]


def one_of_two(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stats, scalar_stats = nfpo.RunningMeanStd((3,)), nfpo.RunningMeanStd()
    for batch in batches(rank):  # merged after every batch: what is merged already must not count twice
        before = stats.state_dict(), scalar_stats.state_dict()
        stats.update(batch)
        scalar_stats.update(batch[:, 0])
        stats.merge_processes(before[0])
        scalar_stats.merge_processes(before[1])
    averaged = nfpo.average_processes(gradient(slice(32 * rank, 32 * rank + 32)))
    result = {"stats": stats.state_dict(), "scalar": scalar_stats.state_dict(), "gradient": averaged}
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


def test_gradient_is_that_of_the_pooled_batch(two_processes):
    """The averaged gradient of two half batches is the gradient of the whole batch, on both ranks."""
    expected = gradient(slice(0, 64))
    for result in two_processes:
        torch.testing.assert_close(result["gradient"], expected, atol=1e-6, rtol=1e-5)
    assert (gradient(slice(0, 32)) - expected).abs().max() > 1e-3


def test_statistics_are_those_of_the_pooled_data(two_processes):
    """Merged statistics are mean and variance over what all processes saw, and the same on both."""
    data = np.concatenate([batch for rank in range(2) for batch in batches(rank)])
    for name, values in (("stats", data), ("scalar", data[:, 0])):
        assert differences(two_processes[0][name], two_processes[1][name]) == []
        merged = nfpo.RunningMeanStd(values.shape[1:])
        merged.load_state_dict(two_processes[0][name])
        assert merged.count == pytest.approx(len(values), abs=1e-3)
        alone = nfpo.RunningMeanStd(values.shape[1:])  # the weak first sample is in both
        alone.update(values)
        np.testing.assert_allclose(merged.mean, alone.mean, rtol=1e-9)
        np.testing.assert_allclose(merged.std, alone.std, rtol=1e-6)
        np.testing.assert_allclose(merged.mean, values.mean(0), rtol=1e-5)
