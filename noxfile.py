"""`nox` sets up one virtual environment a backend and passes every test in it."""

import shutil
import subprocess
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False  # the session is skipped, and says so
# A worker a core, a file a worker at a time: a file's tests share what they trained.
PYTEST = ("pytest", "--durations=10", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
QUICK = "--no-compile"  # Python compiles what is imported, and pip all that is there, on one core
IN_ORDER = "--no-loadscope-reorder"  # or the files with the fewest tests come last, which are the longest


def working_python(version: str) -> str:
    """An interpreter that starts: pyenv puts a `python3.8` on the path even where it will not start one."""
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, pyenv)):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return candidate
    return f"{version} (none that starts)"


@nox.session(python="3.11")
def gymnasium(session: nox.Session) -> None:
    """nfpo_continuous_action.py and benchmarks/; arguments behind `--` go to pytest."""
    session.install(QUICK, "-r", "requirements.txt", "-r", "requirements/envpool.txt")
    session.install(QUICK, "-r", "requirements/benchmarks.txt", "-r", "requirements/dev.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run(*PYTEST, IN_ORDER, *session.posargs)


@nox.session(python="3.11")
def playground(session: nox.Session) -> None:
    """nfpo_playground_jax.py, beside the PyTorch script that it is compared with."""
    session.install(QUICK, "-r", "requirements.txt", "-r", "requirements/playground.txt", "-r", "requirements/dev.txt")
    session.run(*PYTEST, IN_ORDER, "tests/playground", *session.posargs)


@nox.session(python=working_python("3.8"))
def isaacgym(session: nox.Session) -> None:
    """nfpo_isaacgym.py over a stand-in for the simulator, on the Python that Isaac Gym needs."""
    session.install(QUICK, "-r", "requirements/isaacgym.txt", "pytest==8.3.5", "pytest-xdist==3.6.1")
    # tests/conftest.py is the PyTorch 2.13 script's.
    session.run(*PYTEST, "--confcutdir=tests/isaac", "tests/isaac", *session.posargs)


@nox.session(python="3.11")
def rewarped(session: nox.Session) -> None:
    """rfo_rewarped.py over Rewarped on the CPU, whose old dependencies fit no other session."""
    session.install(QUICK, "-r", "requirements/rewarped.txt", "pytest==9.2.0", "pytest-xdist==3.8.0")
    session.run(*PYTEST, "--confcutdir=tests/rfo", "tests/rfo", *session.posargs)
