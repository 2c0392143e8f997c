"""The runner of studies: rows times seeds in processes, resumable, with a table of every seed."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import study_samples
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.errors import UserError
from unimed.studies import run as studies
from unimed.studies.run import clean, disk, run_study


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "toy", "study_samples")
    monkeypatch.syspath_prepend(study_samples.FOLDER)
    return study_samples.STUDY


def started(out):
    return [line.split()[0] for line in (out / "started.txt").read_text().splitlines()]


def test_rows_and_seeds_make_a_table(tmp_path, toy):
    told = []
    table = run_study(toy, tmp_path / "s", seeds=2, rows=["plain", "other"], progress=lambda *some: told.append(some))
    assert sorted(started(tmp_path / "s")) == ["other-0", "other-1", "plain-0", "plain-1"]
    assert table["results"]["other"]["1"]["scores"] == {"vqa": pytest.approx(0.21), "refer": pytest.approx(0.105)}
    assert table["results"]["plain"]["0"]["steps"] == 7
    assert table["gains"]["other"]["seeds"]["0"]["mean"] == pytest.approx(100)
    text = (tmp_path / "s" / "table.md").read_text()
    assert re.search(
        r"\| plain \| 2 \| 0\.105 \(0\.100, 0\.110\) \| 0\.05[23] \(0\.050, 0\.055\) \| 0\.079 \(0\.075, 0\.08[23]\) \|", text
    ), text
    assert re.search(r"\| other \| 2 \|.*\| plain \| \+95\.5 \(\+100\.0, \+90\.9\) \| \+7\.5 \(\+7\.5, \+7\.5\) \| 4, 0 \|", text), text
    assert "2 rows." in text
    assert json.loads((tmp_path / "s" / "table.json").read_text()) == table
    assert (tmp_path / "s" / "plot.png").stat().st_size > 5000
    assert told[-1][:2] == (4, 4)
    # The same call again makes nothing; one with more rows and seeds makes what is missing.
    run_study(toy, tmp_path / "s", seeds=2, rows=["plain", "other"])
    assert len(started(tmp_path / "s")) == 4
    with pytest.raises(UserError, match="holds the study toy of 7 steps"):
        run_study(toy, tmp_path / "s", seeds=2, steps=9)


def test_a_failed_run_is_named_and_the_rest_is_kept(tmp_path, toy):
    with pytest.raises(UserError, match=r"1 of the runs failed: broken, seed 0: this row is broken \(.*log\.txt\); finished runs are kept"):
        run_study(toy, tmp_path / "s", seeds=1, rows=["plain", "broken"], jobs=1)
    assert started(tmp_path / "s") == ["plain-0", "broken-0"]
    (tmp_path / "s" / "mended").touch()
    table = run_study(toy, tmp_path / "s", seeds=1, rows=["plain", "broken"], jobs=1)
    assert started(tmp_path / "s") == ["plain-0", "broken-0", "broken-0"]
    assert set(table["results"]) == {"plain", "broken"}


def begun(out):
    """A study of its own process, while its second run waits."""
    code = "import study_samples as s; from unimed.studies import run; run.STUDIES['toy'] = 'study_samples'; "
    code += f"from pathlib import Path; run.run_study(s.STUDY, Path({str(out)!r}), seeds=1, rows=['plain', 'slow'])"
    path = os.pathsep.join([study_samples.FOLDER, os.getcwd()])
    command = [sys.executable, "-c", code]
    first = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    until = time.monotonic() + 60
    while not (out / "runs" / "slow-0" / "kept" / "half").is_file() and time.monotonic() < until:
        time.sleep(0.02)
    return first, command, path


def test_a_study_that_is_told_to_end_ends_its_runs(tmp_path):
    study, *_ = begun(tmp_path / "s")
    study.terminate()
    assert study.wait(timeout=30) == 128 + signal.SIGTERM
    (run,) = [line.split()[1] for line in (tmp_path / "s" / "started.txt").read_text().splitlines() if line.startswith("slow-0")]
    with pytest.raises(ProcessLookupError):
        os.kill(int(run), 0)


def test_a_killed_study_goes_on_and_no_run_is_made_twice_at_a_time(tmp_path):
    out = tmp_path / "s"
    first, command, path = begun(out)
    first.send_signal(signal.SIGKILL)  # its run stays, as an orphan, and holds the lock
    first.wait()
    again = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    (out / "go on").touch()
    assert again.wait(timeout=60) == 0
    assert started(out).count("slow-0") in (1, 2)
    assert (out / "runs" / "slow-0" / "result.json").is_file()
    assert (out / "table.md").is_file()


def test_clean_keeps_results(tmp_path, toy):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "go on").touch()
    with pytest.raises(UserError, match="exists and is no study"):
        run_study(toy, tmp_path / "s", seeds=1, rows=["slow"])
    (tmp_path / "s" / "go on").unlink()
    with pytest.raises(UserError, match="no study"):
        clean(tmp_path / "s")
    run_study(toy, tmp_path / "s", seeds=1, rows=["plain"])
    (tmp_path / "s" / "go on").touch()
    run_study(toy, tmp_path / "s", seeds=1, rows=["slow"])
    before = disk(tmp_path / "s")
    assert clean(tmp_path / "s") == before - disk(tmp_path / "s") >= 4
    assert not (tmp_path / "s" / "data").exists()
    assert not (tmp_path / "s" / "runs" / "slow-0" / "kept").exists()
    assert set(run_study(toy, tmp_path / "s", seeds=1, rows=["plain", "slow"])["results"]) == {"plain", "slow"}


def test_the_command(tmp_path):
    run = CliRunner().invoke(cli.app, ["study", "toy", "--out", str(tmp_path / "s"), "--rows", "plain", "--seeds", "1"])
    assert run.exit_code == 0, run.output
    assert "| plain | 1 | 0.100 (0.100)" in run.output
    assert "MB on disk (--clean keeps the results)" in run.output
    unknown = "no such study; known are connectors, imax, medmoe"
    for wrong, text in ((["nothing"], unknown), (["toy", "--rows", "x"], "no such row; toy has plain"),
                        (["toy", "--seeds", "0"], "must be at least 1")):  # fmt: skip
        run = CliRunner().invoke(cli.app, ["study", *wrong, "--out", str(tmp_path / "z")])
        assert (run.exit_code, text in run.output) == (2, True), run.output
