"""The README's Python examples and commands run as they stand; those of the demo in tests/unimed/test_cli.py."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


COMMANDS = [shlex.split(line, comments=True) for line in re.findall(r"^    (\S.*)$", README.read_text(), flags=re.MULTILINE)]


def test_there_are_examples():
    assert EXAMPLES
    assert len(COMMANDS) > 5


def test_commands():
    """What installs is what `make test` has done by now: of those, targets and extras are looked up."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for command in COMMANDS:
        match command:
            case ["make", target]:
                assert target in targets
            case ["pip", "install", *_, what]:
                assert set(re.findall(r"[a-z0-9]+", what.partition("[")[2])) <= extras
            case ["python", *arguments]:
                done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ)
                assert done.returncode == 0, done.stderr
            case ["xdg-open", _] | [".venv/bin/unimed", *_]:
                pass
            case _:
                raise AssertionError(f"README has a command that no test runs: {' '.join(command)}")


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[0][:40])
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})
