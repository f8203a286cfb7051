"""Promise: `--track` logs every point once to Weights & Biases, and leaves a log of a reasonable size."""

import pytest

from .conftest import SMALL, run

SCAN = """
import sys
from wandb.sdk.internal.datastore import DataStore
from wandb.proto.wandb_internal_pb2 import Record
store, records, points = DataStore(), 0, []
store.open_for_scan(sys.argv[1])
while True:
    data = store.scan_data()
    if data is None:
        break
    record = Record()
    record.ParseFromString(data)
    records += 1
    values = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
    points += [(name, values["global_step"]) for name in values if name.startswith("losses/")]
print([records, points])
"""


def test_offline_run(tmp_path, monkeypatch):
    """Each of the eight losses of ten iterations is recorded once; nothing lies in TensorBoard's folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ended = run(f"--env-id cartpole {SMALL} --total-timesteps 480 --track", cwd=tmp_path)
    assert ended.status == 0, ended
    (run_dir,) = (tmp_path / "runs").iterdir()
    names = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert names == {"", "checkpoint", "env_cfg", "events"}
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (tmp_path / "scan.py").write_text(SCAN)
    ended = run(tmp_path / "scan.py", log, cwd=tmp_path)
    records, points = eval(ended.out)
    assert len(points) == len(set(points)) == 10 * 8 and records < 10 * 80, (records, points)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) < 20 and sum(path.stat().st_size for path in files) < 1_000_000, files
