"""Promise: what `benchmarks/speed_isaacgym.py` prints is the docs' table, and says where nothing was compiled."""

from benchmarks import speed_isaacgym

from .conftest import ROOT


def measured(seconds, is_compiled):
    """Rows of two rounds, the second of them twice as slow."""
    sizes = {"acting_s": 1.0, "compilation_s": 3.0, "peak_memory_mib": 700.0, "parameters": 5}
    return [
        {"contender": name, "learning_s": x * slow, "is_compiled": is_compiled and "compiled" in name, **sizes}
        for slow in (1, 2)
        for name, x in seconds.items()
    ]


SECONDS = {"PPO": 2.0, "NFPO": 3.0, "PPO compiled": 1.0, "NFPO compiled": 1.5}


def test_table():
    """Ratios to PPO in the same mode and to PPO uncompiled, in the columns of the docs."""
    header, _, *rows = speed_isaacgym.table(measured(SECONDS, True)).splitlines()
    assert header in (ROOT / "docs" / "results_cost_and_speed.md").read_text()
    assert rows[1] == "| NFPO | 1.50 | 1.50 | 4.50 | 1.00 | 700 | 3 | 5 |"
    assert rows[3] == "| NFPO compiled | 1.50 | 0.75 | 2.25 | 1.00 | 700 | 3 | 5 |"


def test_table_names_what_fell_back():
    lines = speed_isaacgym.table(measured(SECONDS, False)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "PPO",
        "NFPO",
        "PPO compiled (fell back to eager)",
        "NFPO compiled (fell back to eager)",
    ]
