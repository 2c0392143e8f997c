"""Own data, from images and questions to a trained model and its answer.

    python examples/unimed_own_data.py

Draws twenty pictures, writes them with their questions as a LLaVA-style JSON, imports and checks them, trains a tiny model for some steps
and asks it. Your own images and JSON take the place of `write`. The same in five commands: docs/unimed/own_data.md.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import unimed
from unimed.datasets.load import load_set
from unimed.datasets.validate import check
from unimed.records.imports import import_rows
from unimed.train import recipe as recipes
from unimed.train.run import train

TINY = ("train.max_steps=20", "train.save_every=20", "train.log_every=10", "train.threads=1", "language.layers=1")


def write(folder: Path, count: int = 20) -> Path:
    """Pictures with a bright spot on one side, and the question which side."""
    (folder / "imgs").mkdir(parents=True)
    rows = []
    for number in range(count):
        side = ("left", "right")[number % 2]
        picture = np.random.default_rng(number).integers(20, 60, (64, 64), np.uint8)
        x = 12 if side == "left" else 40
        picture[26:38, x : x + 12] = 230
        Image.fromarray(picture).save(folder / "imgs" / f"{number}.png")
        said = [("human", "<image>\nOn which side is the nodule?"), ("gpt", side)]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": f"case{number}", "patient": f"p{number}", "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def main(folder: str = "own_data", *overrides: str) -> str:
    place = Path(folder)
    rows = write(place)

    # A folder of records, split by patient; a bad row would be counted and named.
    done = import_rows("llava", rows, place / "imgs", place / "mine", patient="patient")
    print(f"records by split: {done.records}")
    findings = check(place / "mine").findings
    print(f"findings: {list(findings) or 'none'}")

    # The questions that the tasks make of the records.
    question = load_set("mine", place / "mine", "records", "test")[0]
    print(f"{question.task}: {question.question} -> {question.answer}")

    # The recipe "tiny" with this data in place of its own.
    recipe = recipes.load("tiny", [f"data.sets.mine.root={place / 'mine'}", "name=mine", *TINY, *overrides])
    run = train(recipe, place / "runs" / "mine")

    answer = unimed.load(run).answer(place / "imgs" / "0.png", "On which side is the nodule?")
    print(f"answer: {answer.text} · {unimed.NOTICE}")
    return answer.text


if __name__ == "__main__":
    main(*sys.argv[1:])
