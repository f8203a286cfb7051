"""The README's promises that can be run."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(
    r"<!-- test: (.*?) -->\n```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
)


def test_both_blocks_are_found():
    """The README shows how to use the policy elsewhere, and another policy here."""
    assert [name for name, _ in BLOCKS] == ["own code", "own policy"]


@pytest.mark.parametrize("code", [code for _, code in BLOCKS], ids=[name for name, _ in BLOCKS])
def test_block_runs_as_it_stands(code, tmp_path, monkeypatch):
    """Whoever pastes a block of the README into a file has a program that runs."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_table_names_functions_that_exist():
    """Every function that "Reading the code" points to is in the script."""
    import nfpo_continuous_action as script

    table = (Path(__file__).parents[1] / "README.md").read_text().split("## Reading the code")[1].split("\n\n")[1]
    names = {
        name
        for cell in re.findall(r"\| ([^|]*) \|$", table, re.MULTILINE)
        for name in re.findall(r"`(\w[\w.]*)`", cell)
    }
    assert {"compute_gae", "FlowPolicy.sample"} <= names
    for name in names:
        found = script
        for part in name.split("."):
            found = getattr(found, part)
