"""Runs of a study: rows times seeds, each in a process of its own, a few at a time. The same call again goes on.

    OUT/study.json                 the study and its settings; the folder of another study is refused
    OUT/data/                      what the runs read, made once; OUT/start/: a model that they start from, if the study has one
    OUT/runs/ROW-SEED/result.json  what a run gave; a run without it is not finished. log.txt and what the run keeps lie beside it
    OUT/table.json table.md plot.png

A study is a module with STUDY; `python -m unimed.studies.run MODULE OUT ROW SEED` makes one run. A run that was killed goes on from what it
kept. Two processes never make one run at a time.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimed import io
from unimed.errors import UserError

STUDIES = {name: f"unimed.studies.{name}" for name in ("connectors", "imax", "medmoe")}  # module by name
START = "start"
DONE = "made"  # in data/, once it is whole
CHOICE_SEED = 1000  # of the runs that choose a setting: no seed of a table
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Job:
    """One run: its row and seed, the study's folder and its own, and the number of training steps."""

    out: Path
    row: str
    seed: int
    steps: int

    @property
    def folder(self) -> Path:
        return self.out / "runs" / f"{self.row}-{self.seed}"

    @property
    def data(self) -> Path:
        return self.out / "data"


@dataclass(frozen=True)
class Study:
    """rows: what each is, in a few words. against: the row that a row is compared with. steps: of a run by default.

    prepare(folder, seeds) fills data/. run(job) gives {"scores": {column: value}, ...}, higher being better; whatever else it gives is kept
    in table.json. "blank" among it, {column: value}, is what the run scores on black images. notes(results) gives lines for the end of
    table.md: results by row and seed. tidy(job) deletes what a finished run needs no more.

    choices: runs that are made first, with CHOICE_SEED, and are no rows of the table; later runs read their results to choose a setting.
    apart: columns that no mean and no gain counts.
    """

    name: str
    title: str
    rows: Mapping[str, str]
    against: Mapping[str, str]
    steps: int
    prepare: Callable[[Path, Sequence[int]], None]
    run: Callable[[Job], dict[str, Any]]
    notes: Callable[[Mapping[str, Mapping[int, dict[str, Any]]]], Sequence[str]] = lambda results: ()
    tidy: Callable[[Job], None] = lambda job: None
    choices: Mapping[str, str] = field(default_factory=dict)
    apart: Collection[str] = ()


def named(name: str) -> Study:
    """A study by its name."""
    if name not in STUDIES:
        raise UserError(f"unimed study {name}: no such study; known are {', '.join(STUDIES)}, interference")
    return importlib.import_module(STUDIES[name]).STUDY


def _quiet(done: int, total: int, what: str) -> None:
    pass


def run_study(
    study: Study,
    out: Path,
    seeds: int = 3,
    steps: int | None = None,
    jobs: int = 2,
    rows: Sequence[str] | None = None,
    progress: Progress = _quiet,
) -> dict[str, Any]:
    """Makes the runs that are missing, then the table of all that are there. Returns what table.json says."""
    for row in rows or ():
        if row not in study.rows:
            raise UserError(f"--rows {row}: no such row; {study.name} has {', '.join(study.rows)}")
    if seeds < 1 or jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    steps = steps or study.steps
    settings = {"study": study.name, "steps": steps}
    place = out / "study.json"
    if place.is_file():
        if (known := io.read_json(place)) != settings:
            raise UserError(f"{out}: holds the study {known['study']} of {known['steps']} steps, not {settings}; choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is no study; choose another --out")
    else:
        io.write_json(place, settings)
    _prepare(study, out, range(seeds), progress)
    _make(study, [Job(out, choice, CHOICE_SEED, steps) for choice in study.choices], jobs, progress)
    wanted = [Job(out, row, seed, steps) for seed in range(seeds) for row in study.rows if rows is None or row in rows]
    _make(study, wanted, jobs, progress)
    return write_table(study, out)


def _prepare(study: Study, out: Path, seeds: Sequence[int], progress: Progress) -> None:
    """Fills data/ once for these seeds; one that was interrupted is made again."""
    data = out / "data"
    if (data / DONE).is_file() and (data / DONE).read_text() == str(len(seeds)):
        return
    progress(0, 0, "making the data")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    study.prepare(data, seeds)
    (data / DONE).write_text(str(len(seeds)))


def _make(study: Study, wanted: Sequence[Job], most: int, progress: Progress) -> None:
    module = next(module for name, module in STUDIES.items() if name == study.name)
    waiting = [job for job in wanted if not (job.folder / "result.json").is_file()]
    done = len(wanted) - len(waiting)
    running: dict[subprocess.Popen, Job] = {}
    failed: list[str] = []
    here = threading.current_thread() is threading.main_thread()  # the only one that may say what a signal does
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)) if here else None
    try:
        while (waiting and not failed) or running:
            while waiting and not failed and len(running) < most:
                job = waiting.pop(0)
                job.folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", "unimed.studies.run", module, str(job.out), job.row, str(job.seed)]
                with (job.folder / "log.txt").open("ab") as log:
                    running[subprocess.Popen(command, stdout=log, stderr=log, env=_environment())] = job
            progress(done, len(wanted), ", ".join(f"{job.row} {job.seed}" for job in running.values()))
            time.sleep(0.2)
            for process in [one for one in running if one.poll() is not None]:
                job = running.pop(process)
                if process.returncode or not (job.folder / "result.json").is_file():
                    failed.append(f"{job.row}, seed {job.seed}: {_last_line(job.folder / 'log.txt')}")
                done += 1
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if here:
            signal.signal(signal.SIGTERM, before)
    progress(done, len(wanted), "")
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {failed[0]}; finished runs are kept, the same command goes on")


def _environment() -> dict[str, str]:
    """One thread a process: several runs share the machine. The parent's import path holds for its runs, too."""
    path = os.pathsep.join([one for one in sys.path if one] + [os.getcwd()])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return f"{lines[-1].strip()} ({log})" if lines else f"no message ({log})"


def work(module: str, out: Path, row: str, seed: int) -> None:
    """One run, in this process. Waits where another process is at it."""
    study: Study = importlib.import_module(module).STUDY
    job = Job(out, row, seed, io.read_json(out / "study.json")["steps"])
    with (job.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (job.folder / "result.json").is_file():
            start = time.perf_counter()
            result = study.run(job)
            result.setdefault("seconds", round(time.perf_counter() - start, 1))
            io.write_json(job.folder / "result.json", result)
            study.tidy(job)


# The table


def results_of(study: Study, out: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What finished runs gave, by row and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in study.rows:
        for path in sorted((out / "runs").glob(f"{row}-*/result.json")):
            seed = path.parent.name.removeprefix(f"{row}-")
            if seed.isdigit():
                found.setdefault(row, {})[int(seed)] = io.read_json(path)
    return {row: dict(sorted(seeds.items())) for row, seeds in found.items()}


def write_table(study: Study, out: Path) -> dict[str, Any]:
    """table.json, table.md and plot.png of the runs that are finished."""
    results = results_of(study, out)
    if not results:
        raise UserError(f"{out}: no finished run")
    columns = list(dict.fromkeys(name for seeds in results.values() for one in seeds.values() for name in one["scores"]))
    gains = _gains(study, results)
    table = {
        **io.read_json(out / "study.json"),
        "rows": dict(study.rows),
        "columns": columns,
        "results": {row: {str(seed): one for seed, one in seeds.items()} for row, seeds in results.items()},
        "gains": gains,
    }
    io.write_json(out / "table.json", table)
    io.write_text(out / "table.md", markdown(study, results, columns, gains))
    _plot(study, results, columns, out / "plot.png")
    return table


def gain(study: Study, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Of one result over another: by column the difference, and the gain in percent where the other one sees something in the image.

    A column has no gain in percent where the other one's score is 0, or not above its score on black images.
    """
    counted = [name for name in ours["scores"] if name in theirs["scores"] and name not in study.apart]
    differences = {name: ours["scores"][name] - theirs["scores"][name] for name in counted}
    floor = theirs.get("blank", {})
    seen = [name for name in counted if theirs["scores"][name] > max(floor.get(name, 0.0), 0.0)]
    percent = {name: 100 * differences[name] / theirs["scores"][name] for name in seen}
    return {
        "columns": percent,
        "mean": statistics.fmean(percent.values()) if percent else None,
        "differences": differences,
        "mean difference": statistics.fmean(differences.values()) if differences else None,
        "up": sum(value > 0 for value in differences.values()),
        "down": sum(value < 0 for value in differences.values()),
    }


def _gains(study: Study, results: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of a row over the one that it is compared with, for every seed that both have."""
    gains: dict[str, dict[str, Any]] = {}
    for row, other in study.against.items():
        for seed in sorted(set(results.get(row, {})) & set(results.get(other, {}))):
            found = gains.setdefault(row, {"against": other, "seeds": {}})
            found["seeds"][str(seed)] = gain(study, results[row][seed], results[other][seed])
    return gains


def markdown(study: Study, results: Mapping[str, Mapping[int, dict[str, Any]]], columns: Sequence[str], gains: Mapping[str, Any]) -> str:
    """The table: mean and every seed of each score, and the gain over the row that a row is compared with."""
    lines = [f"# {study.title}", "", *(f"- `{row}`: {study.rows[row]}" for row in results), ""]
    header = ["row", "seeds", *columns, "mean", *(["against", "gain, %", "gain, points", "up, down"] if gains else [])]
    lines += [f"| {' | '.join(header)} |", "|---|---|" + "---|" * (len(header) - 2)]
    for row, seeds in results.items():
        cells = [cell([one["scores"].get(name) for one in seeds.values()]) for name in columns]
        means = [_mean(study, one["scores"]) for one in seeds.values()]
        more = gain_cells(gains[row]["against"], list(gains[row]["seeds"].values())) if row in gains else [""] * 4 * bool(gains)
        lines.append(f"| {' | '.join([row, str(len(seeds)), *cells, cell(means), *more])} |")
    lines += ["", "Mean of the seeds, then every seed in its order."]
    if study.apart:
        lines[-1] += f" No mean and no gain counts {', '.join(study.apart)}."
    if gains:
        lines += [
            "",
            "The gain of a seed is the mean over the columns: in percent of the other row's score, and in points (hundredths of a score). "
            "Percent leaves out a column where the other row scores 0 or no more than on black images. "
            "Up and down count columns of all seeds with a higher and a lower score.",
        ]
    notes = list(study.notes(results))
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def gain_cells(other: str, each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The gains of all seeds as four cells of a table."""
    points = [None if one["mean difference"] is None else 100 * one["mean difference"] for one in each]
    return [
        other,
        cell([one["mean"] for one in each], "+.1f"),
        cell(points, "+.1f"),
        f"{sum(one['up'] for one in each)}, {sum(one['down'] for one in each)}",
    ]


def _mean(study: Study, scores: Mapping[str, float]) -> float | None:
    counted = [value for name, value in scores.items() if name not in study.apart]
    return statistics.fmean(counted) if counted else None


def cell(values: Sequence[float | None], form: str = ".3f") -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    return f"{statistics.fmean(there):{form}} ({', '.join('–' if value is None else f'{value:{form}}' for value in values)})"


def _plot(study: Study, results: Mapping[str, Mapping[int, dict[str, Any]]], columns: Sequence[str], path: Path) -> None:
    """A panel a column: every seed as a dot, the mean as a line."""
    from unimed.report.plots import MUTED, STYLE, TASK_COLOURS, plt

    with plt.rc_context({**STYLE, "figure.facecolor": "white"}):
        across = min(4, max(len(columns), 1))
        down = max(-(-len(columns) // across), 1)
        size = (3.1 * across, 0.6 + down * (0.7 + 0.22 * len(results)))
        figure, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, name in zip(axes.flat, columns, strict=False):
            for place, (row, seeds) in enumerate(results.items()):
                values = [one["scores"][name] for one in seeds.values() if name in one["scores"]]
                colour = TASK_COLOURS[list(study.rows).index(row) % len(TASK_COLOURS)]
                axis.plot(values, [place] * len(values), "o", color=colour, markersize=4, alpha=0.7)
                if values:
                    axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
            axis.set_title(name, loc="left")
            axis.set_yticks(range(len(results)), list(results), color=MUTED)
        axes.flat[0].invert_yaxis()
        for axis in list(axes.flat)[len(columns) :]:
            axis.set_visible(False)
        with io.beside(path) as partial:
            figure.savefig(partial, format="png", dpi=130)
        plt.close(figure)


# Disk


def disk(out: Path) -> int:
    """Bytes of all files of a study."""
    return sum(path.lstat().st_size for path in out.rglob("*") if path.is_file() and not path.is_symlink())


def clean(out: Path) -> int:
    """Deletes what finished runs need no more: their folders, the data and the start. Results, logs and tables stay. Returns the bytes."""
    if not (out / "study.json").is_file():
        raise UserError(f"{out}: no study; --clean deletes the models and data of one")
    before = disk(out)
    for job in sorted((out / "runs").glob("*")):
        if (job / "result.json").is_file():
            for path in job.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
    if not [job for job in (out / "runs").glob("*") if not (job / "result.json").is_file()]:
        for name in ("data", START):
            shutil.rmtree(out / name, ignore_errors=True)
    return before - disk(out)


if __name__ == "__main__":
    _module, _out, _row, _seed = sys.argv[1:]
    try:
        work(_module, Path(_out), _row, int(_seed))
    except UserError as error:
        print(json.dumps(str(error))[1:-1], file=sys.stderr)
        sys.exit(2)
