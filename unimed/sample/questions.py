"""Questions, answers and findings text, all derived from masks and tags. The text is synthetic; the images are real."""

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from unimed.records.record import QA, SPLITS, Split
from unimed.sample.masks import ORGANS
from unimed.sample.slices import Slice

MODALITY = {"CT": "CT", "MR": "MRI"}
SIDED = ("liver", "spleen", "stomach", "right kidney", "left kidney")
ANATOMY = Path(__file__).with_name("assets") / "anatomy.json"
PRESENCE_CAP = 60  # questions per organ and answer in one split


def vqa(slices: Sequence[Slice], names: Sequence[str], rng: random.Random) -> dict[str, list[QA]]:
    """Questions per slice id, for the slices of one split.

    Presence is asked equally often with "yes" and with "no" for every structure, so its name alone does not tell. A structure that is on
    the slice but too small for a box is not asked about.
    """
    asked: dict[str, list[QA]] = {}
    presence = _balanced_presence(slices, names, rng)
    for shown in slices:
        records = [
            _asked("modality", "OPEN", "Which modality is this image?", MODALITY[shown.modality]),
            _asked("plane", "OPEN", "Which plane is this image?", shown.plane),
        ]
        records += [_asked(f"presence/{name}", "CLOSED", f"Is the {name} in the image?", answer) for name, answer in presence[shown.id]]
        if shown.body_side:
            records.append(_asked("side/body", "CLOSED", "Is this slice from the left or the right side of the body?", shown.body_side))
        sided = [found for found in shown.findings if found.name in SIDED and found.name in names and shown.plane != "sagittal"]
        if sided:
            found = rng.choice(sided)
            centre = (found.xyxy[0] + found.xyxy[2]) / 2
            answer = "left" if centre < shown.image.width / 2 else "right"
            records.append(_asked(f"side/{found.name}", "CLOSED", f"Is the {found.name} on the left or the right of the image?", answer))
        organs = [found for found in shown.findings if found.name in ORGANS]
        if organs:
            largest = max(organs, key=lambda found: found.area_mm2)
            records.append(_asked("largest", "OPEN", "What is the largest organ in the image?", largest.name))
        asked[shown.id] = records
    return asked


def _asked(kind: str, answer_type: Literal["OPEN", "CLOSED"], question: str, answer: str) -> QA:
    return QA(question=question, answer=answer, answer_type=answer_type, template=f"vqa/{kind}")


def _balanced_presence(slices: Sequence[Slice], names: Sequence[str], rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        there = [shown.id for shown in slices if shown.finding(name)]
        absent = [shown.id for shown in slices if name not in shown.present]
        count = min(len(there), len(absent), PRESENCE_CAP)
        for answer, ids in (("yes", there), ("no", absent)):
            for chosen in sorted(rng.sample(ids, count)):
                asked[chosen].append((name, answer))
    return asked


def report(shown: Slice) -> str:
    """Findings of one slice in two to four short sentences, in a fixed order. What is there but too small for a box is never denied."""
    names = [found.name for found in shown.findings]
    organs = [name for name in names if name in ORGANS and not name.endswith(("kidney", "lung"))]
    sentences = [f"{shown.plane.capitalize()} {MODALITY[shown.modality]} of the abdomen."]
    if organs:
        sentences.append(f"The {join(organs)} {'is' if len(organs) == 1 else 'are'} visible.")
    kidneys = [name for name in names if name.endswith("kidney")]
    if kidneys:
        sentences.append("Both kidneys are visible." if len(kidneys) == 2 else f"The {kidneys[0]} is visible.")
    elif not any(name.endswith("kidney") for name in shown.present):
        sentences.append("No kidney is visible.")
    sized = [found for found in shown.findings if found.name in ORGANS]
    if sized:
        sentences.append(f"The largest organ is the {max(sized, key=lambda found: found.area_mm2).name}.")
    elif not shown.present.intersection(ORGANS):
        sentences.append("No large organ is visible.")
    return " ".join(sentences)


def join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def text_qa() -> dict[Split, list[QA]]:
    """Text questions by split from the anatomy table.

    Held out are phrasings, not facts: "val" and "test" ask every fact once in a wording that training never shows. Nobody can know an
    unseen fact.
    """
    anatomy = json.loads(ANATOMY.read_text())
    columns = {"system": 1, "region": 2, "side": 3}
    asked: dict[Split, list[QA]] = {split: [] for split in SPLITS}
    for table, phrasings in anatomy["tables"].items():
        column = columns[table]
        options = tuple(sorted({fact[column] for fact in anatomy["facts"]}))
        for split, forms in phrasings.items():
            for fact in anatomy["facts"]:
                for form in forms:
                    question = form.format(name=fact[0])
                    asked[split].append(QA(question=question, answer=fact[column], options=options, template=f"qa/{table}"))
    return asked
