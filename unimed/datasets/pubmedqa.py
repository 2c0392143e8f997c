"""PubMedQA: questions about abstracts, answered with yes, no or maybe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.datasets.spec import DatasetSpec
from unimed.errors import UserError
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import QA, Record, made
from unimed.records.source import Source


def _sets(folder: Path, split: str) -> Path:
    return folder / f"{'dev' if split == 'val' else split}_set.json"


def matches(folder: Path) -> bool:
    """ori_pqal.json (as published) or train_set.json, dev_set.json, test_set.json (as its script splits it)."""
    return (folder / "ori_pqal.json").is_file() or any(_sets(folder, split).is_file() for split in ("train", "val", "test"))


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """A dict of rows: question and yes / no / maybe; the abstracts are read by the standard protocol only.

    A split is `<split>_set.json`. Without it, the test split of ori_pqal.json is what test_ground_truth.json (or test_set.json) lists, and
    its training split is the rest.
    """
    path, chosen, held_out = _rows(source.folder, source.split)
    if path is None:
        return
    for key, row in files.read_json(path, dict).items():
        if key in held_out or (chosen is not None and key not in chosen):
            continue
        key = files.name(key)
        where = f"{path}: record {key}"
        with source.tally.record():
            question, answer = files.text(row, "QUESTION", where), files.text(row, "final_decision", where)
            context = " ".join(_contexts(row, where)) if source.rules.context else ""
            one = made(QA, where, question=question, answer=answer, context=context, template="qa/pubmedqa", id=key)
            yield where, source.record(where, key, SPEC.name, annotations=(one,), source=SPEC.name)


def _rows(folder: Path, split: str) -> tuple[Path | None, set[str] | None, set[str]]:
    """The file that holds a split, which of its rows belong to the split (None: all) and which do not."""
    if _sets(folder, split).is_file():
        return _sets(folder, split), None, set()
    whole = folder / "ori_pqal.json"
    if split not in ("train", "test") or not whole.is_file():
        return None, None, set()
    listed = next((path for path in (folder / "test_ground_truth.json", _sets(folder, "test")) if path.is_file()), None)
    if listed is None:
        raise UserError(f"{whole}: has no splits; put test_ground_truth.json of the PubMedQA repository beside it")
    test = set(files.read_json(listed, dict))
    if split == "test":
        return whole, test, set()
    return whole, None, test.union(files.read_json(_sets(folder, "val"), dict) if _sets(folder, "val").is_file() else ())


def _contexts(row: dict[str, Any], where: str) -> list[str]:
    contexts = row.get("CONTEXTS") or []
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise BadRecord("with wrong 'CONTEXTS'", f"{where}: CONTEXTS is {files.short(contexts)}, expected a list of texts")
    return [files.cleaned(text, "CONTEXTS", where) for text in contexts if text.strip()]


SPEC = DatasetSpec(
    name="pubmedqa",
    title="PubMedQA",
    files="PubMedQA (ori_pqal.json or <split>_set.json)",
    matches=matches,
    read=read,
    tasks=("qa",),
    ratio={"qa": 2},
    licence="MIT (its repository)",
    citation="Jin et al., PubMedQA: a dataset for biomedical research question answering, EMNLP 2019",
    where="https://github.com/pubmedqa/pubmedqa",
)
