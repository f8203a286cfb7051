"""Promise: what README.md and docs/ tell a reader to type works, and what they point to exists."""

import ast
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

import nfpo_continuous_action as nfpo

ROOT = Path(nfpo.__file__).parent
README, REFERENCE = ROOT / "README.md", ROOT / "docs" / "nfpo_continuous_action.md"
SCRIPTS = ["nfpo_continuous_action", "nfpo_playground_jax", "nfpo_isaacgym", "rfo_rewarped"]
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in SCRIPTS)]
BENCHMARKS = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("results_*.md"))]
TWINS = dict(zip(("ppo_continuous_action", "ppo_playground_jax", "ppo_isaacgym", "shac_rewarped"), SCRIPTS))


def blocks(page: Path) -> dict[str, str]:
    """The Python blocks of a page that are marked as tested, by name."""
    return dict(re.findall(r"<!-- test: (.*?) -->\n```python\n(.*?)```", page.read_text(), re.DOTALL))


def commands(page: Path) -> list[list[str]]:
    """Every line of a page that runs a script of this repository, as words: the script and its flags."""
    found = []
    for line in re.findall(r"^    (?!#)(.*\.py\b.*)$", page.read_text(), re.MULTILINE):
        words = shlex.split(line.split(" && ")[-1], comments=True)
        script = next((i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")), None)
        if script is not None:
            found.append(words[script:])
    return found


@functools.cache
def flags(script: str) -> set[str]:
    """The flags of a script, read from its source, since it may need packages that are not here."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (args,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    names = [node.target.id.replace("_", "-") for node in args.body if isinstance(node, ast.AnnAssign)]
    return {f"--{prefix}{name}" for name in names for prefix in ("", "no-")} | {"--help"}


def test_readme_is_short():
    """Two minutes are 160 lines."""
    assert len(README.read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Every flag of every command, and every flag that the text names in passing, is one of a script's."""
    found = commands(page)
    assert len(found) >= 5
    for script, *words in found:
        name = Path(script).stem
        if name in SCRIPTS or name in TWINS:
            unknown = {word for word in words if word.startswith("--")} - flags(TWINS.get(name, name))
            assert not unknown, f"{script} has no {unknown}"
    everyones = {flag for name in SCRIPTS for flag in flags(name)}
    removed = page.read_text().split("### What left")[1].split("\n## ")[0] if page == REFERENCE else ""
    mine = flags(page.stem) if page != README else everyones
    mine |= {"--index-url", "--no-deps", "--node_rank", "--iterations"}  # of pip, torchrun and benchmarks/
    for span in re.findall(r"`([^`\n]+)`", page.read_text().replace(removed, "")):
        if not re.match(r"(--|python nfpo)", span):
            continue
        unknown = set(re.findall(r"(?<=\s)--[a-z][a-z_-]*", f" {span}")) - mine
        assert not unknown, f"no {unknown} in `{span}`"


def test_reference_commands_parse():
    """The reference script accepts every command of its pages, values included."""
    found = [words for page in PAGES[:2] for script, *words in commands(page) if script == "nfpo_continuous_action.py"]
    assert len(found) >= 15
    for words in found:
        if "--help" not in words:
            tyro.cli(nfpo.Args, args=words)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *BENCHMARKS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    """Every link inside the repository leads to a file and, where it names one, to a heading."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert links
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_table_names_functions_that_exist():
    """Every function that "From the paper to the code" points to is in the script, and so is every flag."""
    table = README.read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    cells = " ".join(re.findall(r"\| ([^|]*) \|$", table, re.MULTILINE))
    names = re.findall(r"`(\w[\w.]*)`", cells)
    assert {"compute_gae", "FlowPolicy.sample", "CouplingLayer"} <= set(names)
    for name in names:
        found = nfpo
        for part in name.split("."):
            found = getattr(found, part)
    assert set(re.findall(r"`(--[\w-]+)`", cells)) <= flags("nfpo_continuous_action")


def test_results_are_those_of_the_benchmarks():
    """The ratios of the table "Results" stand in the tables that the committed CSV files give."""
    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|", BENCHMARKS[0].read_text(), re.MULTILINE))
    table = README.read_text().split("## Results")[1].split("\n\n")[1].replace("*", "").splitlines()[2:]
    found = [re.findall(r"\d+\.\d\d", line.split("|")[2]) for line in table]
    both = (
        rows["NFPO beats PPO on Humanoid"],
        next(value for name, value in rows.items() if "performs like PPO" in name),
    )
    numbers = [re.findall(r"(?:v4|deployed) (\d+\.\d\d) x", value) for value in both]
    assert found[:4] == [numbers[0][:1], numbers[1][::2], numbers[0][1:], numbers[1][1::2]]
    wall_clock = next(value for name, value in rows.items() if name.startswith("wall clock against the Gaussian twin"))
    speed = next(value for name, value in rows.items() if name.startswith("speed against CleanRL's PPO on Humanoid"))
    assert wall_clock.startswith(f"{found[4][0]} x") and speed.startswith(f"{found[4][1]} x")


@pytest.mark.parametrize("name", ["own code", "own policy"])
def test_block_runs_as_it_stands(name, tmp_path, monkeypatch):
    """Whoever pastes a block of the README into a file has a program that runs."""
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(README)[name], "README.md", "exec"), {"__name__": "readme"})


def test_environment_of_your_own(tmp_path, monkeypatch):
    """The docs' environment trains and plays by the docs' lines, and the docs explain every metric it logs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page = blocks(REFERENCE)
    Path("my_envs.py").write_text(page["my_envs.py"])
    there = {}
    exec(compile(page["train"], REFERENCE.name, "exec"), there)
    assert len(there["returns"]) == 3
    sys.modules.pop("my_envs")
    metrics = {name for name in there["results"] if "/" in name} | {"charts/episodic_return", "charts/episodic_length"}
    explained = set(re.findall(r"^\| `(\w+/\w+)` \|", REFERENCE.read_text(), re.MULTILINE))
    assert metrics == explained


def test_copied_policy_works():
    """The three definitions that README and docs tell to copy need torch and math, and nothing else of the script."""
    source = Path(nfpo.__file__).read_text()
    parts = {
        node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if hasattr(node, "name")
    }
    copy = {"torch": nfpo.torch, "nn": nfpo.nn, "math": nfpo.math}
    exec("\n".join(parts[name] for name in ("linear", "CouplingLayer", "FlowPolicy")), copy)
    obs = nfpo.torch.randn(5, 3)
    action, log_prob = copy["FlowPolicy"](3, 2).sample(obs)
    assert action.shape == (5, 2) and log_prob.shape == (5,)
