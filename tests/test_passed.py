"""What CI leaves out where the kernels are as when their tests passed."""

import json

import pytest

from tests import passed

pytest_plugins = ["pytester"]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with one kernel, its record among the tests."""
    monkeypatch.setattr(passed, "ROOT", tmp_path)
    monkeypatch.setattr(passed, "RECORD", tmp_path / "tests" / "passed.json")
    for name in ("csrc/cpu/one.cpp", "tests/ops/test_one.py", "unimed/io.py", "benchmarks/results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    return tmp_path


def test_a_change_of_a_kernel_or_of_its_tests_is_seen_and_no_other(tree, capsys):
    assert passed.main([]) == 1  # no record
    assert passed.main(["--write"]) == 0
    day = json.loads((tree / "tests" / "passed.json").read_text())["date"]
    capsys.readouterr()
    assert passed.main([]) == 0
    assert capsys.readouterr().out == f"{day}\n"
    for name in ("unimed/io.py", "benchmarks/results/a.json"):
        (tree / name).write_text("2")
        assert passed.main([]) == 0
    for name in ("csrc/cpu/one.cpp", "tests/ops/test_one.py", "setup.py", "csrc/cpu/two.h"):
        (tree / name).write_text("2")
        assert passed.main([]) == 1
        passed.main(["--write"])
    (tree / "csrc/cpu/two.h").rename(tree / "csrc/cpu/three.h")
    assert passed.main([]) == 1


def test_a_record_of_these_sources_keeps_its_day(tree):
    record = tree / "tests" / "passed.json"
    record.write_text(json.dumps({"date": "2026-01-01", "digest": passed.digest()}))
    passed.main(["--write"])
    assert passed.since() == "2026-01-01"


def test_costly_tests_are_left_out_with_the_reason(pytester, monkeypatch):
    pytester.makeconftest("from tests.conftest import *")
    pytester.makeini("[pytest]\nmarkers = costly\n  full\n  each")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.costly
        def test_costly():
            pass

        def test_quick():
            pass
        """
    )
    monkeypatch.setenv(passed.VARIABLE, "2026-01-02")
    run = pytester.runpytest("-rs", "-p", "no:cacheprovider")
    run.assert_outcomes(passed=1, skipped=1)
    run.stdout.fnmatch_lines(["*as on 2026-01-02, when it passed"])
    monkeypatch.delenv(passed.VARIABLE)
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_a_third_of_the_cases_of_a_kernel_run(pytester, monkeypatch):
    pytester.makeconftest("from tests.conftest import *")
    pytester.makeini("[pytest]")
    for folder in ("tests/ops", "tests/unimed"):
        pytester.path.joinpath(folder).mkdir(parents=True)
        text = "import pytest\n\n@pytest.mark.parametrize('value', range(12))\ndef test_value(value):\n    pass"
        pytester.path.joinpath(folder, f"test_{folder[6:]}.py").write_text(text)
    monkeypatch.delenv(passed.VARIABLE, raising=False)
    pytester.runpytest("--sample", "9", "-p", "no:cacheprovider").assert_outcomes(passed=9 + 9)
    monkeypatch.setenv(passed.VARIABLE, "2026-01-02")
    pytester.runpytest("--sample", "9", "-p", "no:cacheprovider").assert_outcomes(passed=3 + 9)
