"""Text-only questions: MedQA (US) and PubMedQA."""

from pathlib import Path
from typing import Any

from unimed.errors import UserError
from unimed.records import files as records
from unimed.records.example import Example
from unimed.records.policy import BadRecord, Tally
from unimed.tasks.protocol import PROTOCOLS

MEDQA, PUBMEDQA = "medqa", "pubmedqa"


def is_medqa(folder: Path) -> bool:
    """questions/US/."""
    return (folder / "questions" / "US").is_dir()


def read_medqa(tally: Tally) -> list[Example]:
    """`questions/US/{train,dev,test}.jsonl`: question and answer; the options follow the question by the standard protocol only."""
    split = tally.split
    path = tally.folder / "questions" / "US" / f"{'dev' if split == 'val' else split}.jsonl"
    if not path.is_file():
        return []
    dataset = tally.folder_name or MEDQA
    examples = []
    for number, line in enumerate(records.read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        with tally.record():
            row = records.parse_json(line, where)
            question = records.text(row, "question", where, tally)
            context = PROTOCOLS[tally.rules.protocol].context
            options = _options(row, where) if context or len(str(row.get("answer") or "")) < 2 else {}
            answer = _answer(row, options, where, tally)
            if context:
                question += "".join(f" ({letter}) {records.cleaned(text, 'options', where, tally)}" for letter, text in options.items())
            template, key = records.name(row.get("template") or "qa/medqa"), f"{dataset}/{split}/{number}"
            examples.append(_example(tally, key, dataset, question, answer, template, MEDQA))
    return examples


def _options(row: dict[str, Any], where: str) -> dict[str, str]:
    """Letter and text of each option, from {"A": "text"} or from [{"key": "A", "value": "text"}]; {} where there are none."""
    options = row.get("options") or {}
    if isinstance(options, list):
        options = {records.field(one, "key", where): one.get("value") for one in options}
    if not isinstance(options, dict) or not all(isinstance(text, str) for text in options.values()):
        raise BadRecord("with wrong 'options'", f"{where}: options are {records.short(options)}, expected letters with their texts")
    return options


def _answer(row: dict[str, Any], options: dict[str, str], where: str, tally: Tally) -> str:
    """The text of the answer, also where a row has its letter only."""
    letter = row.get("answer", row.get("answer_idx"))
    if isinstance(letter, str) and letter in options and letter not in options.values():
        return records.cleaned(options[letter], "options", where, tally)
    return records.text(row, "answer", where, tally)


def _sets(folder: Path, split: str) -> Path:
    return folder / f"{'dev' if split == 'val' else split}_set.json"


def is_pubmedqa(folder: Path) -> bool:
    """ori_pqal.json (as published) or train_set.json, dev_set.json, test_set.json (as its script splits it)."""
    return (folder / "ori_pqal.json").is_file() or any(_sets(folder, split).is_file() for split in ("train", "val", "test"))


def read_pubmedqa(tally: Tally) -> list[Example]:
    """A dict of records: question and yes / no / maybe; the abstracts come before the question by the standard protocol only.

    A split is `<split>_set.json`. Without it, the test split of ori_pqal.json is what test_ground_truth.json (or test_set.json) lists, and
    its training split is the rest.
    """
    path, chosen, held_out = _pubmedqa(tally.folder, tally.split)
    if path is None:
        return []
    dataset = tally.folder_name or PUBMEDQA
    examples = []
    for key, row in records.read_json(path, dict).items():
        if key in held_out or (chosen is not None and key not in chosen):
            continue
        where = f"{path}: record {records.name(key)}"
        with tally.record():
            question = records.text(row, "QUESTION", where, tally)
            answer = records.text(row, "final_decision", where, tally)
            if PROTOCOLS[tally.rules.protocol].context:
                question = " ".join([*_contexts(row, where), question])
            examples.append(_example(tally, records.name(f"{dataset}/{key}"), dataset, question, answer, "qa/pubmedqa", PUBMEDQA))
    return examples


def _pubmedqa(folder: Path, split: str) -> tuple[Path | None, set[str] | None, set[str]]:
    """The file that holds a split, which of its records belong to the split (None: all) and which do not."""
    if _sets(folder, split).is_file():
        return _sets(folder, split), None, set()
    whole = folder / "ori_pqal.json"
    if split not in ("train", "test") or not whole.is_file():
        return None, None, set()
    listed = next((path for path in (folder / "test_ground_truth.json", _sets(folder, "test")) if path.is_file()), None)
    if listed is None:
        raise UserError(f"{whole}: has no splits; put test_ground_truth.json of the PubMedQA repository beside it")
    test = set(records.read_json(listed, dict))
    if split == "test":
        return whole, test, set()
    return whole, None, test.union(records.read_json(_sets(folder, "val"), dict) if _sets(folder, "val").is_file() else ())


def _contexts(row: dict[str, Any], where: str) -> list[str]:
    contexts = row.get("CONTEXTS") or []
    if not isinstance(contexts, list) or not all(isinstance(text, str) for text in contexts):
        raise BadRecord("with wrong 'CONTEXTS'", f"{where}: CONTEXTS is {records.short(contexts)}, expected a list of texts")
    return [" ".join(text.split()) for text in contexts]


def _example(tally: Tally, key: str, dataset: str, question: str, answer: str, template: str, layout: str) -> Example:
    return Example(key, "qa", dataset, question, answer, None, None, None, template, layout=layout, max_words=tally.rules.max_words)
