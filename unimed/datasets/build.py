"""IMAX data at any size: `unimed data build-imax` with sources.

    1  every source's rows go into one SQLite file, in the order of the files; an interrupted source goes on behind its last row
    2  images are dealt to parts by the hash of their id; processes make the parts, each from its rows, and write them whole or not at all

Memory holds one part a process (PART images) and a batch of rows, whatever the number of images. A build that was killed goes on with the
same command: finished parts are kept, nothing is lost or doubled. Parts do not depend on the number of processes or machines: the same
bytes come out (`--ray` makes them as a Ray Data pipeline; the folder must then be seen by all machines).

    .OUT.building/   build.json  rows.sqlite  done/00000.json  out/       beside OUT until the build ends; out/ becomes OUT
    OUT/             dataset.json  records-00000.jsonl  parquet/records-00000.parquet  conflicts.jsonl  stats.json  pictures/
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from unimed import io
from unimed.datasets import imax
from unimed.datasets.entries import Counts
from unimed.datasets.imax import Given
from unimed.datasets.sources import SOURCES, tables
from unimed.datasets.sources.layouts import source_of
from unimed.datasets.sources.spec import Row, SourceSpec, load_row
from unimed.datasets.spec import DATASETS
from unimed.errors import UserError
from unimed.records import jsonl, parquet
from unimed.records.files import short
from unimed.records.imports import root_of
from unimed.records.policy import BadRecord, Rules, Tally

PART = 10_000  # images of a part, about
BATCH = 20_000  # rows written at a time
PICTURES = 8  # of measured widths, of the first parts' first images
Progress = Callable[[int, int, str], None]

_TABLES = """
create table if not exists sources (number integer primary key, rows integer, done integer, state text);
create table if not exists rows (
    source integer, number integer, image text, study text, file integer, value text, primary key (source, number)
) without rowid;
create table if not exists digests (source integer, number integer, digest text, primary key (source, number)) without rowid;
create table if not exists alias (source integer, id text, image text, primary key (source, id)) without rowid;
create table if not exists images (image text primary key, study text, source integer, part integer) without rowid;
"""
_INDEXES = """
create index if not exists of_image on rows (image);
create index if not exists of_study on rows (study) where study != '';
"""


@dataclass(frozen=True)
class Built:
    """The outcome. lines: what was left out, by source. conflicts: by kind. orphans: ids that no source has an image of, by source."""

    out: Path
    counts: Counts
    splits: dict[str, int]
    conflicts: dict[str, int]
    lines: list[str]
    orphans: dict[str, int]


def _quiet(done: int, total: int, what: str) -> None:
    pass


def spec_named(name: str) -> SourceSpec:
    """A source, or a layout as one."""
    if name in SOURCES:
        return SOURCES[name]
    if name in DATASETS:
        return source_of(DATASETS[name])
    known = [*SOURCES, *(layout for layout in DATASETS if layout not in SOURCES)]
    raise UserError(f"--source {name}=...: no such layout; known are {', '.join(known)}")


def sources_of(named: Sequence[tuple[str, Path]]) -> list[Given]:
    """The sources of a build: each folder must be of its layout. A layout that comes twice has a number behind its name."""
    given: list[Given] = []
    for name, folder in named:
        spec = spec_named(name)
        if not folder.is_dir():
            raise UserError(f"--source {name}={folder}: no such folder")
        if not spec.matches(folder):
            raise UserError(f"--source {name}={folder}: not a folder of {spec.files}")
        again = sum(one.spec.name == name for one in given)
        given.append(Given(spec, folder, name if not again else f"{name}-{again + 1}"))
    return given


def build(
    named: Sequence[tuple[str, Path]],
    out: Path,
    joins: Path | None = None,
    by: str = "id",
    strict: bool = False,
    jobs: int = 0,
    progress: Progress = _quiet,
    ray: bool = False,
) -> Built:
    """Writes `out` from sources. joins: a table (source, id, image) of ids that name the same image. by: "id", or "hash" for image files
    with the same bytes, whatever they are called. jobs: processes, 0 for one a core."""
    if by not in ("id", "hash"):
        raise UserError(f"--by {by}: images are joined by id or by hash")
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another folder, or delete it")
    given = sources_of(named)
    work = out.with_name(f".{out.name}.building")
    plan = {
        "sources": [[one.root, str(one.folder.resolve())] for one in given],
        "join": str(joins.resolve()) if joins else "",
        "by": by,
        "strict": strict,
        "name": out.name,
    }
    _claim(work, plan)
    _gather(work, given, joins, by, Rules(strict=strict), progress)
    parts = _deal(work)
    _make_parts(work, given, parts, strict, jobs, progress, ray)
    return _finish(work, out, given, parts, strict)


def _claim(work: Path, plan: dict[str, Any]) -> None:
    """The work folder of this very build: a new one, or one that was interrupted."""
    place = work / "build.json"
    if place.is_file():
        if io.read_json(place) != plan:
            raise UserError(f"{work}: an unfinished build of other sources; finish it with its own command, or delete this folder")
        return
    for name in ("done", "out/parquet"):
        (work / name).mkdir(parents=True, exist_ok=True)
    io.write_json(place, plan)


def _connect(work: Path, read_only: bool = False) -> sqlite3.Connection:
    path = work / "rows.sqlite"
    return sqlite3.connect(f"file:{path}?mode=ro" if read_only else path, uri=read_only)


# Step 1: rows


def _gather(work: Path, given: Sequence[Given], joins: Path | None, by: str, rules: Rules, progress: Progress) -> None:
    with closing(_connect(work)) as base:
        base.executescript(_TABLES)
        for number, source in enumerate(given):
            found = base.execute("select rows, done from sources where number = ?", (number,)).fetchone()
            before, done = found or (0, 0)
            if done:
                continue
            tally = Tally(source.root, source.folder, "all", rules)
            rows = source.spec.read(source.folder, tally)
            stored = before
            for batch in _batches(itertools.islice(enumerate(rows), before, None)):
                _store(base, number, source, batch, by)
                stored += len(batch)
                base.execute("insert or replace into sources values (?, ?, 0, '')", (number, stored))
                base.commit()
                progress(stored, 0, f"reading {source.root}")
            base.execute("insert or replace into sources values (?, ?, 1, ?)", (number, stored, json.dumps(tally.state())))
            base.commit()
            if not stored:
                raise UserError(f"{source.folder}: no row can be used: {tally.line() or 'its files hold none'}")
        progress(0, 0, "joining ids")
        if not base.execute("select 1 from images limit 1").fetchone():
            _join_ids(base, given, joins, by, rules)
        base.executescript(_INDEXES)


def _batches(rows: Iterator[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    while batch := list(itertools.islice(rows, BATCH)):
        yield batch


def _store(base: sqlite3.Connection, number: int, source: Given, batch: Sequence[tuple[int, Row]], by: str) -> None:
    rows = [(number, at, row.image, "" if row.image else row.study, bool(row.file), row.dump()) for at, row in batch]
    base.executemany("insert or replace into rows values (?, ?, ?, ?, ?, ?)", rows)
    if by == "hash":
        files = [(at, source.folder / row.file) for at, row in batch if row.file]
        digests = [(number, at, io.sha256(path)) for at, path in files if path.is_file()]  # a missing one is named later
        base.executemany("insert or replace into digests values (?, ?, ?)", digests)


def _join_ids(base: sqlite3.Connection, given: Sequence[Given], joins: Path | None, by: str, rules: Rules) -> None:
    """Brings the ids of one image together, by the table and by the bytes of the files, and lists the images. All of it, or nothing."""
    if joins is not None:
        names = {one.root: number for number, one in enumerate(given)}
        for where, cells in tables.rows(joins, ("source", "id", "image"), Tally("join", joins.parent, "all", Rules(strict=True))):
            if cells["source"] not in names:
                raise UserError(f"{where}: source {short(cells['source'])} is none of this build's: {', '.join(names)}")
            base.execute("insert or replace into alias values (?, ?, ?)", (names[cells["source"]], cells["id"], cells["image"]))
        _rename(base, "a.source = rows.source")
    if by == "hash":  # the id that a file of the same bytes had first stands for it, in every source
        base.execute("delete from alias")
        first: dict[str, str] = {}
        for key, digest in base.execute(
            "select r.image, d.digest from digests d join rows r on r.source = d.source and r.number = d.number order by d.source, d.number"
        ):
            if first.setdefault(digest, key) != key:
                base.execute("insert or replace into alias values (-1, ?, ?)", (key, first[digest]))
        _rename(base, "a.source = -1")
    with_file = "select image, coalesce(json_extract(value, '$.study'), '') as study, source from rows where file and image != ''"
    base.execute(f"insert or ignore into images select image, study, source, null from ({with_file} order by source, number)")
    again = "group by source, image having count(*) > 1 order by source, number"
    twice = f"select source, min(number) as number, value, count(*) from rows where file {again}"
    for number, _, value, count in base.execute(twice).fetchall() if by == "id" else ():
        row, tally = load_row(value), Tally(given[number].root, given[number].folder, "all", rules)
        tally.add(json.loads(base.execute("select state from sources where number = ?", (number,)).fetchone()[0]))
        for _ in range(count - 1):
            what = f"{row.where}: the image {row.image!r} has {count} rows with a file; the first is kept"
            tally.mend(BadRecord("with an id given twice", what))
        base.execute("update sources set state = ? where number = ?", (json.dumps(tally.state()), number))
    base.commit()


def _rename(base: sqlite3.Connection, whose: str) -> None:
    named = f"(select a.image from alias a where {whose} and a.id = rows.image)"
    base.execute(f"update rows set image = {named} where image != '' and {named} is not null")


# Step 2: parts


def _deal(work: Path) -> int:
    """Deals the images to parts; the number of parts."""
    with closing(_connect(work)) as base:
        images = base.execute("select count(*) from images").fetchone()[0]
        parts = max(-(-images // PART), 1)
        if base.execute("select 1 from images where part is null limit 1").fetchone():
            base.create_function("part", 1, lambda key: imax.hashed(key) % parts, deterministic=True)
            base.execute("update images set part = part(image)")
            base.executescript(
                "create index if not exists of_part on images (part, image); create index if not exists by_study on images (study);"
            )
            base.commit()
    return parts


def _make_parts(work: Path, given: Sequence[Given], parts: int, strict: bool, jobs: int, progress: Progress, ray: bool) -> None:
    named = [(one.spec.name, one.folder) for one in given]
    missing = [part for part in range(parts) if not (work / "done" / f"{part:05d}.json").is_file()]
    if ray:
        _with_ray(work, named, missing, strict, jobs)
        return
    jobs = min(jobs or os.cpu_count() or 1, len(missing))
    if jobs <= 1:
        for done, part in enumerate(missing):
            progress(parts - len(missing) + done, parts, "making records")
            make_part(work, named, part, strict)
    else:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(make_part, work, named, part, strict) for part in missing]
            try:
                for done, one in enumerate(as_completed(waiting)):
                    one.result()
                    progress(parts - len(missing) + done + 1, parts, "making records")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    progress(parts, parts, "making records")


def _with_ray(work: Path, named: list[tuple[str, Path]], missing: list[int], strict: bool, jobs: int) -> None:
    """The parts as a Ray Data pipeline: on the cluster of RAY_ADDRESS or of an earlier ray.init, else on this machine."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--ray: the package ray is not installed; get it with: pip install 'cmoe-kernels[ray]'") from error

    if not ray.is_initialized():
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs or None, "include_dashboard": False}
        ray.init(**local)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        make_part(work, named, int(row["part"]), strict)
        return row

    rows = ray.data.from_items([{"part": part} for part in missing], override_num_blocks=max(len(missing), 1))
    made = {int(row["part"]) for row in rows.map(make).take_all()} if missing else set()
    if made != set(missing):
        raise UserError(f"ray made {len(made)} of {len(missing)} parts; run the same command again")


def make_part(work: Path, named: Sequence[tuple[str, Path]], part: int, strict: bool) -> None:
    """Writes the records of one part, its parquet file, then what is to be told of it."""
    given = sources_of(named)
    rules = Rules(strict=strict)
    tallies = {number: Tally(one.root, one.folder, "all", rules) for number, one in enumerate(given)}
    plan = io.read_json(work / "build.json")
    name = plan["name"]
    lines: list[str] = []
    table: list[dict[str, Any]] = []
    conflicts: list[dict[str, Any]] = []
    counts = Counts()
    splits: Counter[str] = Counter()
    patients: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    drawn = 0
    with closing(_connect(work, read_only=True)) as base:
        for key, rows in _images_of(base, part):
            joined = imax.join(key, rows, given, tallies, name)
            if joined is None:
                continue
            record = joined.record
            text = jsonl.line(record)
            lines.append(text)
            counts.add(record)
            splits[record.split] += 1
            if record.patient:
                patients.setdefault(record.patient, record.split)
                if patients[record.patient] != record.split:
                    what = f"patient {record.patient}: {patients[record.patient]} and {record.split}"
                    conflicts.append(imax.Conflict("a patient in several splits", key, what, ()).as_json())
            for _, row in rows:
                for label_set, listed in row.values.get("classes", {}).items():
                    classes.setdefault(label_set, listed)
            conflicts += [one.as_json() for one in joined.conflicts]
            table.append(parquet.columns(record, text))
            if joined.picture is not None and part == 0 and drawn < PICTURES:
                drawn += 1
                _draw(joined.picture, work / "out" / "pictures" / f"{drawn}.png")
    parquet.write(work / "out" / "parquet" / f"records-{part:05d}.parquet", table)
    io.write_bytes(work / "out" / f"records-{part:05d}.jsonl", "".join(lines).encode())
    told = {
        "tallies": {str(number): tally.state() for number, tally in tallies.items()},
        "conflicts": conflicts,
        "splits": dict(splits),
        "patients": patients,
        "classes": classes,
        "counts": counts.dump(),
    }
    io.write_json(work / "done" / f"{part:05d}.json", told)


def _images_of(base: sqlite3.Connection, part: int) -> Iterator[tuple[str, list[tuple[int, Row]]]]:
    """Ids of a part in their order, each with its rows: its own, and those of its study."""
    own = "select i.image, r.source, r.number, r.value from images i join rows r on r.image = i.image where i.part = :part"
    study = (
        "select i.image, r.source, r.number, r.value from images i join rows r on r.study = i.study "
        "where i.part = :part and r.study != '' and r.image = ''"
    )
    found = base.execute(f"{own} union all {study} order by 1, 2, 3", {"part": part})
    for key, rows in itertools.groupby(found, key=lambda row: row[0]):
        yield key, [(source, load_row(value)) for _, source, _, value in rows]


def _draw(picture: Callable[[], Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with io.beside(path) as partial:
        picture().save(partial, "PNG")


# The end


def _finish(work: Path, out: Path, given: Sequence[Given], parts: int, strict: bool) -> Built:
    """What all parts tell, then out/ becomes OUT."""
    rules = Rules()  # with strict, the first fault stopped the build
    tallies = [Tally(one.root, one.folder, "all", rules) for one in given]
    with closing(_connect(work)) as base:
        for number, state in base.execute("select number, state from sources"):
            tallies[number].add(json.loads(state))
        orphans = _orphans(base, given)
    counts = Counts()
    splits: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    classes: dict[str, list[str]] = {name: list(some) for one in given for name, some in one.spec.classes.items()}
    patients: dict[str, str] = {}

    def conflicts() -> Iterable[dict[str, Any]]:
        for part in range(parts):
            told = io.read_json(work / "done" / f"{part:05d}.json")
            for number, state in told["tallies"].items():
                tallies[int(number)].add(state)
            counts.merge(told["counts"])
            splits.update(told["splits"])
            for name, some in told["classes"].items():
                classes.setdefault(name, some)
            yield from told["conflicts"]
            for patient, split in told["patients"].items():
                if patients.setdefault(patient, split) != split:
                    what = f"patient {patient}: {patients[patient]} and {split}"
                    yield imax.Conflict("a patient in several splits", "", what, ()).as_json()

    final = work / "out"
    for partial in final.rglob(".*"):  # what a killed process was writing
        partial.unlink()
    with io.beside(final / "conflicts.jsonl") as partial, partial.open("wb") as file:
        for one in conflicts():
            kinds[one["kind"]] += 1
            file.write(io.json_line(one).encode())
    if not counts.images:
        raise UserError(f"{work}: no source brings an image: {'; '.join(line for tally in tallies if (line := tally.line()))}")
    lines = [line for tally in tallies if (line := tally.line())]
    citations = "; ".join(dict.fromkeys(one.spec.citation for one in given))
    licences = "; ".join(dict.fromkeys(one.spec.licence for one in given))
    info = jsonl.DatasetInfo(
        name=out.name, licence=licences, citation=citations, roots={one.root: root_of(one.folder, out) for one in given},
        classes=classes, made_by=f"unimed data build-imax {' '.join(f'--source {one.root}' for one in given)}",
    )  # fmt: skip
    io.write_json(final / jsonl.DATASET_FILE, info.model_dump())
    io.write_json(final / "stats.json", {**counts.as_json(), "splits": dict(splits), "conflicts": dict(kinds), "left out": lines})
    io.place_folder(final, out)
    shutil.rmtree(work)
    return Built(out, counts, dict(splits), dict(kinds), lines, orphans)


def _orphans(base: sqlite3.Connection, given: Sequence[Given]) -> dict[str, int]:
    """Rows by source whose image or study no source brings."""
    found = {}
    for number, source in enumerate(given):
        query = (
            "select count(*) from rows r where r.source = ? and not exists (select 1 from images i where i.image = r.image) "
            "and not exists (select 1 from images i where r.study != '' and i.study = r.study)"
        )
        lost = base.execute(query, (number,)).fetchone()[0]
        if lost:
            found[source.root] = lost
    return found
