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
    shown = {variant for rows in report.ABLATION_ROWS.values() for variants in rows.values() for variant in variants}
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
    """S1b: five tasks on EnvPool, ten seeds on Humanoid; boxes: two Humanoids. No run of it is one of the first's."""
    runs = runner.select(runner.RunArgs(experiments=("S1b", "boxes")))
    assert len(runs) == 4 * (10 + 4 * 5) + 2 * 3 and {run.total_timesteps for run in runs} == {1_000_000}
    assert sum(run.env_id == "Humanoid-v4" and "--envpool" in run.command() for run in runs) == 40
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


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch):
    """As many as hand-computed intervals need."""
    monkeypatch.setattr(report, "RESAMPLES", 30)


@pytest.fixture
def reported(grid, tmp_path, monkeypatch, capsys):
    """The report of the tiny grid, twice in a row as after two sessions; the folder it wrote to."""
    for name, value in {"MUJOCO": ("Hopper-v4",) * 5, "ABLATION": ("Hopper-v4",)}.items():
        monkeypatch.setattr(report, name, value)
    monkeypatch.setattr(report, "STEPS_1M", 512)
    monkeypatch.setattr(report, "STEPS_ABLATION", 512)
    (tmp_path / "README.md").write_bytes((ROOT / "benchmarks" / "README.md").read_bytes())
    (tmp_path / "docs.md").write_bytes((ROOT / "docs" / "nfpo_continuous_action.md").read_bytes())
    places = {"runs-dir": grid[0] / "runs", "results": "results", "figures": "figures", "readme": "README.md"}
    places["docs"] = "docs.md"
    monkeypatch.setattr(sys, "argv", ["report.py", *(f"--{k}={tmp_path / v}" for k, v in places.items())])
    report.main()
    first = (tmp_path / "results" / "runs.csv").read_bytes()
    for name in ("figure_s1", "figure_s1_aggregate", "figure_s1_updates", "figure_ablation"):
        monkeypatch.setattr(report, name, lambda *_: None)  # once is enough
    report.main()
    assert (tmp_path / "results" / "runs.csv").read_bytes() == first
    return tmp_path


def test_report_of_the_tiny_grid(grid, reported):
    """What ended is in the CSV files with the numbers of its events, what failed is not; the page has its tables."""
    from conftest import scalars

    runs = pd.read_csv(reported / "results" / "runs.csv").set_index("variant")
    assert set(runs.index) == {"NFPO", "PPO", "scale-none"}
    assert list(runs.status[["NFPO", "PPO", "scale-none"]]) == ["finished", "finished", "broke"]
    assert runs.steps["NFPO"] == 512 and runs.steps["scale-none"] < 512
    points = scalars(run_folder(grid[0], "NFPO"))
    returns = [value for _, value in points["charts/episodic_return"]]
    assert returns
    assert runs.last_100_episodes["NFPO"] == pytest.approx(np.mean(returns[-100:]), rel=1e-3)
    assert runs.evaluation["NFPO"] > 0 and runs.torch["NFPO"].startswith("2.")

    curves = pd.read_csv(reported / "results" / "curves" / "Hopper-v4.csv")
    mine = curves[curves.variant == "NFPO"].set_index("step")
    for step, value in points["losses/approx_kl"]:
        edge = int(np.ceil(step / 10.24) * 10.24)  # 50 bins of 512 steps: an iteration each has a bin of its own
        assert mine.approx_kl[edge] == pytest.approx(value, rel=1e-3)
    page = (reported / "README.md").read_text()
    assert "| NFPO beats PPO on Humanoid | Fig. S1 |" in page
    for text in (page, (reported / "docs.md").read_text()):
        assert f"| NFPO | {runs.last_100_episodes['NFPO']:.0f} (1) |" in text
        assert f"| NFPO | {runs.evaluation['NFPO']:.0f} (1) |" in text
    for name in ("figure_S1.png", "figure_S1_aggregate.png", "figure_2.png"):
        assert (reported / "figures" / name).stat().st_size > 10_000, name


def test_missing_marker(tmp_path):
    """A page without a marker is one line, not a page without its table."""
    (tmp_path / "page.md").write_text("<!-- report: a -->\n<!-- end: a -->\n")
    report.write_readme(tmp_path / "page.md", {"a": "table"})
    assert (tmp_path / "page.md").read_text() == "<!-- report: a -->\ntable\n<!-- end: a -->\n"
    with pytest.raises(SystemExit, match="needs the markers"):
        report.write_readme(tmp_path / "page.md", {"b": "table"})


def test_interquartile_mean():
    """Of five seeds the middle three, of four the middle two, and with three none is cut."""
    for scores, value in (([9, 1, 2, 6, 100], 17 / 3), ([0, 100, 4, 6], 5), ([1, 2, 6], 3), ([7], 7)):
        found = report.iqm(np.array(scores, dtype=float))
        assert found.value == pytest.approx(value) and found.seeds == len(scores)
        assert min(scores) <= found.low <= found.value <= found.high <= max(scores)
    certain = report.iqm(np.full(5, 3.0))
    assert (certain.low, certain.high) == (3, 3) and str(certain) == "3 [3, 3]"
    assert str(report.iqm(np.array([7.0]))) == "7 (1)"
    # Two seeds: a quarter of the resamples is all low, a quarter all high, so both are inside 95 %.
    pair = report.iqm(np.array([0.0, 1.0]))
    assert (pair.low, pair.value, pair.high) == (0, 0.5, 1)


def test_interquartile_mean_of_curves():
    """Each point by itself, equal to the scalar one."""
    returns = np.random.default_rng(0).normal(size=(5, 4)).cumsum(1)
    middle, low, high = report.iqm_curve(returns)
    assert middle.shape == low.shape == high.shape == (4,)
    for t in range(4):
        assert middle[t] == pytest.approx(report.iqm(returns[:, t]).value)
        assert np.sort(returns[:, t])[1:4].mean() == pytest.approx(middle[t])


def test_probability_of_improvement():
    """Share of pairs won, ties count half, tasks are averaged."""
    ours, theirs = np.array([[3.0], [1.0]]), np.array([[2.0], [0.0]])
    assert report.improvement(ours, theirs).value == 3 / 4
    assert report.improvement(np.array([[1.0], [2.0]]), np.array([[1.0], [0.0]])).value == (0.5 + 1 + 1 + 1) / 4
    two_tasks = report.improvement(np.array([[1.0, 0.0]] * 3), np.array([[0.0, 1.0]] * 3))
    assert (two_tasks.value, two_tasks.seeds) == (0.5, 3)
    sure = report.improvement(np.full((3, 1), 2.0), np.full((3, 1), 1.0))
    assert (sure.value, sure.low, sure.high) == (1, 1, 1)


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
        ((1.0, 1.0), 2, "above", "open (2 of 3 seeds)"),
    ],
)
def test_verdicts(interval, seeds, claim, verdict):
    """A verdict needs three seeds and an interval on one side of 1/2."""
    found = report.Estimate(np.mean(interval), *interval, seeds, tasks=2)
    assert report.judge(found, 3, claim)[1] == verdict
    assert report.judge(found._replace(tasks=1), 3, claim)[1].startswith("open")  # three against three decide nothing
    assert report.judge(None, 3, claim) == ("runs are missing", "open")


def test_interval_of_several_comparisons():
    """The best of four has a wider interval than one planned comparison; one seed has none."""
    ours, theirs = np.random.default_rng(1).normal(size=(2, 5, 2)) + np.array([[[0.5]], [[0.0]]])
    one, four = (report.improvement(ours, theirs, comparisons) for comparisons in (1, 4))
    assert four.value == one.value and four.low <= one.low < one.high <= four.high and four != one
    assert report.probability(one) == f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"
    assert report.probability(report.improvement(ours[:1], theirs[:1])).endswith(" (from 1 seed a task)")


TASKS = tuple("ABCDE")


def results_of(folder, scores: dict, total: int = 1_000_000) -> report.Results:
    """Results with these training scores: {variant: {task: one score a seed, None where the run broke}}."""
    rows = [
        {
            "env_id": task,
            "variant": variant,
            "seed": seed,
            "total_timesteps": total,
            "status": "finished" if score is not None else "broke",
            report.TRAINING: 50.0 if score is None else score,
            report.DEPLOYED: score,
        }
        for variant, by_task in scores.items()
        for task, values in by_task.items()
        for seed, score in enumerate(values, 1)
    ]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "runs.csv", index=False)
    return report.Results(folder)


def test_broken_runs_show(tmp_path):
    """A run that broke is below every other one, and is not hidden behind those that did not."""
    results = results_of(tmp_path, {"NFPO": {"A": [None, 90, None]}, "PPO": {"A": [60, 60, 60]}})
    assert report.compare(results, ("A",), "NFPO", "PPO", 1_000_000).value == 1 / 3
    assert report.compare(results, ("A",), "NFPO", "PPO", 1_000_000, report.DEPLOYED).value == 1 / 3
    for column in (report.TRAINING, report.DEPLOYED):
        assert report.cell(results, "A", "NFPO", 1_000_000, column) == "90 (1), 2 broke"
    assert report.times(report.ratio(results, "A", "NFPO", "PPO", 1_000_000)) == "broke"
    assert report.ratio(results, "A", "PPO", "NFPO", 1_000_000) is None


def test_one_broken_run_of_five_is_cut_off(tmp_path):
    """The interquartile mean of five leaves out the lowest one, be it a run that broke."""
    results = results_of(tmp_path, {"NFPO": {"A": [None, 90, 91, 92, 500]}, "PPO": {"A": [60] * 5}})
    assert report.ratio(results, "A", "NFPO", "PPO", 1_000_000) == 91 / 60


def test_comparison_of_all_runs(tmp_path):
    """A task's further seeds count, though the interval waits for the other tasks'."""
    results = results_of(tmp_path, {"NFPO": {"A": [90, 30, 30], "B": [90]}, "PPO": {"A": [60, 60, 60], "B": [60]}})
    found = report.compare(results, ("A", "B"), "NFPO", "PPO", 1_000_000)
    assert found.value == pytest.approx((1 / 3 + 1) / 2)
    assert report.probability(found) == "0.67 (from 1 seed a task)"


def test_ratio_of_common_seeds(tmp_path):
    """A contender's further seed, on which the other has not run, does not change their ratio."""
    results = results_of(tmp_path, {"NFPO": {"A": [90, 900, 120]}, "PPO": {"A": [60, None, 60, 6]}})
    results.runs = results.runs[~((results.runs.variant == "PPO") & (results.runs.seed == 2))]
    assert report.ratio(results, "A", "NFPO", "PPO", 1_000_000) == 105 / 60
    assert report.ratio(results, "A", "NFPO", "none", 1_000_000) is None


def test_boards(tmp_path):
    """Figure 6's lines: entropy without modes is breadth, and a target reached on one board is none on the other."""
    rows = [
        {"board": board, "contender": contender, "seed": seed, "entropy_bits": bits, "untrained_bits": 2.0}
        | {"success_rate": 0.9, "modes": 1}
        for board, contender, bits in (
            ("GridWorld", "NFPO", 1.5),
            ("GridWorld", "PPO", 0.1),
            ("JumpWorld", "NFPO", 0.1),
            ("JumpWorld", "PPO", 0.2),
        )
        for seed in range(1, 6)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "gridworld.csv", index=False)
    first, second = report.summary_gridworld(report.Results(tmp_path))
    assert "NFPO: median of 5 seeds 1.50 bit, untrained 2.00, success 0.90, 1 mode(s) at the start at most" in first[2]
    assert first[3].startswith("target reached, **but by breadth**") and first[3].endswith("claim: reproduced")
    assert second[3] == "target **fell short**; claim: **not reproduced**, the opposite was seen"


def verdicts_of(folder, monkeypatch, **scores) -> dict[str, list[str]]:
    """Figure S1's lines of the summary, {claim: line}, of {variant: (ratios to PPO, one a task; the number of seeds, or
    of five those that broke)}."""
    monkeypatch.setattr(report, "MUJOCO", TASKS)
    monkeypatch.setattr(report, "GRID", [runner.Experiment("S1", TASKS, tuple(scores), 5, 1_000_000)])
    noise = np.array([0, 1, -1, 2, -2])
    by_variant = {}
    for variant, (ratios, seeds) in scores.items():
        count, broke = (seeds, ()) if isinstance(seeds, int) else (5, seeds)
        by_variant[variant] = {
            task: [None if seed in broke else 100 * x + noise[seed - 1] for seed in range(1, count + 1)]
            for task, x in zip(TASKS, ratios)
        }
    return {line[0]: line for line in report.summary_s1(results_of(folder, by_variant))}


def test_target(tmp_path, monkeypatch):
    """The variant that reaches the target counts, not the one with the largest smallest ratio; three seeds needed."""
    target = "a variant has IQM >= PPO on all five tasks and >= 1.5 x on Humanoid"
    ppo, even, good = ((1,) * 5, 5), ((1.4, 1.3, 1.3, 1.3, 1.3), 5), (2, 1.2, 1.2, 1.2, 1.2)
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=even)[target]
    assert row[3] == "**fell short**" and row[2].startswith("NFPO: 1.40, 1.30")
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=even, NFPOb=(good, 5))[target]
    assert row[3] == "reached" and row[2].startswith("NFPOb: 2.00, 1.20")
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=even, NFPOb=(good, 1))[target]
    assert row[3] == "open" and row[2].startswith("NFPO:")
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=even, NFPOb=(good, 3))[target]
    assert row[3] == "reached (3 of 5 seeds)"
    assert row[2] == "NFPOb: 2.00, 1.20, 1.20, 1.20, 1.20 x PPO; without seed 1, which chose it, " + ", ".join(
        f"{x:.2f}" for x in (2, 1.2, 1.2, 1.2, 1.2)
    )
    broken = ((2, 1.2, 1.2, 1.2, 1.2), (1, 3, 5))  # three of five runs of each task broke
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=even, NFPOb=broken)[target]
    assert row[3] == "**fell short**" and row[2].startswith("NFPO:")


def test_control(tmp_path, monkeypatch):
    """What the learning rate does for the Gaussian is not counted for the flow."""
    claim = "NFPO-std-flat beats PPO-flat, the Gaussian with the same small, constant learning rate"
    three = {"PPO": ((1,) * 5, 3), "NFPO-std-flat": ((2,) * 5, 3)}
    row = verdicts_of(tmp_path, monkeypatch, **three, **{"PPO-flat": ((1,) * 5, 3)})[claim]
    assert row[2].startswith("A 2.00 x; B 2.00 x") and row[3] == "reproduced"
    row = verdicts_of(tmp_path, monkeypatch, **three, **{"PPO-flat": ((3,) * 5, 3)})[claim]
    assert row[2].startswith("A 0.67 x") and row[3].startswith("**not reproduced**")
    assert "without seed 1, which chose it, 0.00 (from 2 seeds a task)" in row[2]


def test_control_as_deployed(tmp_path, monkeypatch):
    """Ahead with the noise on, and not without it, is no verdict."""
    pair = {"NFPO-std-flat": {t: [90.0, 91, 92] for t in TASKS}, "PPO-flat": {t: [60.0, 61, 62] for t in TASKS}}
    results = results_of(tmp_path, pair)
    results.runs[report.DEPLOYED] = 5.0 + results.runs.seed
    monkeypatch.setattr(report, "MUJOCO", TASKS)
    (row,) = (line for line in report.summary_s1(results) if line[1] == "our control")
    assert "P = 1.00 [1.00, 1.00]" in row[2] and row[3] == "not decidable here: in training only"


def test_opposite_tasks_are_not_equal(tmp_path, monkeypatch):
    """Behind on two tasks and ahead on two others is no agreement, though P is 1/2."""
    claim = "NFPO performs like PPO on Ant, HalfCheetah, Hopper and Walker2d"
    ppo = ((1,) * 5, 5)
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=((1, 0.5, 0.5, 2, 2), 5))[claim]
    assert "P = 0.50" in row[2] and row[3] == "**not reproduced**: behind on B, behind on C, ahead on D, ahead on E"
    row = verdicts_of(tmp_path, monkeypatch, PPO=ppo, NFPO=((1,) * 5, 5))[claim]
    assert row[3] == "agrees: no difference seen"
    row = verdicts_of(tmp_path, monkeypatch, PPO=((1,) * 5, 3), NFPO=((1, 0.5, 0.5, 2, 2), 3))[claim]
    assert row[3] == "not decidable here: behind on B, behind on C, ahead on D, ahead on E in every run"


def test_improvement_elsewhere_does_not_hide_harm(tmp_path):
    """`Not above` is about being ahead: ahead on one task and behind on the other is not `no difference`."""
    for ours, verdict in (
        ({"A": [9.0] * 5, "B": [1.0] * 5}, "**not reproduced**: ahead on A"),
        ({"A": [1.0] * 5, "B": [1.0] * 5}, "reproduced"),
    ):
        results = results_of(tmp_path, {"v": ours, "w": {"A": [5.0] * 5, "B": [5.0] * 5}})
        assert report.judge_tasks(results, ("A", "B"), "v", "w", 1_000_000, 5, "not above")[1] == verdict


def test_iqm_of_all_tasks(tmp_path, monkeypatch):
    """Over seeds and tasks together, each task in units of PPO's interquartile mean on it."""
    monkeypatch.setattr(report, "MUJOCO", TASKS[:2])
    results = results_of(tmp_path, {"NFPO": {"A": [20, 40], "B": [9, 1]}, "PPO": {"A": [10, 30], "B": [1, 3]}})
    found = report.iqm_of_tasks(report.over_ppo(results, "NFPO"))
    assert found.value == pytest.approx((1 + 2) / 2)  # of 0.5, 1, 2 and 4.5
    assert (found.seeds, found.tasks) == (2, 2)
    assert report.over_ppo(results, "none") is None


def ablation_of(folder, monkeypatch, scores: dict, log_det=None) -> dict[str, list[str]]:
    """The ablations' lines of the summary, {claim: line}, of `results_of` with 500k steps and tasks A and B; `log_det`
    is {variant: its value at the end of each seed}."""
    monkeypatch.setattr(report, "ABLATION", ("A", "B"))
    results = results_of(folder, scores, 500_000)
    if log_det:
        ends = zip(results.runs.variant, results.runs.seed)
        results.runs[report.LOG_DET] = [log_det[variant][seed - 1] for variant, seed in ends]
    return {line[0]: line for line in report.summary_ablations(results)}


def test_broken_runs_of_no_bound(tmp_path, monkeypatch):
    """Half of the runs have to break, of seeds that both have; and growth is judged by the determinant alone."""
    both = lambda scores: {"A": scores, "B": scores}  # noqa: E731
    fine, log_det = [60, 61, 62], {"scale-none": [30, 31, 32], "NFPO": [1, 2, 3, 4, 5]}
    for broke, verdict in (
        ([None, None, 5], "reproduced"),
        ([None, 60, 5], "not decidable here"),
        (fine, "**not reproduced** in 500k steps: it breaks no more often"),
    ):
        scores = {"NFPO": {"A": [*fine, None, None], "B": fine}, "scale-none": both(broke)}
        lines = ablation_of(tmp_path, monkeypatch, scores, log_det)
        assert lines["without a bound numbers break in the end"][3] == verdict
        (grows,) = (line for claim, line in lines.items() if claim.startswith("without a bound (`none`) the det"))
        assert grows[3] == "reproduced" and "A 31.0 (tanh 3.0); B 31.0 (tanh 2.0)" in grows[2]


def test_best_other_bound(tmp_path, monkeypatch):
    """The winner is named, and as many seeds are claimed as the l with the fewest has."""
    claim, fine = "l = 0.5 is a good default: no other is better", [60, 61, 62]
    others = {f"tanh-{bound}": {"A": fine, "B": fine} for bound in ("0.1", "0.25", "1", "2")}
    scores = {"NFPO": {"A": fine, "B": fine}, **others, "tanh-2": {"A": [90, 91, 92], "B": [90, 91, 92]}}
    row = ablation_of(tmp_path, monkeypatch, scores)[claim]
    assert row[2].startswith("the best other: tanh-2: P = 1.00") and row[3] == "**not reproduced**"
    scores["tanh-1"] = {"A": [60], "B": [60]}
    assert ablation_of(tmp_path, monkeypatch, scores)[claim][3] == "open (1 of 3 seeds)"


def test_sensitivity(tmp_path, monkeypatch):
    """(best - worst) / best of each sweep by hand; without a difference between sweeps there is no verdict."""
    claim = "tanh is less sensitive to l than clip"
    tanh, clip = report.ABLATION_ROWS["3"].values()
    noise = np.array([-1.0, 0, 1])

    def line(worst: float, spread: float) -> list[str]:
        scores = {name: {"A": 100 + spread * noise, "B": 200 + spread * noise} for name in (*tanh, *clip)}
        scores["clip-2"] = {"A": worst + spread * noise, "B": worst + spread * noise}
        return ablation_of(tmp_path, monkeypatch, scores)[claim]

    row = line(50, 0)
    assert row[2:] == [
        "(best - worst) / best over l: A 0% against 50%; B 0% against 75%; difference [62%, 62%]",
        "reproduced",
    ]
    assert line(90, 60)[3] == "not decidable here"
    scores = {name: {"A": [100.0] * 3, "B": [100.0] * 3} for name in (*tanh, *clip)}
    scores["tanh-2"] = {"A": [None] * 3, "B": [None] * 3}  # a run that broke earned nothing
    row = ablation_of(tmp_path, monkeypatch, scores)[claim]
    assert "A 100% against 0%" in row[2] and row[3] == "**not reproduced**"


def test_speed(tmp_path):
    """Ratios are taken within a round and their median is quoted; other contenders and the memory rows do no harm."""
    seconds = {"nfpo": [10, 20, 40], "ppo": [9, 10, 20], "cleanrl": [50, 30, 80]}
    rows = [
        {
            "what": f"seconds ({'warm' if i else 'first'})",
            "contender": name,
            "env_id": "Humanoid-v4",
            "value": values[i],
        }
        for i in range(3)
        for name, values in seconds.items()
    ]
    memory = {"what": "memory", "contender": "nfpo", "env_id": "Humanoid-v4", "value": "436.0 MiB"}
    pd.DataFrame([*rows, memory]).to_csv(tmp_path / "speed.csv", index=False)
    results = report.Results(tmp_path)
    twin, cleanrl = report.summary_cost(results)
    assert twin[2:] == ["2.00 x (rounds: 1.11, 2.00, 2.00)", "**fell short**"]
    assert cleanrl[2:] == ["2.00 x (rounds: 5.00, 1.50, 2.00)", "reached, by the median: rounds are on both sides"]
    lines = report.table_speed(results).splitlines()
    assert lines[2] == "| **NFPO, `nfpo_continuous_action.py`** | 10 | 20 | 40 | 2.00 | 2.00 |"
    assert lines[3] == "| its Gaussian twin | 9 | 10 | 20 | 4.00 | 1.00 |"
    pd.DataFrame([row for row in rows if row["contender"] != "cleanrl"]).to_csv(tmp_path / "speed.csv", index=False)
    assert len(report.summary_cost(results)) == 1
    assert report.table_speed(results).splitlines()[2].endswith("| 10 | 20 | 40 | 2.00 |")


def test_results_of_a_readers_own(tmp_path, monkeypatch, capsys):
    """A folder without any file gives a page that says so."""
    results = report.Results(tmp_path / "none")
    for part in (report.summary_s1, report.summary_ablations, report.summary_gridworld):
        assert {line[-1] for line in part(results)} == {"open"}
    assert report.summary_cost(results) == []
    assert report.table_speed(results) == "Not measured yet."


def test_curves_with_holes(tmp_path):
    """A bin without an episode is bridged; the shortest run ends the common curve, and one that broke has its own."""
    key = {"env_id": "X", "variant": "v", "total_timesteps": 40}
    rows = [
        {**key, "seed": seed, "step": step, "episodic_return": value}
        for seed, points in ((1, {10: 1.0, 30: 3.0, 40: 4.0}), (2, {20: 6.0, 30: 8.0}))
        for step, value in points.items()
    ]
    (tmp_path / "curves").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "curves" / "X.csv", index=False)
    steps, values = report.Results(tmp_path).curve("X", "v", 40, "episodic_return")
    assert steps.tolist() == [10, 20, 30]
    assert values.tolist() == [[1, 2, 3], [6, 6, 8]]
    assert report.Results(tmp_path).curve("X", "w", 40, "episodic_return") is None
    assert report.Results(tmp_path).broken_curves("X", "v", 40, "episodic_return") == []
    runs = [{**key, "seed": seed, "status": status} for seed, status in ((1, "finished"), (2, "broke"))]
    pd.DataFrame(runs).to_csv(tmp_path / "runs.csv", index=False)
    steps, values = report.Results(tmp_path).curve("X", "v", 40, "episodic_return")
    assert steps.tolist() == [10, 30, 40] and values.tolist() == [[1, 3, 4]]
    (broken,) = report.Results(tmp_path).broken_curves("X", "v", 40, "episodic_return")
    assert broken.to_dict() == {20: 6.0, 30: 8.0}


def test_committed_tables_are_of_the_committed_results(tmp_path, monkeypatch, capsys):
    """Every table on the two pages is what the CSV files beside them give, but for intervals, which take minutes, and
    what they decide, verdicts and the best other l: a table edited by hand or left behind by new runs is no result."""
    for name in ("figure_s1", "figure_s1_aggregate", "figure_s1_updates", "figure_ablation"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(report, "RESAMPLES", 10)
    here, committed = ROOT / "benchmarks", [ROOT / "benchmarks/README.md", ROOT / "docs/nfpo_continuous_action.md"]
    places = {"runs-dir": tmp_path / "none", "results": here / "results", "figures": here / "figures"}
    places |= {"readme": tmp_path / "README.md", "docs": tmp_path / "docs.md"}
    written = [places["readme"], places["docs"]]
    for page, copy in zip(committed, written):
        # Emptied first, so that a table which is not written again does not pass for one that is.
        copy.write_text(re.sub(r"(<!-- report: .*? -->\n).*?(<!-- end)", r"\1\2", page.read_text(), flags=re.DOTALL))
    monkeypatch.setattr(sys, "argv", ["report.py", *(f"--{k}={v}" for k, v in places.items())])
    report.main()

    def comparable(page) -> list[str]:
        text, verdict = page.read_text(), r"[^|\n]*\|$"
        summary = re.search(r"<!-- report: summary -->.*?<!-- end", text, re.DOTALL)
        if summary:
            text = text.replace(summary[0], re.sub(verdict, "", summary[0], flags=re.MULTILINE))
        return re.sub(r" \[-?[\d.]+%?, -?[\d.]+%?\]|the best other: [^|]*", "", text).splitlines()

    for page, copy in zip(committed, written):
        assert comparable(copy) == comparable(page)
