"""The commands by which csrc/build.py compiles, and what runs them."""

import subprocess
from pathlib import Path

import pytest

from tests.builds import build_script, need_compiler


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A program of one source and one header, in a build folder of its own."""
    need_compiler()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMOE_WERROR", raising=False)
    Path("value.h").write_text("inline int value() { return 1; }\n")
    Path("main.cpp").write_text('#include <cstdio>\n#include "value.h"\nint main() { int unused = 0; std::printf("%d", value()); }\n')
    return tmp_path


def make(*flags):
    """The program's output, and the files that were made again."""
    script, build = build_script(), build_script().Build(Path("made in", "folder"))
    command = [*script.compiler(), "-c", "-Wall", script.WERROR, *flags]
    program = build.link("program", script.compiler(), [build.compile("main.cpp", command)])
    before = {path: path.stat().st_mtime_ns if path.exists() else 0 for path in build.commands}
    build.run()
    again = {path.name for path in build.commands if path.stat().st_mtime_ns != before[path]}
    return subprocess.run([program], capture_output=True, text=True).stdout, again


def need_ninja():
    if build_script().ninja() is None:
        pytest.skip("ninja is not installed")


def test_only_what_has_changed_is_made_again(project):
    need_ninja()
    assert make() == ("1", {"main.cpp.o", "program"})
    assert make() == ("1", set())
    Path("value.h").write_text("inline int value() { return 2; }\n")
    assert make() == ("2", {"main.cpp.o", "program"})
    assert "main.cpp.o" in make("-O1")[1]
    assert make("-O1") == ("2", set())


def test_without_ninja_the_same_commands_run(project, monkeypatch, capsys):
    monkeypatch.setattr(build_script(), "ninja", lambda: None)
    assert make()[0] == "1"
    assert "pip install ninja" in capsys.readouterr().out
    Path("value.h").write_text("inline int value() { return 2; }\n")
    assert make()[0] == "2"


@pytest.mark.parametrize("with_ninja", [True, False])
def test_a_warning_is_an_error_on_request(project, monkeypatch, with_ninja):
    if with_ninja:
        need_ninja()
    else:
        monkeypatch.setattr(build_script(), "ninja", lambda: None)
    monkeypatch.setenv("CMOE_WERROR", "1")
    with pytest.raises(subprocess.CalledProcessError):
        make()
    monkeypatch.setenv("CMOE_WERROR", "0")
    assert make()[0] == "1"


def test_an_object_made_with_werror_serves_without(project, monkeypatch):
    need_ninja()
    monkeypatch.setenv("CMOE_WERROR", "1")
    make("-Wno-unused-variable")
    monkeypatch.delenv("CMOE_WERROR")
    assert make("-Wno-unused-variable")[1] == set()


def test_the_library_is_compiled_with_warnings_as_errors_on_request():
    need_compiler()
    assert build_script().WERROR in build_script().compile_command(Path("torch"))


def test_nothing_is_contracted_but_what_the_source_says():
    """A moved line cannot change how a sum is rounded: multiply_add names each fused product."""
    need_compiler()
    assert "-ffp-contract=off" in build_script().compile_command(Path("torch"))


def test_instruction_sets_are_chosen_at_build_time(monkeypatch):
    need_compiler()
    script, known = build_script(), build_script().tiers_of_compiler()
    monkeypatch.delenv("CMOE_CPU_TIERS", raising=False)
    assert script.tiers_to_build() == known
    monkeypatch.setenv("CMOE_CPU_TIERS", "generic")
    assert script.tiers_to_build() == []
    assert not [source for source in script.library().objects if Path(source).stem in script.TIERS]
    monkeypatch.setenv("CMOE_CPU_TIERS", "amx, avx2")
    assert script.tiers_to_build() == [tier for tier in known if tier in ("avx2", "avx512_bf16", "amx")]
    for wrong in ("avx3", ""):
        monkeypatch.setenv("CMOE_CPU_TIERS", wrong)
        with pytest.raises(SystemExit, match=f"CMOE_CPU_TIERS is '{wrong}', must list some of generic, avx2, "):
            script.tiers_to_build()
