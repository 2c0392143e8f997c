"""A study whose runs take no time: the score is the seed and the place of the row. One row fails until it is mended."""

import os
import time
from pathlib import Path

from unimed.errors import UserError
from unimed.studies.run import Study


def prepare(data, seeds):
    (data / "numbers.txt").write_text(f"{len(seeds)}")


def run(job):
    with (job.out / "started.txt").open("a") as file:
        file.write(f"{job.row}-{job.seed} {os.getpid()}\n")
    if job.row == "broken" and not (job.out / "mended").exists():
        raise UserError("this row is broken")
    if job.row == "slow":
        (job.folder / "kept").mkdir(exist_ok=True)
        (job.folder / "kept" / "half").write_text("half")
        until = time.monotonic() + 60
        while not (job.out / "go on").exists() and time.monotonic() < until:
            time.sleep(0.01)
    value = 0.1 * (1 + list(STUDY.rows).index(job.row)) + 0.01 * job.seed
    return {"scores": {"vqa": value, "refer": value / 2}, "read": (job.data / "numbers.txt").read_text(), "steps": job.steps}


STUDY = Study(
    name="toy",
    title="A toy",
    rows={"plain": "the first", "other": "the second", "broken": "fails", "slow": "waits"},
    against={"other": "plain"},
    steps=7,
    prepare=prepare,
    run=run,
    notes=lambda results: [f"{len(results)} rows."],
)
FOLDER = str(Path(__file__).parent)
