"""What a new machine installs: constraints.txt, the ranges in pyproject.toml, and the doctor's word on other versions."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from cmoe_kernels import doctor
from tools import versions

ROOT = Path(__file__).resolve().parents[1]
PROJECT = versions.project()
EXTRAS = PROJECT["project"]["optional-dependencies"]
LOCKED = versions.locked()
SMALL = {
    "project": {
        "name": "cmoe-kernels",
        "dependencies": ["torch>=2.10"],
        "optional-dependencies": {
            "page": ["gradio>=6.1,<6.32", "rouge==1.0.1", "cmoe-kernels[data]"],
            "data": ["numpy>=2,<2.5", "Pillow>=12"],
            "dev": ["cmoe-kernels[data]", "pytest>=8", "ruff"],
        },
    }
}


def names(requirements):
    return [str(requirement) for requirement in requirements]


def without_torch(requirements):
    return [r for r in requirements if r.name not in ("torch", "triton")]


@pytest.mark.parametrize("extra", EXTRAS)
def test_constraints_satisfy_the_project(extra):
    wanted = without_torch(versions.requirements(PROJECT, [extra]))
    wanted += [Requirement(line) for line in PROJECT["build-system"]["requires"]]
    for requirement in wanted:
        version = LOCKED[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt has {version}: make lock"


def test_constraints_agree_with_what_they_require():
    """Of those that are installed here, each finds its own requirements among the others."""
    checked = 0
    for name, version in LOCKED.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version != version:
            continue
        for requirement in map(Requirement, found.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                locked = LOCKED.get(canonicalize_name(requirement.name))
                assert locked or versions.NOT_LOCKED.fullmatch(canonicalize_name(requirement.name)), f"{name} needs {requirement}"
                assert not locked or requirement.specifier.contains(locked, prereleases=True), f"{name} needs {requirement}, not {locked}"
                checked += 1
    assert checked > 50


def test_constraints_hold_what_is_planned_and_pillow_below_13():
    assert {*versions.PLANNED, "pip", "setuptools", "wheel"} <= set(LOCKED)
    assert Version(LOCKED["pillow"]) < Version("13")


def test_constraints_are_names_and_versions_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    assert [name for name in LOCKED if re.match(r"torch$|triton|pytorch|nvidia|cuda", name)] == []


@pytest.mark.each
@pytest.mark.parametrize("requirement", versions.run_time(PROJECT), ids=lambda requirement: requirement.name)
def test_a_range_ends_at_the_newest_minor_version_that_was_tested(requirement):
    operators = {part.operator: part.version for part in requirement.specifier}
    if "==" in operators:
        return
    assert set(operators) == {">=", "<"}, f"{requirement} must be >=oldest,<next minor"
    tested = Version(LOCKED[canonicalize_name(requirement.name)])
    assert operators["<"] == f"{tested.major}.{tested.minor + 1}", f"{requirement}, tested: {tested}"


def test_the_makefile_installs_by_the_constraints():
    text = (ROOT / "Makefile").read_text()
    (install,) = re.findall(r"^INSTALL := (.*)$", text, flags=re.MULTILINE)
    assert "-c constraints.txt" in install
    others = [line for line in text.replace(install, "").splitlines() if re.search(r"\bpip\b.*\binstall\b", line)]
    assert [line for line in others if "packaging" not in line] == []  # make lock: before there are any


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_new_constraints_make_the_environment_anew(tmp_path):
    (tmp_path / ".installed").touch()

    def plan(*options):
        command = ["make", "-n", *options, f"VENV={tmp_path}", "install"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "pip" not in plan()
    assert "-c constraints.txt" in plan("-W", "constraints.txt")


def test_requirements_follow_extras_that_name_extras():
    assert names(versions.requirements(SMALL, ["page"])) == [
        "torch>=2.10",
        "gradio<6.32,>=6.1",
        "rouge==1.0.1",
        "numpy<2.5,>=2",
        "Pillow>=12",
    ]
    assert versions.run_time_extras(SMALL) == ["page", "data"]
    assert "torch" not in [r.name for r in versions.run_time(SMALL)]


def test_both_ends_of_a_range(monkeypatch):
    monkeypatch.setattr(versions, "locked", lambda: {"pytest": "9.2.0"})
    ends = {name: versions.lane(name, SMALL) for name in ("latest", "oldest")}
    assert ends["latest"] == ["gradio>=6.1", "rouge==1.0.1", "numpy>=2", "Pillow>=12", "pytest==9.2.0"]
    assert ends["oldest"] == ["gradio==6.1", "rouge==1.0.1", "numpy==2", "Pillow==12", "pytest==9.2.0"]


def test_lock_leaves_out_torch_and_local_tags(monkeypatch, tmp_path, capsys):
    pairs = [
        ("torch", "2.13.0+cpu"),
        ("triton", "3.8.0"),
        ("nvidia-cublas", "13.1"),
        ("cuda-toolkit", "13.0"),
        ("Jinja2", "3.1.6"),
        ("absl_py", "2.5.1+local"),
    ]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in pairs]}
    assert versions.versions_of(report) == {"absl-py": "2.5.1", "jinja2": "3.1.6"}
    monkeypatch.setattr(versions, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(versions, "resolve", lambda wanted: versions.versions_of(report))
    versions.lock(["torch==2.13.0"])
    assert versions.locked(tmp_path / "constraints.txt") == {"absl-py": "2.5.1", "jinja2": "3.1.6"}


def test_a_set_that_does_not_resolve_leaves_the_file_as_it_was(monkeypatch, tmp_path):
    def conflict(wanted):
        raise subprocess.CalledProcessError(1, "pip", stderr="ResolutionImpossible: pillow")

    path = tmp_path / "constraints.txt"
    path.write_text("jinja2==3.1.6\n")
    monkeypatch.setattr(versions, "CONSTRAINTS", path)
    monkeypatch.setattr(versions, "resolve", conflict)
    with pytest.raises(SystemExit, match=r"constraints.txt is as it was:\nResolutionImpossible: pillow"):
        versions.lock([])
    assert path.read_text() == "jinja2==3.1.6\n"


def run_sample():
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(ROOT / "no-such-folder")}
    command = [sys.executable, "-m", "tools.versions", "latest", "--pin", "torch==2.13.0", "--sample", "60"]
    return subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, check=True)


def test_the_sample_passes_over_in_one_line_without_network():
    assert run_sample().stdout == "test-latest, sampled: passed over: no index answers\n"


def test_versions_that_do_not_install_are_one_line(monkeypatch):
    def fails(name, pins, wanted):
        raise subprocess.CalledProcessError(1, ["python", "-m", "pip", "install", "numpy==99"])

    monkeypatch.setattr(versions, "environment", fails)
    with pytest.raises(SystemExit, match=r"^oldest: -m pip install numpy==99 ended with exit code 1; no test ran$"):
        versions.test("oldest", [], 1)


class Sampled:
    """versions.sample with nothing installed or run."""

    def __init__(self, monkeypatch, resolved, output="", error=None):
        self.installed, self.error = None, error
        monkeypatch.setattr(versions, "resolve", lambda wanted, seconds: self.answer(resolved))
        monkeypatch.setattr(versions, "overlay", self.overlay)
        monkeypatch.setattr(versions, "run_until", lambda command, seconds: output)

    def answer(self, resolved):
        if isinstance(resolved, Exception):
            raise resolved
        return resolved

    def overlay(self, wanted, seconds):
        self.installed = wanted
        if self.error:
            raise self.error
        return Path("python")


def test_a_sample_without_news_installs_nothing(monkeypatch):
    sampled = Sampled(monkeypatch, {"numpy": LOCKED["numpy"]})
    assert versions.sample([], 1, 60) == "nothing is newer than constraints.txt"
    assert sampled.installed is None


def test_a_sample_says_what_would_break(monkeypatch):
    output = (
        "[gw0] [ 25%] PASSED tests/test_readme.py::test_example[import torch] \n"
        "[gw1] [ 50%] FAILED tests/unimed/test_a.py::test_b \n"
        "[gw1] [ 75%] ERROR tests/unimed/test_a.py::test_c \n"
        "FAILED tests/unimed/test_a.py::test_b - TypeError: no cache\n"
    )
    sampled = Sampled(monkeypatch, {"numpy": "99.0", "pillow": LOCKED["pillow"], "entirely-new": "1.0"}, output)
    assert versions.sample([], 1, 60).splitlines() == [
        f"newer than constraints.txt: numpy {LOCKED['numpy']} -> 99.0, entirely-new - -> 1.0",
        "would break: 2 of 3 tests that ran in 60 s",
        "FAILED tests/unimed/test_a.py::test_b: TypeError: no cache",
        "ERROR tests/unimed/test_a.py::test_c: no reason was written in time",
    ]
    assert sampled.installed == ["numpy==99.0", "entirely-new==1.0"]


@pytest.mark.parametrize(
    ("resolved", "error", "words"),
    [
        (subprocess.TimeoutExpired("pip", 60), None, "passed over: no index answered in time"),
        (subprocess.CalledProcessError(1, "pip", stderr="ERROR: ResolutionImpossible: a needs b<3\nsee https://"), None, "a needs b<3"),
        ({"numpy": "99.0"}, subprocess.TimeoutExpired("pip", 60), "60 s were too short"),
        ({"numpy": "99.0"}, subprocess.CalledProcessError(1, "pip", stderr="no space left"), "they do not install: no space left"),
    ],
)
def test_a_sample_is_never_an_error(resolved, error, words, monkeypatch):
    Sampled(monkeypatch, resolved, error=error)
    (line,) = versions.sample([], 1, 60).splitlines()
    assert words in line


def test_the_files_of_the_sample_are_there():
    assert [name for name in versions.SAMPLE + versions.TESTS if not (ROOT / name).exists()] == []


def test_a_run_whose_time_is_up_keeps_what_it_has_written():
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun'); time.sleep(600)"
    assert versions.run_until([sys.executable, "-c", code], 3) == "begun\n"
    assert versions.run_until([sys.executable, "-c", code], -1) in ("", "begun\n")


class Installed:
    """A distribution as pip would have installed it."""

    version = "0.1.0"

    def __init__(self, requires):
        self.requires, self.metadata = requires, self

    def get_all(self, field):
        assert field == "Provides-Extra"
        return ["unimed", "dev"]


REQUIRES = [
    "torch>=2.10",
    'numpy<2.5,>=1.26; extra == "unimed"',
    'pillow<12.4,>=10; extra == "unimed"',
    'not-installed<3,>=2; extra == "unimed"',
    'ruff==0.0.1; extra == "dev"',
]


@pytest.mark.parametrize(
    ("numpy", "says"),
    [
        ("2.4.6", "within the tested ranges"),
        ("2.5.0", "numpy 2.5.0 (tested: <2.5,>=1.26)"),
        ("2.5.0rc1", "numpy 2.5.0rc1"),
        ("1.25", "numpy 1.25"),
    ],
)
def test_the_doctors_name_versions_outside_the_tested_ranges(numpy, says, monkeypatch):
    from unimed.doctor import lines

    found = {"torch": "2.13.0+cpu", "numpy": numpy, "pillow": "12.3.0", "ruff": "0.17.6"}
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(REQUIRES))
    monkeypatch.setattr(doctor, "_installed_version", found.get)
    assert says in doctor.tested_versions()
    assert all(name not in doctor.tested_versions() for name in ("pillow", "not-installed", "ruff"))
    assert says in next(line for line in doctor.report().splitlines() if line.startswith("versions "))
    assert says in dict(lines())["versions"]


def test_the_doctor_of_a_checkout_on_the_path(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert "tested versions unknown" in doctor.tested_versions()
