"""DMAX, the decentralised twin of an image-centric set: as many entries of every task, from images that have one task each (or a few).

Every split is matched by itself. Images come from a pool, in an order that the seed decides; each gives its entries of at most
`tasks_per_image` tasks. Images are chosen so that the labels of a task (entries.labels) keep their shares. What was asked is checked before
anything is written: the counts of every task are equal, the total variation of its labels is at most 0.05, and the images have as many
tasks as asked. A pool that cannot give that ends in one line which says why. The records of both sets are held in memory.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimed import io
from unimed.datasets.entries import Counts, entries, labels, variation
from unimed.errors import UserError
from unimed.records import jsonl
from unimed.records.record import QA, SPLITS, Annotation, BoxOf, Label, Record
from unimed.tasks import TASKS

FARTHEST = 0.05
ATTEMPTS = 20  # orders of the tasks that are tried
SEEN = 48  # images that are compared before one is taken
SWAPS = 40  # tries an image to bring the labels of a task nearer


@dataclass(frozen=True)
class Twin:
    """The outcome. variation: of the labels, by split and task. images: distinct ones, ours and the twin's."""

    out: Path
    counts: Counts
    variation: dict[str, dict[str, float]]
    images: dict[str, int]
    leaks: dict[str, int]


@dataclass(frozen=True)
class _Offer:
    """What an image has of a task: places of the annotations in its record, and their labels."""

    places: tuple[int, ...]
    labels: tuple[tuple[str, ...], ...]


def build_dmax(imax: Path, out: Path, pool: Path | None = None, tasks_per_image: int = 1, seed: int = 0) -> Twin:
    """Writes the twin of `imax` to `out`, from the images of `pool` (by default its own)."""
    pool = pool or imax
    for folder in (imax, pool):
        if not jsonl.is_records(folder):
            raise UserError(f"{folder}: no folder of records; make one with: unimed data build-imax")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder, or delete it")
    if tasks_per_image < 1:
        raise UserError(f"--tasks-per-image {tasks_per_image}: must be at least 1")
    ours, theirs = _of_images(imax), _of_images(pool)
    chosen: list[Record] = []
    distances: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        wanted = [one for one in ours if one.split == split]
        if not wanted:
            continue
        offered = [one for one in theirs if one.split == split]
        found = match(wanted, offered, tasks_per_image, seed, split)
        distances[split] = check(wanted, found, tasks_per_image, split)
        chosen += found
    leaks = leakage(chosen)
    if leaks["patients in several splits"] and not leakage(ours)["patients in several splits"]:
        raise UserError(f"{pool}: {leaks['patients in several splits']} patients would be in several splits, none is in {imax}")
    counts = Counts()
    for one in chosen:
        counts.add(one)
    info, pool_info = jsonl.read_info(imax), jsonl.read_info(pool)
    own = "pool"  # the root for images in the pool's folder
    while own in pool_info.roots:
        own += "-"
    said = pool_info.model_copy(
        update={
            "name": out.name,
            "roots": {name: _root(pool, folder, out) for name, folder in {**pool_info.roots, own: "."}.items()},
            "classes": {**info.classes, **pool_info.classes},
            "made_by": f"unimed data build-dmax --tasks-per-image {tasks_per_image} --seed {seed}",
        }
    )
    images = {"imax": len({ref for one in ours for ref in one.images}), "dmax": len({ref for one in chosen for ref in one.images})}
    facts = {
        "seed": seed,
        "tasks per image": tasks_per_image,
        "variation of labels": distances,
        "distinct images": images,
        "leakage": leaks,
    }

    def records(place: Path) -> Iterator[Record]:
        yield from (_rooted(one, own) for one in chosen)
        io.write_json(place / "dmax.json", {**facts, **counts.as_json()})

    jsonl.write(out, said, records)
    return Twin(out, counts, distances, images, leaks)


def _of_images(folder: Path) -> list[Record]:
    """The records with one image each: a record of several is parted."""
    found = []
    for _, record in jsonl.read_records(folder):
        for number, ref in enumerate(record.images):
            some = tuple(one.model_copy(update={"image": 0}) for one in record.annotations if one.image == number)
            key = record.id if len(record.images) == 1 else f"{record.id}#{number}"
            found.append(record.model_copy(update={"id": key, "images": (ref,), "annotations": some}))
    return found


def _root(pool: Path, folder: str, out: Path) -> str:
    from unimed.records.imports import root_of

    return root_of(pool / folder, out)


def _rooted(record: Record, own: str) -> Record:
    """With its image's path under a root, where it was relative to the pool's folder."""
    images = tuple(ref if ":" in ref.path else ref.model_copy(update={"path": f"{own}:{ref.path}"}) for ref in record.images)
    return record.model_copy(update={"images": images})


def wants(records: Iterable[Record]) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Entries and labels of every task."""
    counts = Counts()
    for one in records:
        counts.add(one)
    return counts.tasks, counts.labels


def match(wanted: Sequence[Record], offered: Sequence[Record], tasks_per_image: int, seed: int, split: str = "") -> list[Record]:
    """Records out of `offered` with as many entries of every task as `wanted` has, each of at most `tasks_per_image` tasks.

    The tasks choose their images one after another. Where that does not come out, they choose in another order, a few times; the result
    is then the nearest one, and `check` says what is wrong with it.
    """
    goal, shares = wants(wanted)
    needed = {task: sum(any(found == task for found, _, _ in entries(one)) for one in wanted) for task in goal}
    best: tuple[float, list[Record]] | None = None
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{seed}/{split}/{attempt}")
        found = _once(goal, shares, needed, _offers(offered), tasks_per_image, attempt, rng)
        records = [part_of(offered[at], tasks) for at, tasks in sorted(found.items())]
        have, ours = wants(records)
        short = sum(max(goal[task] - have[task], 0) for task in goal)
        worst = max(variation(shares[task], ours[task]) for task in goal)
        each = sum(map(len, found.values()))
        apart = abs(len(records) * tasks_per_image / each - 1) if each else 0.0
        distance = short + max(worst, FARTHEST) + apart
        if best is None or distance < best[0]:
            best = distance, records
        if not short and worst <= FARTHEST and distance <= 2 * FARTHEST:
            break
    assert best is not None
    return best[1]


def _offers(offered: Sequence[Record]) -> dict[str, dict[int, _Offer]]:
    """Task -> place of a record -> what it has of the task."""
    offers: dict[str, dict[int, _Offer]] = defaultdict(dict)
    for at, record in enumerate(offered):
        by_task: dict[str, list[int]] = defaultdict(list)
        for task, _, number in entries(record):
            by_task[task].append(number)
        for task, places in by_task.items():
            offers[task][at] = _Offer(tuple(places), tuple(tuple(labels(record.annotations[place], task)) for place in places))
    return offers


def _once(
    goal: Counter[str],
    shares: dict[str, Counter[str]],
    needed: dict[str, int],
    offers: dict[str, dict[int, _Offer]],
    tasks_per_image: int,
    attempt: int,
    rng: random.Random,
) -> dict[int, dict[str, list[int]]]:
    """One try: annotations by record and task. With several tasks an image, only as many images are open as can be filled."""
    room = dict.fromkeys(sorted({at for found in offers.values() for at in found}), tasks_per_image)
    if tasks_per_image > 1:
        rich = [at for at in room if sum(at in offers[task] for task in goal) >= tasks_per_image]
        rng.shuffle(rich)
        most = math.ceil(sum(needed.values()) / tasks_per_image * (1 + 5 * FARTHEST * attempt / ATTEMPTS))
        room = dict.fromkeys(rich[:most], tasks_per_image)
    given: dict[int, dict[str, list[int]]] = defaultdict(dict)

    def spare(task: str) -> float:
        """Images that are free for a task, for one that it needs."""
        return sum(room.get(at, 0) > 0 for at in offers[task]) / needed[task]

    left = sorted(goal)
    rng.shuffle(left)
    while left:
        task = left.pop(0) if attempt % 2 else min(left, key=spare)
        if task in left:
            left.remove(task)
        free = {at: one for at, one in offers[task].items() if room.get(at, 0) > 0}
        for at, places in _take(free, room, goal[task], shares[task], rng).items():
            given[at][task] = places
            room[at] -= 1
    return {at: tasks for at, tasks in given.items() if tasks}


def _take(free: dict[int, _Offer], room: dict[int, int], count: int, shares: Counter[str], rng: random.Random) -> dict[int, list[int]]:
    """`count` annotations by record. Of SEEN images at a time, the one that brings the labels nearest to `shares` gives its entries."""
    left = Counter(shares)
    order = list(free)
    rng.shuffle(order)
    order.sort(key=lambda at: room[at])  # the emptiest images come last, and are taken first
    found: dict[int, tuple[int, ...]] = {}
    missing = count
    while order and missing:
        seen = range(max(len(order) - SEEN, 0), len(order))
        best = min(seen, key=lambda i: _gain(free[order[i]], left, missing))
        at = order[best]
        order[best] = order[-1]
        order.pop()
        found[at] = _wanted(free[at], left, missing)
        missing -= len(found[at])
        left.subtract(name for place in found[at] for name in free[at].labels[place])
    _swap(free, found, order, left, shares.total(), rng)
    return {at: [free[at].places[place] for place in places] for at, places in found.items()}


def _wanted(one: _Offer, left: Counter[str], most: int) -> tuple[int, ...]:
    """Places of an image's entries: those whose labels are wanted most, in their order."""
    ranked = sorted(range(len(one.places)), key=lambda place: (-min(left[name] for name in one.labels[place]), place))
    return tuple(sorted(ranked[:most]))


def _gain(one: _Offer, left: Counter[str], most: int) -> int:
    """How much farther the labels are when an image gives its entries; below zero is nearer."""
    places = _wanted(one, left, most)
    steps = Counter(name for place in places for name in one.labels[place])
    return sum(abs(left[name] - step) - abs(left[name]) for name, step in steps.items())


def _swap(
    free: dict[int, _Offer], found: dict[int, tuple[int, ...]], others: list[int], left: Counter[str], total: int, rng: random.Random
) -> None:
    """Exchanges images, and entries within an image, while that brings the labels nearer."""
    distance = sum(map(abs, left.values()))
    inside = sorted(found)
    for _ in range(SWAPS * len(inside)):
        if distance <= FARTHEST * total:  # half of what is allowed
            return
        i = rng.randrange(len(inside))
        gone = inside[i]
        back = Counter(name for place in found[gone] for name in free[gone].labels[place])
        open_ = left + Counter()  # a copy; negative counts are put back below
        open_.update({name: value for name, value in left.items() if value < 0})
        open_.update(back)
        j = rng.randrange(-1, len(others))
        come = gone if j < 0 else others[j]
        if len(free[come].places) < len(found[gone]):
            continue
        places = _wanted(free[come], open_, len(found[gone]))
        after = Counter(open_)
        after.subtract(name for place in places for name in free[come].labels[place])
        if (now := sum(map(abs, after.values()))) < distance:
            distance = now
            left.clear()
            left.update(after)
            del found[gone]
            found[come] = places
            if come != gone:
                inside[i], others[j] = come, gone


def part_of(record: Record, tasks: dict[str, list[int]]) -> Record:
    """The record with its chosen entries only. An annotation of several tasks names the one that it is kept for."""
    some: list[Annotation] = []
    for task, places in sorted(tasks.items()):
        for place in places:
            one = record.annotations[place]
            several = isinstance(one, BoxOf | Label | QA) and not one.task and len(_takers(one)) > 1
            key = {"id": f"{record.id}/{place}"} if not one.id else {}
            some.append(one.model_copy(update={**key, **({"task": task} if several else {})}))
    return record.model_copy(update={"annotations": tuple(some)})


def _takers(one: Annotation) -> list[str]:
    return [tag for tag, task in TASKS.items() if task.needs_image and task.takes(one)]


def check(wanted: Sequence[Record], found: Sequence[Record], tasks_per_image: int, split: str) -> dict[str, float]:
    """The variation of the labels of every task; a UserError where the twin is not what was asked for."""
    goal, shares = wants(wanted)
    have, ours = wants(found)
    for task, count in goal.items():
        if have[task] != count:
            what = f"{count:,} {task} entries are wanted in the {split!r} split, the pool's images give {have[task]:,}"
            raise UserError(f"build-dmax: {what} beside the other tasks; give a larger --pool, or more --tasks-per-image")
    distances = {task: variation(shares[task], ours[task]) for task in goal}
    worst = max(distances, key=lambda task: distances[task])
    if distances[worst] > FARTHEST:
        what = f"the labels of {worst} in the {split!r} split differ by {distances[worst]:.3f} (total variation)"
        raise UserError(f"build-dmax: {what}, at most {FARTHEST} is allowed; give a larger --pool, or another --seed")
    counts = Counts()
    for one in found:
        counts.add(one)
    if abs(counts.tasks_per_image - tasks_per_image) > FARTHEST * tasks_per_image or max(counts.of_images) > tasks_per_image:
        what = f"the images of the {split!r} split have {counts.tasks_per_image:.2f} tasks, {tasks_per_image} were asked for"
        raise UserError(f"build-dmax: {what}; the pool's images have too few tasks each")
    return distances


def leakage(records: Sequence[Record]) -> dict[str, int]:
    """Patients and images in several splits."""
    patients: dict[str, set[str]] = defaultdict(set)
    images: dict[Any, set[str]] = defaultdict(set)
    for one in records:
        if one.patient:
            patients[one.patient].add(one.split)
        for ref in one.images:
            images[ref].add(one.split)
    return {
        "patients in several splits": sum(len(splits) > 1 for splits in patients.values()),
        "images in several splits": sum(len(splits) > 1 for splits in images.values()),
    }
