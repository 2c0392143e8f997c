"""The study of Med-MoE's parts: its notes, and every row in a few steps from one second stage."""

import pytest

from tests.unimed.test_train_medmoe import FEW, PARTS
from unimed import io
from unimed.studies import medmoe, run
from unimed.studies.run import Job


def result(subject, tokens=None):
    accuracy = {"accuracy": {"tokens": tokens, "samples": 1.0, "majority": 0.4}} if tokens else None
    return {
        "scores": {"vqa": 0.5},
        "subject": {"vqa": subject, "qa": 0.5},
        "experts": {"slab": accuracy, "subject": accuracy} if tokens else {},
        "parameters": {"total": 2_000_000, "activated": 1_500_000, "trained": 500_000},
        "training seconds": 61.0,
    }


def test_notes_tell_the_subject_and_the_router():
    lines = medmoe.notes({"dense": {0: result(0.3)}, "modality": {0: result(0.5, 0.9), 1: result(0.7, 0.8)}})
    assert "| dense | 0.300 (0.300) | – | – | 2.00 / 1.50 / 0.50 | 61 |" in lines
    assert "| modality | 0.600 (0.500, 0.700) | 0.850 / 1.000 | 0.850 / 1.000 | 2.00 / 1.50 / 0.50 | 61 |" in lines
    assert "most frequent domain has 0.400 (held-out slabs), 0.400 (held-out subject)" in lines[-1]


@pytest.mark.full
def test_every_row_from_one_second_stage(sample_folder, tmp_path, monkeypatch, without_java):
    monkeypatch.setattr(medmoe, "MODEL", [*PARTS, "language.layers=2"])
    monkeypatch.setattr(medmoe, "prepare", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(sample_folder)
    few = [one for one in FEW if one.startswith(("train.batch", "evaluate."))]
    found = {}
    for row, more in medmoe.ROWS.items():
        monkeypatch.setitem(medmoe.ROWS, row, [*few, *more])
        job = Job(tmp_path, row, 0, 4)
        job.folder.mkdir(parents=True)
        found[row] = {0: medmoe.run(job)}
        io.write_json(job.folder / "result.json", found[row][0])
        medmoe.tidy(job)
        if row == "dense":
            made = (tmp_path / "start" / "stage-2" / "run.json").stat().st_mtime_ns
    assert (tmp_path / "start" / "stage-2" / "run.json").stat().st_mtime_ns == made
    assert set(found) == set(medmoe.STUDY.rows)
    sizes = {row: one[0]["parameters"] for row, one in found.items()}
    assert sizes["dense"]["total"] == sizes["dense"]["activated"] < sizes["no-meta"]["activated"] < sizes["modality"]["activated"]
    assert sizes["modality"]["activated"] < sizes["k2"]["activated"] < sizes["k2"]["total"] == sizes["modality"]["total"]
    assert all(set(one[0]["scores"]) == {"vqa", "refer", "identify", "caption", "cls", "qa"} for one in found.values())
    assert [row for row, one in found.items() if not one[0]["experts"]] == ["dense"]
    (tmp_path / "study.json").write_text('{"study": "medmoe", "steps": 4}')
    table = run.write_table(medmoe.STUDY, tmp_path)
    assert set(table["gains"]) == {"learned", "modality", "no-meta", "k2"}
    assert run.clean(tmp_path) > 0
    assert not (tmp_path / "start").exists()
    assert (tmp_path / "table.md").is_file()
