"""Promise: the grid skips what is finished, goes on where it was interrupted and survives a run that fails; the
report's numbers are those that can be computed by hand."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Ended, make_agent, wait_for

sys.path.insert(0, str(ROOT))

pytest.importorskip("submitit", reason="pip install -r requirements/benchmarks.txt")
pytest.importorskip("rliable", reason="pip install -r requirements/benchmarks.txt")

import tiny_grid  # noqa: E402
from rliable import metrics  # noqa: E402
from scipy.stats import trim_mean  # noqa: E402

import benchmarks.report as report  # noqa: E402
import benchmarks.run as runner  # noqa: E402
import benchmarks.speed as speed  # noqa: E402

GRID = [sys.executable, str(ROOT / "tests" / "tiny_grid.py")]


def start_grid(folder, *flags) -> subprocess.Popen:
    """The tiny grid's runner in a process group of its own, ignoring SIGINT as whatever `nohup ... &` starts."""
    flags = ["--runs-dir", folder / "runs", "--results", folder / "results", *flags]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*GRID, *map(str, flags)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> Ended:
    out, err = process.communicate(timeout=900)
    return Ended(process.returncode, out, err)


def lets_go(lock, timeout: float = 30) -> bool:
    """Whether nobody holds the lock any more; a process that was killed may take a moment to be gone."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
    return False


def run_folder(folder, variant: str, edition: int = 1) -> Path:
    """The script's own folder of a run of the tiny grid."""
    steps = {1: "512", 2: "6400__v2"}[edition]
    return runner.newest(folder / "runs" / f"Hopper-v4__{variant}__1__{steps}")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """The tiny grid, run once; its folder and how the runner ended."""
    folder = tmp_path_factory.mktemp("grid")
    return folder, end(start_grid(folder, "--experiments", "S1", "2"))


def test_grid_survives_a_failed_run(grid):
    """A run with a bad flag is reported with its last lines; the others finish, and broken numbers are a result."""
    folder, ended = grid
    assert ended.status == 1, ended.err
    assert re.search(r"Hopper-v4 bad seed 1 \(512 steps\): FAILED\n(    .*\n)*    .*gamma", ended.out), ended.out
    assert "Hopper-v4 NFPO seed 1 (512 steps): finished" in ended.out
    assert "Hopper-v4 PPO seed 1 (512 steps): finished" in ended.out
    assert "Hopper-v4 scale-none seed 1 (512 steps): stopped: its numbers broke" in ended.out
    assert "3 of 4 finished, 1 failed" in ended.out
    assert not (folder / "results").exists()  # the first edition's table is the report's


@pytest.fixture
def show(monkeypatch, capsys):
    """What the tiny grid would run of Figures S1 and 2: the lines that it prints."""
    monkeypatch.setattr(runner, "VARIANTS", tiny_grid.VARIANTS)
    monkeypatch.setattr(runner, "GRID", tiny_grid.GRID)

    def show(folder, *flags) -> list[str]:
        places = ["--runs-dir", folder / "runs", "--results", folder / "results", "--experiments", "S1", "2"]
        monkeypatch.setattr(sys, "argv", ["run.py", "--show", *map(str, places), *flags])
        capsys.readouterr()
        runner.main()
        return capsys.readouterr().out.splitlines()

    return show


def test_grid_skips_what_is_finished(grid, show):
    """The second time only the failed run is missing, and --show runs nothing."""
    folder, _ = grid
    before = sorted((folder / "runs").rglob("*"))
    lines = show(folder)
    assert lines[0] == "4 runs wanted, 3 finished before, 1 missing"
    assert len(lines) == 2 and lines[1].startswith("python nfpo_continuous_action.py ") and "--gamma 2" in lines[1]
    assert "--env-id Hopper-v4 --seed 1 --total-timesteps 512" in lines[1]
    assert sorted((folder / "runs").rglob("*")) == before


def test_grid_skips_what_is_recorded(tmp_path, show):
    """A fresh clone has no runs, but the committed tables, one per edition; --repeat ignores them."""
    (tmp_path / "results").mkdir()
    row = {"env_id": "Hopper-v4", "variant": "NFPO", "seed": 1, "total_timesteps": 512}
    pd.DataFrame([row]).to_csv(tmp_path / "results" / "runs_v2.csv", index=False)
    assert show(tmp_path)[0] == "4 runs wanted, 0 finished before, 4 missing"
    pd.DataFrame([row]).to_csv(tmp_path / "results" / "runs.csv", index=False)
    assert show(tmp_path)[0] == "4 runs wanted, 1 finished before, 3 missing"
    assert show(tmp_path, "--repeat")[0] == "4 runs wanted, 0 finished before, 4 missing"


def test_grid_goes_on(tmp_path):
    """Runner and workers die in the middle of a run, then the runner alone; the same command continues that run in its
    folder to its end, and adds it to its edition's files."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start_grid(tmp_path, "--experiments", "long")
        events = len(list((tmp_path / "runs").rglob("events.*")))
        wait_for(lambda n=events: len(list((tmp_path / "runs").rglob("events.*"))) > n, process)
        wait_for(lambda: run_folder(tmp_path, "NFPO", 2).joinpath("checkpoint.pt").exists(), process)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)  # the machine went down
        else:
            process.send_signal(number)  # the runner alone: it has to take its workers with it
        interrupted = end(process)
        folder = run_folder(tmp_path, "NFPO", 2)
        assert not (folder.parent / "run.json").exists(), "the run was over before it was interrupted"
        with (folder.parent / ".lock").open() as lock:
            assert lets_go(lock), "a worker has survived its runner"
    assert "Interrupted with 0 of 1 finished; the same command goes on." in interrupted.err
    ended = end(start_grid(tmp_path, "--experiments", "long"))
    assert ended.status == 0, ended.out + ended.err
    assert "1 of 1 finished, 0 failed" in ended.out
    assert list(folder.parent.glob("*__*/")) == [folder] and (folder.parent / "run.json").exists()
    assert len(list(folder.glob("events.*"))) == 3  # the first parts' events are still there
    (row,) = pd.read_csv(tmp_path / "results" / "runs_v2.csv").itertuples()
    assert (row.env_id, row.variant, row.seed, row.total_timesteps) == ("Hopper-v4", "NFPO", 1, 6400)
    assert (row.status, row.steps) == ("finished", 6400) and row.evaluation > 0
    curves = pd.read_csv(tmp_path / "results" / "curves_v2" / "Hopper-v4.csv")
    assert curves.step.tolist() == [128 * i for i in range(1, 51)] and curves.approx_kl.notna().all()


def test_one_process_a_run(tmp_path, monkeypatch, capsys):
    """Whoever finds another process at a run waits for it, but not for ever, and leaves the run alone."""
    monkeypatch.setattr(runner.Job, "patience", 1)
    run = runner.Run("Hopper-v4", "NFPO", 1, 512)
    run.folder(tmp_path).mkdir()
    with (run.folder(tmp_path) / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert runner.Job(run, tmp_path)() == runner.BUSY
        # The runner counts it as neither finished nor failed, and does not end with success.
        args = runner.RunArgs(runs_dir=tmp_path, cluster="debug")  # submitit's executor without a process of its own
        assert runner.launch([run], args) == 1
    out = capsys.readouterr().out
    assert f"{run}: left alone: another process is at it" in out
    assert "0 of 1 finished, 0 failed, 1 left to another process." in out
    assert [path.name for path in run.folder(tmp_path).iterdir()] == [".lock"]


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes this process one that a `Job` may change as it does its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(os, "sched_getaffinity", os.sched_getaffinity)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_finished_while_waiting(tmp_path, monkeypatch, worker):
    """Whoever waited for another process and finds the run finished leaves it as it is."""
    run = runner.Run("Hopper-v4", "NFPO", 1, 512)
    run.folder(tmp_path).mkdir()
    (run.folder(tmp_path) / "run.json").write_text("{}")
    monkeypatch.setattr(runner.runpy, "run_path", lambda *_, **__: pytest.fail("trained again"))
    assert runner.Job(run, tmp_path)() == 0
    assert (run.folder(tmp_path) / "run.json").read_text() == "{}"


def test_sessions_of_one_run(tmp_path, monkeypatch, worker):
    """A run that died before its first checkpoint starts again, later it resumes; it names the commits of all its
    sessions. One that breaks needs no checkpoint to be a result."""
    run, commands = runner.Run("Hopper-v4", "NFPO", 1, 512), []

    def session(number: int, checkpoint: bool, status: int) -> str:
        def script(*_, **__):
            commands.append(" ".join(sys.argv))
            begun = run.folder(tmp_path) / f"Hopper-v4__NFPO__1__{number}"
            begun.mkdir(exist_ok=True)
            if checkpoint:
                (begun / "checkpoint.pt").touch()
            raise SystemExit(status)

        monkeypatch.setattr(runner, "provenance", lambda: {"commit": f"c{number}"})
        monkeypatch.setattr(runner.runpy, "run_path", script)
        assert runner.Job(run, tmp_path)() == status
        return commands[-1]

    assert "--resume" not in session(9, False, 137)
    assert "--resume" not in session(10, True, 137)
    resumed = session(10, True, 3)
    assert resumed.endswith(f"--resume {run.folder(tmp_path)}/Hopper-v4__NFPO__1__10")
    record = json.loads((run.folder(tmp_path) / "run.json").read_text())
    assert record == {"run": list(run), "status": 3, "commit": "c9+c10"}
    assert len(commands) == 3 and runner.Job(run, tmp_path)() == 0  # and it is over


def test_time_limit_is_not_an_end(tmp_path, monkeypatch, worker):
    """At a cluster's time limit submitit asks for another turn and leaves by SystemExit(-1): that is no exit status of
    the script, and must not end up as the run's result. The turn is the same job."""

    def meets_time_limit(*_, **__):
        raise SystemExit(-1)

    monkeypatch.setattr(runner.runpy, "run_path", meets_time_limit)
    job = runner.Job(runner.Run("Hopper-v4", "NFPO", 1, 512), tmp_path)
    with pytest.raises(SystemExit):
        job()
    assert not job.run.is_finished(tmp_path)
    assert job.checkpoint().function is job


def test_selection(monkeypatch, capsys):
    """Seed by seed, each run once, only what is wanted; an unknown name is one line."""
    grid = [
        runner.Experiment("a", ("X", "Y"), ("u", "v"), 2, 10),
        runner.Experiment("b", ("X",), ("u",), 3, 10),
    ]
    runs = runner.select(runner.RunArgs(), grid)
    assert len(runs) == len(set(runs)) == 9
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4 + [3]
    wanted = runner.RunArgs(experiments=("a",), env_ids=("Y",), variants=("v",), seeds=(2,))
    assert runner.select(wanted, grid) == [runner.Run("Y", "v", 2, 10)]
    with pytest.raises(SystemExit, match="error: --variants has w, allowed are u, v"):
        runner.select(runner.RunArgs(variants=("w",)), grid)


def test_variants_are_valid_commands(monkeypatch):
    """Every flag in the grid is one that the script takes, and the twins too; every experiment's variants exist."""
    import tyro

    from benchmarks.baselines.ppo_continuous_action import refuse_flow_flags
    from nfpo_continuous_action import Args

    for edition, variants in runner.VARIANTS.items():
        for command in variants.values():
            script, *flags = command.split()
            assert (ROOT / script).is_file()
            args = tyro.cli(Args, args=flags)
            if edition == 1:
                assert args.base_std == 1 and (args.num_envs, args.num_steps) in ((1, 2048), (64, 64))
            if script != runner.NFPO:
                monkeypatch.setattr(sys, "argv", [script, *flags])
                refuse_flow_flags()
            elif edition == 1:
                assert args.learned_base_std == ("--learned-base-std" in flags)
    for experiment in runner.GRID:
        assert set(experiment.variants) <= set(runner.VARIANTS[experiment.edition]), experiment.name
    shown = {variant for _, _, variants in report.ROWS for variant in variants}
    assert shown <= {variant for e in runner.GRID for variant in e.variants if e.total_timesteps == 500_000}


@pytest.mark.parametrize("flag", ["--scale-bound=0.3", "--scale_fn", "--no-learned-base-std", "--num-flow-layers"])
def test_twins_refuse_flow_flags(flag, monkeypatch, capsys):
    """A flag that a twin would ignore is one line; the value of another flag is not taken for one."""
    from benchmarks.baselines.ppo_continuous_action import refuse_flow_flags

    monkeypatch.setattr(sys, "argv", ["ppo.py", "--exp-name", "scale-bound", flag, "2"])
    with pytest.raises(SystemExit, match="2"):
        refuse_flow_flags()
    name = flag.split("=")[0].replace("_", "-").replace("--no-", "--")
    assert capsys.readouterr().err == f"error: {name}: only the flow has this, ppo.py does not\n"
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--exp-name", "scale-bound", "--hidden-dim", "32"])
    refuse_flow_flags()


def test_second_edition():
    """S1b: five tasks on EnvPool, ten seeds on Humanoid, the mixture on two tasks; boxes: two Humanoids; tuning: two
    seeds that nothing else uses. No run of it is one of the first's."""
    runs = runner.select(runner.RunArgs(experiments=("S1b", "boxes")))
    assert len(runs) == 5 * (10 + 4 * 5) + 10 + 5 + 2 * 3 and {run.total_timesteps for run in runs} == {1_000_000}
    assert sum(run.env_id == "Humanoid-v4" and "--envpool" in run.command() for run in runs) == 60
    tuning = runner.select(runner.RunArgs(experiments=("tuning",)))
    assert len(tuning) == len(set(tuning)) == 3 * 6 * 5 * 2 and {run.seed for run in tuning} == {101, 102}
    assert len({" ".join(run.command()) for run in tuning}) == len(tuning)
    assert max(run.seed for run in runs) < 101
    assert not set(runs) & set(runner.select(runner.RunArgs(experiments=("S1",))))
    assert {run.edition for run in runs} == {2}
    names = {run.folder(Path()) for run in runner.select(runner.RunArgs())}
    assert len(names) == len(runner.select(runner.RunArgs()))


def test_raw_box():
    """The raw Humanoid is given what the policy samples, clipped to ±0.4; the other one 0.4 times that."""
    import torch

    from nfpo_continuous_action import Args, make_envs

    for env_id, factor in zip(runner.BOXES, (0.4, 1.0)):
        envs = make_envs(Args(env_id=env_id), 1, seed=1)
        agent = make_agent(envs.obs.shape[1], len(envs.low), low=envs.low[0], high=envs.high[0])
        with torch.no_grad():
            _, action, _, boxed = agent.act(envs.obs)
        envs.step(boxed)
        expected = (factor * action[0].numpy()).clip(-0.4, 0.4)
        assert envs.envs.envs[0].unwrapped.data.ctrl == pytest.approx(expected, abs=1e-6)
        assert envs.envs.envs[0].spec.max_episode_steps == 1000


# ----------------------------------------------------------------------------------------------------------------------
# Speed
# ----------------------------------------------------------------------------------------------------------------------


def test_rate_without_startup(tmp_path):
    """From the first iteration to the last; start-up ends before the first one's steps."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for iteration in (1, 2, 3):
            writer.add_scalar("losses/value_loss", 0.0, 100 * iteration, walltime=1000 + 10 + 2 * iteration)
    rate, startup = speed.without_startup(tmp_path, start=1000)
    assert rate == pytest.approx(50) and startup == pytest.approx(10)


def test_speed_ratios():
    """Within a round, and the median of these; a contender that did not run leaves its column empty."""
    pairs = {"nfpo": [(10, 400), (20, 800), (40, 200)], "cleanrl": [(50, 200), (30, 100), (80, 50)]}
    rounds = {name: [speed.Measured(s, r, 5.0) for s, r in numbers] for name, numbers in pairs.items()}
    rows = speed.summarize(rounds)
    assert rows["nfpo"] == {
        "seconds": "20.0",
        "rate": "400",
        "startup": "5.0",
        "whole_vs_cleanrl": "2.00",
        "rate_vs_cleanrl": "4.00",
        "whole_vs_ppo": "",
        "rate_vs_ppo": "",
    }
    assert rows["cleanrl"]["whole_vs_cleanrl"] == rows["cleanrl"]["rate_vs_cleanrl"] == "1.00"


def test_speed_program(tmp_path, monkeypatch, capsys):
    """A short run of everybody first, then the rounds in turn, on the same cores and steps; other environments' rows
    stay in the file. One real run gives its three numbers."""
    ran = []

    def measure(name, env_id, steps, args):
        ran.append((name, steps))
        return speed.Measured(10, 100, 2)

    real = speed.measure
    monkeypatch.setattr(speed, "measure", measure)
    path = tmp_path / "speed.csv"
    for env_id in ("A", "B", "A"):
        flags = ["--env-ids", env_id, "--rounds", "2", "--contenders", "nfpo", "ppo", "cleanrl", "--csv", str(path)]
        monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
        speed.main()
    assert ran[:6] == [(name, steps) for steps in (4096, 200_704, 200_704) for name in ("nfpo", "ppo")]
    rows = pd.read_csv(path)
    assert rows.env_id.tolist() == ["B", "B", "A", "A"] and rows.whole_vs_ppo.tolist() == [1.0] * 4
    assert "| A | 200704 | 2 | nfpo | 1 | 10.0 | 100 | 2.0 |" in capsys.readouterr().out
    monkeypatch.setitem(speed.CONTENDERS, "small", (tiny_grid.VARIANTS[1]["PPO"], 1))
    measured = real("small", "Hopper-v4", 256, speed.SpeedArgs())
    assert 0 < measured.startup < measured.seconds and measured.rate > 0


# ----------------------------------------------------------------------------------------------------------------------
# The report
# ----------------------------------------------------------------------------------------------------------------------

PAGES = [ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # as report.py has them
FIRST_EDITION, DOCS = ROOT / "docs" / "results_first_edition.md", ROOT / "docs" / "nfpo_continuous_action.md"
TASKS = tuple("ABCDE")


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """As many as hand-computed intervals need."""
    monkeypatch.setattr(report, "RESAMPLES", 30)


def results_of(scores: dict, **columns) -> report.Results:
    """Results with these training scores: {variant: {task: one score a seed, None where the run broke, NaN where it is
    missing}}. Deployed scores are the same; `columns` replaces a column or adds one."""
    rows = [
        (task, variant, seed, "broke" if score is None else None if np.isnan(score) else "finished", score)
        for variant, by_task in scores.items()
        for task, values in by_task.items()
        for seed, score in enumerate(values, 1)
    ]
    runs = pd.DataFrame(rows, columns=["env_id", "variant", "seed", "status", report.TRAINING])
    runs = runs.assign(**{report.DEPLOYED: runs[report.TRAINING], report.LOG_DET: np.nan} | columns)
    return report.Results(runs.astype({report.TRAINING: float, report.DEPLOYED: float}))


@pytest.fixture
def write_report(tmp_path, monkeypatch, capsys):
    """Runs the report on copies of the pages and returns their texts. The tables are emptied first, so that one that
    is not written again does not pass for one that is."""
    copies = [tmp_path / page.relative_to(ROOT) for page in PAGES]
    for page, copy in zip(PAGES, copies):
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(re.sub(r"(<!-- report: .*? -->\n).*?(<!-- end)", r"\1\2", page.read_text(), flags=re.DOTALL))

    def write_report(**places) -> dict[Path, str]:
        flags = [f"--{name.replace('_', '-')}={tmp_path / place}" for name, place in places.items()]
        monkeypatch.setattr(sys, "argv", ["report.py", *flags, "--pages", *map(str, copies)])
        report.main()
        return {page: copy.read_text() for page, copy in zip(PAGES, copies)}

    return write_report


def test_report_of_the_tiny_grid(grid, tmp_path, monkeypatch, write_report):
    """What ended is in the CSV files with the numbers of its events, what failed is not, and taking it in a second time
    changes nothing. The pages have its tables."""
    from conftest import scalars

    monkeypatch.setattr(runner, "GRID", tiny_grid.GRID)
    monkeypatch.setattr(report, "MUJOCO", ("Hopper-v4",))
    monkeypatch.setattr(report, "ABLATION", ("Hopper-v4",))
    places = {"runs_dir": grid[0] / "runs", "results": "results", "figures": "benchmarks/figures"}
    pages = write_report(**places)
    before = (tmp_path / "results" / "runs.csv").read_bytes()
    write_report(**places)
    assert (tmp_path / "results" / "runs.csv").read_bytes() == before

    runs = pd.read_csv(tmp_path / "results" / "runs.csv").set_index("variant")
    assert set(runs.index) == {"NFPO", "PPO", "scale-none"}
    assert list(runs.status[["NFPO", "PPO", "scale-none"]]) == ["finished", "finished", "broke"]
    assert runs.steps["NFPO"] == 512 and runs.steps["scale-none"] < 512
    points = scalars(run_folder(grid[0], "NFPO"))
    returns = [value for _, value in points["charts/episodic_return"]]
    assert returns
    assert runs.last_100_episodes["NFPO"] == pytest.approx(np.mean(returns[-100:]), rel=1e-3)
    assert runs.evaluation["NFPO"] > 0 and runs.torch["NFPO"].startswith("2.")
    curves = pd.read_csv(tmp_path / "results" / "curves" / "Hopper-v4.csv")
    mine = curves[curves.variant == "NFPO"].set_index("step")
    for step, value in points["losses/approx_kl"]:
        edge = int(np.ceil(step / 10.24) * 10.24)  # 50 bins of 512 steps: an iteration each has a bin of its own
        assert mine.approx_kl[edge] == pytest.approx(value, rel=1e-3)
    results = report.Results.load(tmp_path / "results", "S1")
    assert results.scores("Hopper-v4", "NFPO", report.LOG_DET).tolist() == [mine.log_det.dropna().iloc[-1]]

    assert "| NFPO beats PPO on Humanoid | NFPO against PPO: runs are missing | open |" in pages[PAGES[0]]
    for text in (pages[FIRST_EDITION], pages[DOCS]):
        assert f"| NFPO | {runs.last_100_episodes['NFPO']:.0f} (1) |" in text
        assert f"| NFPO | {runs.evaluation['NFPO']:.0f} (1) |" in text
    assert "| scale-none | -, 1 broke |" in pages[FIRST_EDITION]
    for name in ("figure_S1.png", "figure_2.png"):
        assert (tmp_path / "benchmarks" / "figures" / name).stat().st_size > 10_000, name
        assert f"![{name}](../benchmarks/figures/{name})" in pages[FIRST_EDITION]


def test_results_of_a_readers_own(tmp_path, write_report):
    """A folder without any file gives pages that say so."""
    pages = write_report(runs_dir="none", results="none", figures="figures")
    assert not list((tmp_path / "figures").iterdir()) and "No runs yet." in pages[FIRST_EDITION]
    (summary,) = re.findall(r"<!-- report: summary -->\n(.*?)\n<!-- end", pages[PAGES[0]], re.DOTALL)
    assert {line.split(" | ")[2].split(" (")[0] for line in summary.splitlines()[2:]} == {"open"}


def test_committed_tables_are_of_the_committed_results(monkeypatch, write_report):
    """Every table that the report writes is on the pages as the CSV files beside them give it: one that was edited by
    hand or left behind by new runs is no result."""
    monkeypatch.setattr(report, "RESAMPLES", 2000)
    link = "![{0}](figures/{0})\n\n".format
    monkeypatch.setattr(report, "figure", lambda results, path, *_: link(path.name) if results.variants else "")
    assert write_report(runs_dir="none", figures="benchmarks/figures") == {page: page.read_text() for page in PAGES}


def table_of(page: str, first: str) -> list[list[str]]:
    """The rows of the Markdown table with this first header, the header included."""
    text = (ROOT / page).read_text()
    (table,) = re.findall(rf"(?<=\n\n)\| {re.escape(first)} \|.*(?:\n\|.*)*", text)
    head, _, *rows = table.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]


def test_figure_6_on_the_page():
    """The table is multimodality.py's file, and the page's medians are its medians."""
    table = pd.read_csv(report.run.RESULTS / "gridworld.csv")
    head, *rows = table_of("docs/results_multimodality.md", "board")
    assert head == [name.replace("_", " ") for name in table]
    assert rows == table.astype(object).astype(str).to_numpy().tolist()
    bits = table.groupby(["board", "contender"]).entropy_bits.median().map("{:.2f}".format)
    for row, board in ((2, "GridWorld"), (3, "JumpWorld")):
        target = table_of("benchmarks/README.md", "Target")[row]
        assert target[1] == f"{bits[board, 'NFPO']} and {bits[board, 'PPO']} bit"


def test_cost_on_the_page():
    """The tables are what cost.py prints of its file."""
    cost = pytest.importorskip("benchmarks.cost")
    table = pd.read_csv(report.run.RESULTS / "cost.csv")
    page = (ROOT / "docs" / "results_cost_and_speed.md").read_text()
    for sizes, rows in table.groupby(["env_id", "obs_dim", "action_dim"], sort=False):
        summary = {(row.what, row.contender): (row.value, row.relative_to_ppo) for row in rows.itertuples()}
        assert cost.markdown(cost.Task(*sizes[:2], np.zeros(sizes[2]), np.zeros(sizes[2])), summary) in page


def test_speed_on_the_page():
    """Rates and ratios of today's script are those of speed.py's file, contender by contender."""
    speeds = pd.read_csv(report.run.RESULTS / "speed_v2.csv").set_index(["contender", "env_id"])
    (table,) = re.findall(r"^\| \| cores \| Humanoid-v4, steps/s.*(?:\n\|.*)*", DOCS.read_text(), re.MULTILINE)
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    names = [name for name, env_id in speeds.index if env_id == "Humanoid-v4"]
    assert len(lines) == len(names)
    for name, (_, cores, *cells, _) in zip(["nfpo", "nfpo-envpool", "nfpo-1x2048", "ppo", "cleanrl"], lines):
        rows = [speeds.loc[name, env_id] for env_id in ("Humanoid-v4", "HalfCheetah-v4")]
        assert [cores, cells[0], cells[2]] == [str(rows[0].cores), *(f"{row.rate:,}" for row in rows)]
        ratios = [re.findall(r"\d+\.\d\d", cell) for cell in cells[1::2]]
        if name != "cleanrl":
            assert ratios == [[f"{row.rate_vs_cleanrl:.2f}", f"{row.whole_vs_cleanrl:.2f}"] for row in rows]


def test_first_speed_on_the_page():
    """Seconds round by round and the medians of the ratios within a round, on the page and among the targets."""
    speeds = pd.read_csv(report.run.RESULTS / "speed.csv")
    speeds = speeds[speeds.what.str.startswith("seconds")].astype({"value": float})
    speeds["round"] = speeds.groupby(["env_id", "contender"]).cumcount()
    ratios = {}
    for env_id, rows in speeds.groupby("env_id"):
        seconds = rows.pivot(index="contender", columns="round", values="value")
        ratios[env_id] = seconds.loc["cleanrl"] / seconds.loc["nfpo"], seconds.loc["nfpo"] / seconds.loc["ppo"]
        found = [
            [*(f"{x:.0f}" for x in row), f"{(seconds.loc['cleanrl'] / row).median():.2f}"]
            + [f"{(row / seconds.loc['ppo']).median():.2f}"]
            for _, row in seconds.iterrows()
        ]
        _, *shown = table_of("docs/results_cost_and_speed.md", env_id)
        assert sorted(row[1:] for row in shown) == sorted(found)
    targets = table_of("benchmarks/README.md", "Target")
    for row, ratio in ((4, ratios["Humanoid-v4"][1]), (5, ratios["Humanoid-v4"][0]), (6, ratios["HalfCheetah-v4"][0])):
        rounds = ", ".join(f"{x:.2f}" for x in ratio)
        assert targets[row][1] == f"{ratio.median():.2f} x (rounds: {rounds})"


def test_medians_of_updates_on_the_page():
    """How far updates go and how much noise is left, from the first edition's curves."""
    curves = report.Results.load(report.run.RESULTS, "S1").curves
    columns = {"KL": ("approx_kl", 3), "return": ("episodic_return", 0), "entropy": ("entropy", 1)}
    parts = {"first tenth": (0, 1e5), "second tenth": (1e5, 2e5), "last tenth": (9e5, 1e6)}
    (text,) = re.findall(r"^\| \| \| Humanoid.*(?:\n\|.*)*", FIRST_EDITION.read_text(), re.MULTILINE)
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert len(lines) == 16
    what = ""
    for title, variant, *cells in lines:
        what = title or what  # the first of a block names it
        (column, digits), part = columns[what.split(",")[0]], next(part for part in parts if part in what)
        within = curves[(curves.variant == variant) & (curves.step > parts[part][0]) & (curves.step <= parts[part][1])]
        medians = within.groupby("env_id")[column].median()
        assert cells == [f"{medians[env_id]:.{digits}f}" for env_id in head[2:]], (what, variant)


def test_missing_marker(tmp_path):
    """A table that no page has a place for is one line; a figure's path is relative to its page."""
    page, figures = tmp_path / "docs" / "page.md", tmp_path / "benchmarks" / "figures"
    page.parent.mkdir()
    page.write_text("before\n<!-- report: a -->\nold\n<!-- end: a -->\nafter\n")
    report.write([page], figures, {"a": "![x](figures/x.png)"})
    shown = "![x](../benchmarks/figures/x.png)"
    assert page.read_text() == f"before\n<!-- report: a -->\n{shown}\n<!-- end: a -->\nafter\n"
    with pytest.raises(SystemExit, match="no page has the markers <!-- report: b --> and <!-- end: b -->"):
        report.write([page], figures, {"b": "table"})


def test_interquartile_mean():
    """Of five seeds the middle three, of four the middle two, and with three none is cut; each point of a curve by
    itself, and as scipy has it."""
    for scores, value in (([9, 1, 2, 6, 100], 17 / 3), ([0, 100, 4, 6], 5), ([1, 2, 6], 3), ([7], 7)):
        assert report.iqm(np.array(scores, dtype=float)) == pytest.approx(value)
    curves = np.random.default_rng(0).normal(size=(9, 4))
    assert report.iqm(curves) == pytest.approx(trim_mean(curves, 0.25, axis=0))


def test_cells():
    """IQM and interval of the runs that did not break, their number where there are few, and how many broke."""
    scores = {"A": [3.0] * 5, "B": [7.0], "C": [None, 90, None], "D": [], "E": [3.0] * 6 + [np.nan] * 4}
    results = results_of({"NFPO": scores})
    cells = {task: report.cell(results, task, "NFPO", report.TRAINING) for task in TASKS}
    assert cells == {"A": "3 [3, 3]", "B": "7 (1)", "C": "90 (1), 2 broke", "D": "-", "E": "3 [3, 3] (6)"}
    # Two seeds: a quarter of the resamples is all low, a quarter all high, so both are inside 95 %.
    assert report.cell(results_of({"NFPO": {"A": [0.0, 10.0]}}), "A", "NFPO", report.TRAINING) == "5 [0, 10] (2)"


def test_probability_of_improvement():
    """Share of pairs won, ties count half, tasks are averaged; the same as rliable's."""
    assert report.improvement(np.array([[3.0], [1.0]]), np.array([[2.0], [0.0]])) == [3 / 4]
    assert report.improvement(np.array([[1.0], [2.0]]), np.array([[1.0], [0.0]])) == [(0.5 + 1 + 1 + 1) / 4]
    assert report.improvement(np.array([[1.0, 0.0]] * 3), np.array([[0.0, 1.0]] * 3)) == [0.5]
    ours, theirs = np.random.default_rng(0).integers(0, 4, size=(2, 5, 3))
    assert report.improvement(ours, theirs) == pytest.approx(metrics.probability_of_improvement(ours, theirs))


@pytest.mark.parametrize(
    "interval,seeds,claim,verdict",
    [
        ((0.6, 1.0), 3, "above", "reproduced"),
        ((0.0, 0.4), 3, "above", "**not reproduced**, the opposite was seen"),
        ((0.4, 0.6), 3, "above", "not decidable here"),
        ((0.5, 1.0), 3, "above", "not decidable here"),
        ((0.6, 1.0), 3, "not above", "**not reproduced**"),
        ((0.0, 0.4), 3, "not above", "reproduced"),
        ((0.4, 0.6), 3, "not above", "agrees: no difference seen"),
        ((0.4, 0.6), 3, "equal", "agrees: no difference seen"),
        ((0.2, 0.6), 3, "equal", "not decidable here"),  # a standard deviation apart is not excluded
        ((0.4, 0.8), 3, "equal", "not decidable here"),
        ((0.2, 0.6), 3, "not above", "agrees: no difference seen"),
        ((0.4, 0.8), 3, "not above", "not decidable here"),
        ((0.0, 0.4), 3, "equal", "**not reproduced**, behind"),
        ((0.6, 1.0), 3, "equal", "**not reproduced**, ahead"),
        ((0.6, 1.0), 3, "any", "ahead"),
        ((0.0, 0.4), 3, "any", "behind"),
        ((0.4, 0.6), 3, "any", "not decidable here"),
        ((1.0, 1.0), 2, "above", "open (2 of 3 seeds)"),
    ],
)
def test_verdicts(interval, seeds, claim, verdict):
    """A verdict needs three seeds and an interval on one side of 1/2."""
    found = report.Estimate(np.mean(interval), *interval, seeds, tasks=2)
    assert report.judge(found, 3, claim)[1] == verdict
    if seeds == 3:
        assert report.judge(found, 5, claim)[1] == f"{verdict} (3 of 5 seeds)"
    assert report.judge(found._replace(tasks=1), 3, claim)[1].startswith("open")  # three against three decide nothing
    assert report.judge(None, 3, claim) == ("runs are missing", "open")


def test_interval_of_several_comparisons():
    """The best of four has a wider interval than one planned comparison; one seed has none."""
    ours, theirs = np.random.default_rng(1).normal(size=(2, 2, 5)) + np.array([[[0.5]], [[0.0]]])
    results = results_of({"v": dict(zip("AB", ours)), "w": dict(zip("AB", theirs)), "x": {"A": [9.0], "B": [9.0]}})
    one, four = (report.compare(results, ("A", "B"), "v", "w", several=number) for number in (1, 4))
    assert four.value == one.value and four.low <= one.low < one.high <= four.high and four != one
    assert report.probability(one) == f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    assert report.probability(report.compare(results, ("A", "B"), "x", "w")) == "1.00 (from 1 seed a task)"
    assert report.compare(results, ("A", "C"), "v", "w") is None


def test_broken_runs_show():
    """A run that broke is below every other one, and is not hidden behind those that did not."""
    results = results_of({"NFPO": {"A": [None, 90, None]}, "PPO": {"A": [60, 60, 60]}})
    for column in report.SCORES:
        assert report.compare(results, ("A",), "NFPO", "PPO", column).value == 1 / 3
    assert report.ratio(results, "A", "NFPO", "PPO") == "broke"
    assert report.ratio(results, "A", "PPO", "NFPO") == ""


def test_one_broken_run_of_five_is_cut_off():
    """The interquartile mean of five leaves out the lowest one, be it a run that broke."""
    results = results_of({"NFPO": {"A": [None, 90, 91, 92, 500]}, "PPO": {"A": [60] * 5}})
    assert report.ratio(results, "A", "NFPO", "PPO") == f"{91 / 60:.2f} x"


def test_comparison_of_all_runs():
    """A task's further seeds count, though the interval waits for the other tasks'."""
    results = results_of({"NFPO": {"A": [90, 30, 30], "B": [90]}, "PPO": {"A": [60, 60, 60], "B": [60]}})
    found = report.compare(results, ("A", "B"), "NFPO", "PPO")
    assert found.value == pytest.approx((1 / 3 + 1) / 2)
    assert report.probability(found) == "0.67 (from 1 seed a task)"


def test_ratio_of_common_seeds():
    """A contender's further seed, on which the other has not run, does not change their ratio."""
    results = results_of({"NFPO": {"A": [90, 900, 120]}, "PPO": {"A": [60, np.nan, 60, 6]}})
    assert report.ratio(results, "A", "NFPO", "PPO") == f"{105 / 60:.2f} x"
    assert report.ratio(results, "A", "NFPO", "none") == ""


def test_opposite_tasks_are_not_equal():
    """Behind on two tasks and ahead on two others is no agreement, though P is 1/2; with three seeds either."""
    noise = np.array([0, 1, -1, 2, -2])

    def judged(ratios: list[float], seeds: int, claim: str = "equal") -> tuple[str, str]:
        scores = {"NFPO": ratios, "PPO": [1] * 4}
        scores = {v: {t: 100 * x + noise[:seeds] for t, x in zip("BCDE", values)} for v, values in scores.items()}
        return report.judge_tasks(results_of(scores), tuple("BCDE"), "NFPO", "PPO", claim)

    text, verdict = judged([0.5, 0.5, 2, 2], 5)
    apart = "behind on B, behind on C, ahead on D, ahead on E"
    assert text.startswith("P = 0.50") and verdict == f"**not reproduced**: {apart}"
    assert judged([0.5, 0.5, 2, 2], 5, "any")[1] == f"not decidable here; {apart}"
    assert judged([1] * 4, 5)[1] == "agrees: no difference seen"
    assert judged([0.5, 0.5, 2, 2], 3)[1] == f"not decidable here: {apart} in every run"


def test_improvement_elsewhere_does_not_hide_harm():
    """`Not above` is about being ahead: ahead on one task and behind on the other is not `no difference`."""
    for ours, verdict in (
        ({"A": [9.0] * 5, "B": [1.0] * 5}, "**not reproduced**: ahead on A"),
        ({"A": [1.0] * 5, "B": [1.0] * 5}, "reproduced"),
    ):
        results = results_of({"v": ours, "w": {"A": [5.0] * 5, "B": [5.0] * 5}})
        assert report.judge_tasks(results, ("A", "B"), "v", "w", "not above")[1] == verdict


def test_control():
    """What the learning rate does for the Gaussian is not counted for the flow, and what is ahead with the noise on and
    not without it is no verdict."""

    def line(flow: float, gaussian: float, **columns) -> list[str]:
        scores = {"NFPO-std-flat": flow, "PPO-flat": gaussian}
        scores = {v: {t: [100 * x, 100 * x + 1, 100 * x - 1] for t in TASKS} for v, x in scores.items()}
        return report.verdict(results_of(scores, **columns), "text", "NFPO-std-flat", "PPO-flat", TASKS, "above")

    text, found, verdict = line(2, 1)
    assert text == "text" and verdict == "reproduced" and found.endswith("; deployed P = 1.00 [1.00, 1.00]")
    assert found.startswith("NFPO-std-flat against PPO-flat: A 2.00 x, deployed 2.00 x; B 2.00 x")
    assert line(1, 3)[2].startswith("**not reproduced**")
    deployed = {report.DEPLOYED: [5.0, 6, 7] * 10}
    found, verdict = line(2, 1, **deployed)[1:]
    assert "P = 1.00 [1.00, 1.00]; deployed P = 0.50" in found and verdict == "not decidable here: in training only"


def test_medians_where_the_score_is_no_return():
    """Of a determinant or an entropy the medians are shown, since a ratio says nothing of it."""
    results = results_of({name: {"A": [1.0] * 3, "B": [1.0] * 3} for name in "vw"})
    results.runs[report.LOG_DET] = [30, 31, 32, 40, 41, 42, 1, 2, 3, -4, -3, -2]
    _, found, verdict = report.verdict(results, "text", "v", "w", ("A", "B"), "above", report.LOG_DET)
    assert found == "v against w: A 31.00 against 2.00; B 41.00 against -3.00; P = 1.00 [1.00, 1.00]"
    assert verdict == "reproduced"


@pytest.fixture
def ablations(monkeypatch):
    """Makes `results_of` those of ablations on tasks A and B."""
    monkeypatch.setattr(report, "ABLATION", ("A", "B"))
    return results_of


def test_broken_runs_of_no_bound(ablations):
    """Half of the runs have to break, of the seeds that both have."""
    fine = [60, 61, 62]
    for broke, verdict in (
        ([None, None, 5], "reproduced"),
        ([None, 60, 5], "not decidable here"),
        (fine, "**not reproduced** in 500k steps: it breaks no more often"),
        ([None, None], "open"),
    ):
        scores = {"NFPO": {"A": [*fine, None, None], "B": fine}, "scale-none": {"A": broke, "B": broke}}
        _, found, decided = report.verdict_broken(ablations(scores))
        count = 2 * broke.count(None)
        assert decided == verdict and found == f"{count} of {2 * len(broke)} runs broke, with tanh 0"


def test_best_other_bound(ablations):
    """The winner is named, and as many seeds are claimed as the l with the fewest has."""
    fine = {"A": [60, 61, 62], "B": [60, 61, 62]}
    scores = {name: fine for name in report.TANH} | {"tanh-2": {"A": [90, 91, 92], "B": [90, 91, 92]}}
    _, found, verdict = report.verdict_bound(ablations(scores))
    assert found.startswith("the best other: tanh-2: P = 1.00") and verdict == "**not reproduced**"
    scores["tanh-1"] = {"A": [60], "B": [60]}
    assert report.verdict_bound(ablations(scores))[2] == "open (1 of 3 seeds)"
    del scores["tanh-1"]
    assert report.verdict_bound(ablations(scores))[1:] == ["runs are missing", "open"]


def test_sensitivity(ablations):
    """(best - worst) / best of each sweep by hand; without a difference between sweeps there is no verdict."""
    noise = np.array([-1.0, 0, 1])

    def line(worst: float, spread: float) -> list[str]:
        names = (*report.TANH, *report.CLIP)
        scores = {name: {"A": 100 + spread * noise, "B": 200 + spread * noise} for name in names}
        scores["clip-2"] = {"A": worst + spread * noise, "B": worst + spread * noise}
        return report.verdict_sensitivity(ablations(scores))[1:]

    text = "(best - worst) / best over l: A 0% against 50%; B 0% against 75%; difference [62%, 62%]"
    assert line(50, 0) == [text, "reproduced"]
    assert line(90, 60)[1] == "not decidable here"
    scores = {name: {"A": [100.0] * 3, "B": [100.0] * 3} for name in (*report.TANH, *report.CLIP)}
    scores["tanh-2"] = {"A": [None] * 3, "B": [None] * 3}  # a run that broke earned nothing
    found, verdict = report.verdict_sensitivity(ablations(scores))[1:]
    assert "A 100% against 0%" in found and verdict == "**not reproduced**"
    del scores["clip-2"]
    assert report.verdict_sensitivity(ablations(scores))[1:] == ["runs are missing", "open (0 of 3 seeds)"]


def test_claims_are_of_the_grid():
    """Every claim is about runs that the grid wants."""
    wanted = {(run.env_id, run.variant) for run in runner.select(runner.RunArgs())}
    for source, _, ours, theirs, env_ids, *_ in report.CLAIMS:
        if source != "Figure 6":  # there the tasks are called as multimodality.py's file calls them
            assert {(env_id, v) for env_id in env_ids for v in (ours, theirs)} <= wanted, source


def second_edition(folder, experiment: str, keep, score) -> report.Results:
    """Writes the runs of an experiment that `keep` wants to the second edition's file, and loads the experiment."""
    runs = [run for run in runner.select(runner.RunArgs(experiments=(experiment,))) if keep(run)]
    rows = pd.DataFrame(runs, columns=runner.Run._fields).drop(columns="edition").assign(status="finished")
    rows[report.TRAINING] = rows[report.DEPLOYED] = [float(score(run)) for run in runs]
    if runs:
        rows.to_csv(folder / "runs_v2.csv", index=False)
    return report.Results.load(folder, experiment)


def test_second_edition_missing_partial_and_complete(tmp_path):
    """Figure S1b's tables say what is there: no runs; some seeds of some variants; all of them, with a verdict."""

    def score(run) -> float:
        """NFPO is ahead on Humanoid and like PPO elsewhere; the others are behind everywhere."""
        ahead = {"NFPO": 50 * (run.env_id == "Humanoid-v4"), "PPO": 0}
        return 100 + run.seed + ahead.get(run.variant, -50)

    results = second_edition(tmp_path, "S1b", lambda run: False, score)
    assert results.variants == [] and report.table_scores(results, report.MUJOCO, []).count("No runs yet.") == 2
    assert report.table_above_ppo(results).count("No runs yet.") == 2
    keep = lambda run: run.seed <= 2 and run.variant in ("PPO", "NFPO") and run.env_id != "Ant-v4"  # noqa: E731
    results = second_edition(tmp_path, "S1b", keep, score)
    assert results.variants == ["NFPO", "PPO"]
    scores = report.table_scores(results, report.MUJOCO, results.variants)
    assert "| NFPO | 152 [151, 152] (2) | - | 102 [101, 102] (2) |" in scores
    few = "1.00 (from 2 seeds a task) | - | 0.50 (from 2 seeds a task)"
    above = report.table_above_ppo(results)
    assert f"| NFPO | {few}" in above and ", 4 of 5 tasks | open (2 of 5 seeds) |" in above
    results = second_edition(tmp_path, "S1b", lambda run: True, score)
    (training, _) = report.table_above_ppo(results).split("as deployed")
    lines = {line.split(" | ")[0].strip("| "): line for line in training.splitlines()[4:] if line.startswith("| ")}
    assert list(lines) == ["NFPO", "NFPO-paper", "NFPO-volume", "NFPO-mean", "PPO-mixture"]
    assert "2 of 5 tasks" in lines["PPO-mixture"]
    assert lines["NFPO"].startswith("| NFPO | 1.00 [1.00, 1.00] | 0.50 [")
    assert lines["NFPO"].split(" | ")[6].startswith("0.60 [")
    assert "ahead" in lines["NFPO"] and lines["NFPO-paper"].endswith("| 0.00 [0.00, 0.00] | behind |")
    # Humanoid has ten seeds, the other tasks five: nothing says that some are missing.
    assert "| NFPO | 156 [" in report.table_scores(results, report.MUJOCO, ["NFPO"]) and "(" not in lines["NFPO"]


def test_boxes(tmp_path):
    """Seeds side by side, and a dash where a run is missing."""
    score = lambda run: 1000 * ("Raw" in run.env_id) + run.seed  # noqa: E731
    results = second_edition(tmp_path, "boxes", lambda run: run.seed < 3 or "Raw" in run.env_id, score)
    table = report.table_boxes(results)
    assert table.count("| seed | 1 | 2 | 3 |") == table.count("| Humanoid-v4 | 1 | 2 | - |") == 2
    assert table.count("\n| RawHumanoid-v4 | 1001 | 1002 | 1003 |") == 2


def test_tuning():
    """The mean over tasks of returns in units of the best setting's; bold for the best of a contender with all runs."""
    scores = {
        "NFPO-lr3e-4-e10": {"A": [90, 110], "B": [20, 40]},  # the best on A: 1 and 0.75
        "NFPO-lr1.5e-4-e4": {"A": [50, 50], "B": [40, 40]},  # the best on B: 0.5 and 1
        "NFPO-mean-lr1.5e-4-e4": {"A": [None, 20], "B": [4, 4]},  # a run that broke earned nothing: 0.1 and 0.1
        "PPO-lr3e-4-e10": {"A": [80, 80], "B": [40, 40]},
        "PPO-lr1.5e-4-e4": {"A": [80, 80], "B": [40, np.nan]},
    }
    lines = report.table_tuning(results_of(scores)).splitlines()
    assert lines[0] == "| setting | NFPO | NFPO-mean | PPO |"
    assert lines[2] == "| lr1.5e-4-e4 | 0.75 | **0.10** | 1 runs missing |"
    assert lines[3] == "| lr3e-4-e10 | **0.88** | - | 0.90 |"
    assert report.table_tuning(results_of({"NFPO-lr1-e1": {"A": [np.nan]}})).endswith("| lr1-e1 | 1 runs missing |")


def test_curves_with_holes(tmp_path):
    """A bin without an episode is bridged, the shortest run ends the curve, and a run that broke is not in it."""
    key = {"env_id": "Hopper-v4", "variant": "NFPO", "total_timesteps": 1_000_000}
    points = {1: {10: 1.0, 30: 3.0, 40: 4.0}, 2: {20: 6.0, 30: 8.0}, 3: {10: 0.0, 20: 0.0}}
    rows = [(seed, step, value) for seed, line in points.items() for step, value in line.items()]
    curves = pd.DataFrame(rows, columns=["seed", "step", "episodic_return"]).assign(log_det=0.0, **key)
    runs = pd.DataFrame({"seed": [1, 2, 3], "status": ["finished", "finished", "broke"]})
    (tmp_path / "curves").mkdir()
    curves.to_csv(tmp_path / "curves" / "Hopper-v4.csv", index=False)
    runs.assign(**key, last_100_episodes=1.0, evaluation=1.0).to_csv(tmp_path / "runs.csv", index=False)
    results = report.Results.load(tmp_path, "S1")
    curve = results.curve("Hopper-v4", "NFPO", "episodic_return")
    assert curve.columns.tolist() == [10, 20, 30] and curve.to_numpy().tolist() == [[1, 2, 3], [6, 6, 8]]
    assert results.curve("Hopper-v4", "PPO", "episodic_return").empty
