"""`nox` sets up one virtual environment a backend and passes every test in it."""

import nox

nox.options.default_venv_backend = "venv"


@nox.session(python="3.11")
def gymnasium(session: nox.Session) -> None:
    """nfpo_continuous_action.py and benchmarks/; arguments behind `--` go to pytest."""
    session.install("-r", "requirements.txt", "-r", "requirements/benchmarks.txt", "-r", "requirements/dev.txt")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pytest", "--durations=10", *session.posargs)


@nox.session(python="3.11")
def playground(session: nox.Session) -> None:
    """nfpo_playground_jax.py, beside the PyTorch script that it is compared with."""
    session.install("-r", "requirements.txt", "-r", "requirements/playground.txt", "-r", "requirements/dev.txt")
    session.run("pytest", "--durations=10", "tests/playground", *session.posargs)
