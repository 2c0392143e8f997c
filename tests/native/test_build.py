"""The commands by which setup.py compiles."""

import sys
from pathlib import Path

from tests.native.variants import build_script, need_compiler


def test_a_warning_is_an_error_on_request(monkeypatch):
    need_compiler()
    build = build_script()
    monkeypatch.delenv("CMOE_WERROR", raising=False)
    usual = build.compile_command(Path("torch"))
    monkeypatch.setenv("CMOE_WERROR", "1")
    strict = build.compile_command(Path("torch"))
    assert "-Werror" not in usual
    assert [part for part in strict if part != "-Werror"] == usual
    assert len(strict) == len(usual) + 1


def test_what_was_made_with_it_serves_without(tmp_path):
    build, target, log = build_script(), tmp_path / "made", tmp_path / "log"
    code = "import sys; open(sys.argv[1], 'a').write('x'); open(sys.argv[2], 'w')"
    command = [sys.executable, "-c", code, str(log), str(target)]
    build.run_if_stale([*command, "-Werror"], target)
    build.run_if_stale(command, target)
    assert log.read_text() == "x"
    build.run_if_stale([*command, "-O1"], target)
    assert log.read_text() == "xx"


def test_nothing_is_contracted_but_what_the_source_says():
    """A moved line cannot change how a sum is rounded: multiply_add names each fused product."""
    need_compiler()
    assert "-ffp-contract=off" in build_script().compile_command(Path("torch"))
