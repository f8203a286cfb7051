"""Promise: every script keeps the house rules of DESIGN.md, so that a diff of two shows only their backends."""

import ast
import re
from itertools import pairwise

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("nfpo_*.py"))
ORDER = [
    ("Args",),
    ("make_env", "make_envs"),
    ("FlowPolicy",),
    ("Critic",),
    ("collect_rollout",),
    ("compute_gae",),
    ("ppo_update",),
    ("save_checkpoint",),
    ("load_checkpoint",),
    ("evaluate",),
    ("train",),
    ("main",),
]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@pytest.fixture(params=SCRIPTS, ids=[script.stem for script in SCRIPTS])
def script(request) -> ast.Module:
    return ast.parse(request.param.read_text())


def definitions(module: ast.Module) -> dict[str, ast.AST]:
    return {node.name: node for node in module.body if isinstance(node, DEFINITIONS)}


def test_there_are_scripts():
    """The rules below have something to rule."""
    assert "nfpo_continuous_action" in [script.stem for script in SCRIPTS]


def test_sections_in_order(script):
    """The sections stand in the house's order, under the house's names."""
    lines = {name: node.lineno for name, node in definitions(script).items()}
    found = []
    for names in ORDER:
        present = [lines[name] for name in names if name in lines]
        assert present, f"none of {names}"
        found.append((min(present), max(present), names))
    for (_, end, earlier), (start, _, later) in pairwise(found):
        assert end < start, f"{earlier} stand after {later}"


def test_last_line(script):
    """The last statement starts the program, and it is the only one that does."""
    assert ast.unparse(script.body[-1]) == "if __name__ == '__main__':\n    main()"


def calls(node: ast.AST) -> list[str]:
    return [ast.unparse(child.func) for child in ast.walk(node) if isinstance(child, ast.Call)]


def test_nothing_runs_at_import(script):
    """At the top level there are only the docstring, imports, constants, functions and classes; an import may fail."""
    for node in script.body[1:-1]:
        if isinstance(node, ast.Try):
            parts = [*node.body, *(part for handler in node.handlers for part in handler.body)]
            assert all(isinstance(part, (ast.Import, ast.Assign)) and not calls(part) for part in parts)
            assert not node.orelse and not node.finalbody
            continue
        assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, *DEFINITIONS)), (
            f"line {node.lineno}: {ast.unparse(node)[:80]}"
        )
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            assert not calls(node), f"line {node.lineno} calls {calls(node)}"


def test_imports_no_sibling(script):
    """No script imports another script, a baseline or a test, at the top or inside a function."""
    siblings = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests", "conftest"}
    for node in ast.walk(script):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & siblings, f"line {node.lineno}: {names}"


def test_args_are_documented(script):
    """Every field of Args has a default and a docstring under it, which is its --help."""
    body = definitions(script)["Args"].body
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 20
    for i in fields:
        name = body[i].target.id
        assert body[i].value is not None, f"{name} has no default"
        after = body[i + 1] if i + 1 < len(body) else None
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        assert isinstance(text, str) and text.strip(), f"{name} has no docstring"


def test_docstrings(script):
    """Module, classes and the house's functions say what they do."""
    assert ast.get_docstring(script)
    house = {name for names in ORDER for name in names} - {"Args"}
    for name, node in definitions(script).items():
        if isinstance(node, ast.ClassDef) and name != "Args" or name in house:
            assert ast.get_docstring(node), f"{name} has no docstring"


def test_command_in_the_docstring(script):
    """The module's docstring names the paper and the command to run."""
    text = ast.get_docstring(script)
    assert "NFPO" in text and re.search(r"python nfpo_\w+\.py", text)
