"""`make records`: each record has its program, what is stale is named, and only that is written."""

import importlib.util

import pytest

from tools import records


def test_each_record_is_there_and_has_its_program():
    for record in records.RECORDS:
        assert (records.ROOT / record.file).is_file(), record.file
        assert importlib.util.find_spec(record.module), record.module


def test_what_is_stale_is_named_and_written(monkeypatch, capsys, tmp_path):
    marker = tmp_path / "written"
    (tmp_path / "writes.py").write_text(f"import pathlib, sys; pathlib.Path({str(marker)!r}).write_text(' '.join(sys.argv[1:]))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def unknown():
        raise records.Unknown("no nvcc")

    three = (
        records.Record("fresh", lambda: "", "nothing"),
        records.Record("old", lambda: "2 rows", "writes", ("--write", "--jobs")),
        records.Record("elsewhere", unknown, "nothing"),
    )
    monkeypatch.setattr(records, "RECORDS", three)
    assert records.main(["--check"]) == 1
    assert capsys.readouterr().out == "fresh: up to date\nold: stale: 2 rows\nelsewhere: cannot be checked here: no nvcc\n"
    assert not marker.exists()
    assert records.main(["--jobs", "3"]) == 0
    assert marker.read_text() == "--write --jobs 3"
    assert records.main(["--only", "fresh", "--check"]) == 0


@pytest.mark.parametrize("of", ["README.md", "tests/mutants/verdicts.json"])
def test_the_quick_checks_run(of, capsys):
    records.main(["--check", "--only", of])
    assert capsys.readouterr().out.startswith(f"{of}: ")
