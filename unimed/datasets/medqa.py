"""MedQA (US): questions of medical examinations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimed.datasets.spec import DatasetSpec
from unimed.records import files
from unimed.records.policy import BadRecord
from unimed.records.record import QA, Record, made
from unimed.records.source import Source


def matches(folder: Path) -> bool:
    """questions/US/."""
    return (folder / "questions" / "US").is_dir()


def read(source: Source) -> Iterator[tuple[str, Record]]:
    """`questions/US/{train,dev,test}.jsonl`: question and answer; the options are read by the standard protocol only."""
    split = source.split
    path = source.folder / "questions" / "US" / f"{'dev' if split == 'val' else split}.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(files.read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with source.tally.record():
            row = files.parse_json(line, where)
            question = files.text(row, "question", where)
            context = source.rules.context
            options = _options(row, where) if context or len(str(row.get("answer") or "")) < 2 else {}
            answer = _answer(row, options, where)
            shown = tuple(files.cleaned(text, "options", where) for text in options.values()) if context else ()
            template, key = files.name(row.get("template") or "qa/medqa"), f"{split}/{number}"
            one = made(QA, where, question=question, answer=answer, options=shown, template=template, id=key)
            yield where, source.record(where, key, SPEC.name, annotations=(one,), source=SPEC.name)


def _options(row: dict[str, Any], where: str) -> dict[str, str]:
    """Letter and text of each option, from {"A": "text"} or from [{"key": "A", "value": "text"}]; {} where there are none."""
    options = row.get("options") or {}
    if isinstance(options, list):
        options = {files.field(one, "key", where): one.get("value") for one in options}
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise BadRecord("with wrong 'options'", f"{where}: options are {files.short(options)}, expected letters with their texts")
    return dict(sorted(options.items()))


def _answer(row: dict[str, Any], options: dict[str, str], where: str) -> str:
    """The text of the answer, also where a row has its letter only."""
    letter = row.get("answer", row.get("answer_idx"))
    if isinstance(letter, str) and letter in options and letter not in options.values():
        return files.cleaned(options[letter], "options", where)
    return files.text(row, "answer", where)


SPEC = DatasetSpec(
    name="medqa",
    title="MedQA (US)",
    files="MedQA (questions/US/*.jsonl)",
    matches=matches,
    read=read,
    tasks=("qa",),
    ratio={"qa": 2},
    licence="MIT (its repository)",
    citation="Jin et al., What disease does this patient have? A large-scale open domain question answering dataset, 2020",
    where="https://github.com/jind11/MedQA",
)
