"""Promise: every script keeps the house's order and budget of lines, so that a reader meets the algorithm first."""

import ast
import re
from itertools import pairwise

import pytest
from conftest import ROOT

# Lines of the whole file, of the flow's first line and of the PPO loss's, at most: lines are the reader's time.
BUDGETS = {
    "nfpo_continuous_action.py": (680, 120, 320),
    "nfpo_isaacgym.py": (750, 140, 360),
    "nfpo_playground_jax.py": (750, 140, 360),
    "rfo_rewarped.py": (650, None, None),
    "nfp_visuomotor.py": (650, None, None),
}
PAGES = {"README.md": 160, "benchmarks/README.md": 250, "benchmarks/report.py": 450}
SCRIPTS = [ROOT / name for name in BUDGETS if (ROOT / name).exists()]
NFPO = [script for script in SCRIPTS if script.name.startswith("nfpo_")]
ORDER = """Args FlowPolicy Critic collect_rollout compute_gae ppo_update train make_envs save_checkpoint load_checkpoint
    evaluate main""".split()
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
each_nfpo = pytest.mark.parametrize("script", NFPO, ids=lambda script: script.stem)


def definitions(script) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.parse(script.read_text()).body if isinstance(node, DEFINITIONS)}


def first_line(script, pattern: str) -> int:
    lines = script.read_text().splitlines()
    return next(i for i, line in enumerate(lines, start=1) if re.search(pattern, line))


def test_every_script_has_a_budget():
    """The three of NFPO are there, and no script that DESIGN.md does not know."""
    assert len(NFPO) == 3 and set(ROOT.glob("*.py")) - set(SCRIPTS) == {ROOT / "noxfile.py"}


@each_script
def test_budget(script):
    """The whole file, the flow and the loss stand where a reader is promised them."""
    whole, flow, loss = BUDGETS[script.name]
    lines = script.read_text().splitlines()
    assert len(lines) <= whole and max(map(len, lines)) <= 120
    if flow:
        assert first_line(script, r"^class FlowPolicy\b") <= flow
        assert first_line(script, r"^ +log_ratio = ") <= loss


@pytest.mark.parametrize("name", PAGES)
def test_page_budget(name):
    """README.md is read in two minutes, and what is measured and how takes not much longer."""
    assert len((ROOT / name).read_text().splitlines()) <= PAGES[name]


@each_nfpo
def test_sections_in_order(script):
    """The sections stand in the house's order, under the house's names, the coupling layer beside the flow."""
    found = definitions(script)
    assert [name for name in ORDER if name not in found] == []
    for earlier, later in pairwise(ORDER):
        assert found[earlier].lineno < found[later].lineno, f"{earlier} stands after {later}"
    assert found["FlowPolicy"].lineno < found["CouplingLayer"].lineno < found["Critic"].lineno


@each_nfpo
def test_names_of_the_flow(script):
    """Its four methods are called as in the paper's page, whatever the backend."""
    methods = {node.name for node in definitions(script)["FlowPolicy"].body if isinstance(node, ast.FunctionDef)}
    inverse_pair = {"forward", "inverse"} if "jax" not in script.name else {"inverse"}
    assert methods >= {"log_prob", "sample", *inverse_pair}
    names = [argument.arg for argument in definitions(script)["compute_gae"].args.args]
    assert names == "rewards values next_values terminated done gamma gae_lambda".split()


@each_script
def test_starts_at_its_last_line_only(script):
    """The last statement starts the program; before it there are imports, constants, functions and classes."""
    body = ast.parse(script.read_text()).body
    assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    main()"
    for node in body[1:-1]:
        parts = [node]
        if isinstance(node, ast.Try):  # an import may fail
            parts = [*node.body, *(part for handler in node.handlers for part in handler.body)]
        if isinstance(node, ast.With) and ast.unparse(node.items[0]) == "contextlib.suppress(ImportError)":
            parts = node.body
        allowed = ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *DEFINITIONS
        assert all(isinstance(part, allowed) for part in parts), f"line {node.lineno}: {ast.unparse(node)[:80]}"


@each_script
def test_imports_no_sibling(script):
    """No script imports another script, a baseline or a test, at the top or inside a function."""
    siblings = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests", "conftest"}
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & siblings, f"line {node.lineno}: {names}"


def helps(script) -> dict[str, str]:
    """The comment behind each field of Args, {name: help}."""
    lines = script.read_text().splitlines()
    found = {}
    for node in definitions(script)["Args"].body:
        if isinstance(node, ast.AnnAssign):
            assert node.value is not None, f"{node.target.id} has no default"
            match = re.search(r"  # (\S.*)$", lines[node.end_lineno - 1])
            assert match and node.lineno == node.end_lineno, f"{node.target.id} has no comment behind it"
            found[node.target.id] = match[1]
    return found


@each_script
def test_arguments_say_what_they_are(script):
    """Every field of Args has a default and a comment behind it, which is its --help."""
    assert len(helps(script)) > 20


def test_help_shows_the_comments(cli):
    """And --help prints them all."""
    ended = cli("--help")
    said = re.sub(r"[│╭╮╰╯─\s]+", "", ended.out)
    assert ended.status == 0
    for name, text in helps(ROOT / "nfpo_continuous_action.py").items():
        assert f"--{name.replace('_', '-')}" in ended.out, name
        assert re.sub(r"\s+", "", text) in said, (name, text)


@each_script
def test_docstrings(script):
    """Module, classes and the house's functions say what they do."""
    module = ast.parse(script.read_text())
    assert ast.get_docstring(module)
    for name, node in definitions(script).items():
        if isinstance(node, ast.ClassDef) and name != "Args" or name in ORDER[1:]:
            assert ast.get_docstring(node), f"{name} has no docstring"


@each_nfpo
def test_command_in_the_docstring(script):
    """The module's docstring names the paper and the command to run."""
    text = ast.get_docstring(ast.parse(script.read_text()))
    assert "NFPO" in text and f"python {script.name}" in text


@pytest.mark.parametrize("name", ["FlowPolicy", "CouplingLayer", "linear"])
def test_one_flow(name):
    """The flow is the same text in both PyTorch scripts: what is faster on one backend serves on both or on none."""
    reference, other = (
        ast.get_source_segment((ROOT / script).read_text(), definitions(ROOT / script)[name])
        for script in ("nfpo_continuous_action.py", "nfpo_isaacgym.py")
    )
    assert other == reference
