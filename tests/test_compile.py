"""Promise: compiled or eager, the results are the same, and where there is no compiler it says so and runs eagerly."""

import pytest
import torch
from conftest import SMALL, run, run_folders, scalars

import nfpo_continuous_action as nfpo


@pytest.fixture(scope="module")
def eager_run(train_small):
    return train_small("Hopper-v4", num_flow_layers=2)


def test_compiled_equals_eager(eager_run, train_small):
    """Two iterations give the same losses and weights whichever way they run."""
    compiled_run = train_small("Hopper-v4", num_flow_layers=2, compile=True)
    eager, compiled = nfpo.load_checkpoint(eager_run), nfpo.load_checkpoint(compiled_run)
    for network in ("policy", "critic"):
        for name, weight in eager[network].items():
            torch.testing.assert_close(compiled[network][name], weight, atol=1e-4, rtol=0, msg=name)
    ours, theirs = scalars(compiled_run), scalars(eager_run)
    assert len(ours["charts/episodic_return"]) == len(theirs["charts/episodic_return"])
    for name in theirs.keys() - {"charts/SPS"}:
        for (step, value), (other_step, other) in zip(ours[name], theirs[name]):
            assert step == other_step and value == pytest.approx(other, abs=1e-4, rel=1e-4), name


def test_no_compiler(eager_run, tmp_path):
    """Without a compiler one line says so, and the run equals an eager one bit for bit."""
    flags = [flag for flag in SMALL if flag != "--no-compile"]
    variables = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ended = run(*flags, "--env-id", "Hopper-v4", "--num-flow-layers", 2, cwd=tmp_path, **variables)
    assert ended.status == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "compiler does not work here" in line]
    assert len(lines) == 1 and "eager" in lines[0]
    ours, eager = nfpo.load_checkpoint(run_folders(tmp_path)[0]), nfpo.load_checkpoint(eager_run)
    for name, weight in eager["policy"].items():
        assert torch.equal(ours["policy"][name], weight), name
