"""Text-only questions: MedQA (US) and PubMedQA."""

from pathlib import Path

from unimed.data.example import Example
from unimed.data.records import field, read_json, read_jsonl
from unimed.data.text import clean


def is_medqa(folder: Path) -> bool:
    """questions/US/."""
    return (folder / "questions" / "US").is_dir()


def read_medqa(folder: Path, split: str) -> list[Example]:
    """`questions/US/{train,dev,test}.jsonl`: question and answer; the options are not shown, as in the release."""
    path = folder / "questions" / "US" / f"{'dev' if split == 'val' else split}.jsonl"
    if not path.is_file():
        return []
    examples = []
    for number, record in read_jsonl(path):
        where = f"{path}:{number}"
        question, answer = clean(field(record, "question", where)), clean(field(record, "answer", where))
        template = str(record.get("template") or "qa/medqa")
        examples.append(Example(f"medqa/{split}/{number}", "qa", "medqa", question, answer, None, None, None, template))
    return examples


def is_pubmedqa(folder: Path) -> bool:
    """train_set.json, dev_set.json or test_set.json."""
    return any((folder / f"{split}_set.json").is_file() for split in ("train", "dev", "test"))


def read_pubmedqa(folder: Path, split: str) -> list[Example]:
    """`<split>_set.json`: a dict of records; question and yes / no / maybe; the abstracts are not shown, as in the release."""
    path = folder / f"{'dev' if split == 'val' else split}_set.json"
    if not path.is_file():
        return []
    examples = []
    for key, record in read_json(path, dict).items():
        where = f"{path}: record {key}"
        question, answer = clean(field(record, "QUESTION", where)), clean(field(record, "final_decision", where))
        examples.append(Example(f"pubmedqa/{key}", "qa", "pubmedqa", question, answer, None, None, None, "qa/pubmedqa"))
    return examples
