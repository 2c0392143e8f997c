"""The list of planted bugs is about the code as it is."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import Mutant, Suite
from tests.mutants import __main__ as runner
from tests.mutants.triton import MUTANTS as TRITON

KERNELS = [path for path in sorted((runner.ROOT / "cmoe_kernels").rglob("*.py")) if "@triton.jit" in path.read_text()]


def test_each_can_be_planted():
    """In one test, so that no sample leaves out a bug whose text has gone."""
    gone = []
    for mutant in runner.MUTANTS:
        text = (runner.ROOT / mutant.file).read_text()
        try:
            if mutant.planted(text) == text:
                gone.append(f"{mutant}: changes nothing")
        except ValueError as error:
            gone.append(str(error))
    assert not gone, "\n".join(gone)


def test_no_text_twice_no_text_gone():
    mutant = TRITON[0]
    for text in ("", 2 * mutant.old):
        with pytest.raises(ValueError, match="must be there once"):
            mutant.planted(text)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(runner.ROOT)))
def test_each_kernel_file_has_two(path: Path):
    assert Counter(m.file for m in TRITON)[str(path.relative_to(runner.ROOT))] >= 2


def test_none_survived_in_the_record():
    """If one did: mend its tests, then `python -m tests.mutants --missing --write`."""
    found = runner.verdicts()
    assert len(found) > 40
    assert not [str(m) for m in runner.MUTANTS if found.get(m.key, "not run") not in ("caught", "not run")]


CHECK = "import sys; from planted import x; sys.exit(0 if x > 0 else int(sys.argv[1]))"


@pytest.mark.parametrize(
    ("new", "status", "expected"),
    [
        ("x = 0", 1, "caught"),
        ("x = 2", 1, "survived"),
        ("x = 0", 4, "no test failed, but exit status 4"),
        ("x = 0", None, "no test"),
        ("x = (", 1, "broken"),
        ("x = y", 1, "broken"),
    ],
)
def test_verdicts(tmp_path, monkeypatch, new, status, expected):
    """Only a failed test catches: not a wrong name, a run that is too long, nor code that does not run. The file is as before."""
    (tmp_path / "planted.py").write_text("x = 1")
    wait = "import time; time.sleep(60)"
    # Python's own message begins where pytest's has an E.
    suite = Suite(command=(sys.executable, "-c", CHECK if status else wait), broken=r"^(SyntaxError|NameError)")
    monkeypatch.setattr(runner, "LIMIT", 30 if status else 0.1)
    mutant = Mutant("value", "planted.py", "x = 1", new, (str(status),), suite)
    assert runner.verdict(mutant, tmp_path).startswith(expected)
    assert (tmp_path / "planted.py").read_text() == "x = 1"
    if status:
        assert runner.run(suite, ("1",), tmp_path).status == 0


@pytest.mark.parametrize(("crashes", "expected"), [(True, "caught"), (False, "no test failed, but exit status -11")])
def test_an_illegal_access_where_it_ends_the_process(tmp_path, crashes, expected):
    (tmp_path / "planted.py").write_text("x = 1")
    code = "import os; from planted import x; x or os.kill(os.getpid(), 11)"
    mutant = Mutant("value", "planted.py", "x = 1", "x = 0", (), Suite(command=(sys.executable, "-c", code), crashes=crashes))
    assert runner.verdict(mutant, tmp_path).startswith(expected)


def test_a_failed_build_catches_nothing(tmp_path):
    (tmp_path / "planted.py").write_text("x = 1")
    suite = Suite(before=((sys.executable, "-c", CHECK, "1"),), command=(sys.executable, "-c", "raise SystemExit(1)"))
    assert runner.verdict(Mutant("value", "planted.py", "x = 1", "x = 0", (), suite), tmp_path).startswith("broken: it does not build")


@pytest.mark.parametrize(
    ("line", "broken"),
    [
        ("E   NameError: name 'u' is not defined", True),
        ("E       triton.runtime.errors.InterpreterError: NameError(\"name 'u' is not defined\")", True),
        ("E       triton.runtime.errors.InterpreterError: ValueError('Cannot broadcast')", True),
        ("E       triton.runtime.errors.InterpreterError: KernelMemoryError('store past the end')", False),
        ("E       triton.runtime.errors.InterpreterError: InterpreterError('KernelMemoryError(\\'store past the end\\')')", False),
        ("E       triton.runtime.errors.InterpreterError: InterpreterError('TypeError(\\'unexpected\\')')", True),
        ("E       triton.runtime.errors.InterpreterError: AssertionError('int32 overflow detected for operation mul')", False),
        ("E       AssertionError: output: largest error 1", False),
        ("    # NameError", False),
    ],
)
def test_code_that_does_not_run(line, broken):
    assert bool(re.search(Suite().broken, f"test\n{line}\n", re.MULTILINE)) == broken
