"""The list of planted bugs is about the code as it is."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants import Mutant, Suite
from tests.mutants import __main__ as runner
from tests.mutants.triton import MUTANTS as TRITON

KERNELS = [path for path in sorted((runner.ROOT / "cmoe_kernels").rglob("*triton.py")) if "@triton.jit" in path.read_text()]


@pytest.mark.parametrize("mutant", runner.MUTANTS, ids=str)
def test_it_can_be_planted(mutant):
    text = (runner.ROOT / mutant.file).read_text()
    assert mutant.planted(text) != text


def test_no_text_twice_no_text_gone():
    mutant = TRITON[0]
    for text in ("", 2 * mutant.old):
        with pytest.raises(ValueError, match="must be there once"):
            mutant.planted(text)


@pytest.mark.full
@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(runner.ROOT)))
def test_each_kernel_file_has_two(path: Path):
    assert Counter(m.file for m in TRITON)[str(path.relative_to(runner.ROOT))] >= 2


CHECK = "import sys; from planted import x; sys.exit(0 if x > 0 else int(sys.argv[1]))"


@pytest.mark.parametrize(
    ("new", "status", "expected"),
    [("x = 0", 1, "caught"), ("x = 2", 1, "survived"), ("x = 0", 4, "no test failed, but exit status 4"), ("x = 0", None, "no test")],
)
def test_verdicts(tmp_path, monkeypatch, new, status, expected):
    """Only a failed test catches: not a wrong name, nor a run that is too long. The file is as before."""
    (tmp_path / "planted.py").write_text("x = 1")
    wait = "import time; time.sleep(60)"
    suite = Suite(command=(sys.executable, "-c", CHECK if status else wait))
    monkeypatch.setattr(runner, "LIMIT", 30 if status else 0.1)
    mutant = Mutant("value", "planted.py", "x = 1", new, (str(status),), suite)
    assert runner.verdict(mutant, tmp_path).startswith(expected)
    assert (tmp_path / "planted.py").read_text() == "x = 1"
    if status:
        assert runner.run(suite, ("1",), tmp_path)[0] == 0
