"""`make gpu-check`, rehearsed on the CPU: order, clock, resuming, results, what is filled in. Nothing here runs on a GPU."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from cmoe_kernels import backends

if backends.INTERPRETED:
    pytest.skip("for the ordinary process", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_check, gpu_fill
from benchmarks.inspection import gpu_times

ROOT = Path(__file__).parents[2]
WRITES = "import json, sys; json.dump({'skip_reasons': ['made up']}, open(sys.argv[1].removeprefix('--write='), 'w'))"


def python(name, code):
    return gpu_check.Step(name, (sys.executable, "-c", code))


def test_each_step_ends_in_a_result_and_what_passed_is_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 0.0)
    path, marker = tmp_path / "results" / "gpu-cpu.json", tmp_path / "marker"
    once = f"import pathlib; p = pathlib.Path({str(marker)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    todo = [python("good", once), python("writes", WRITES), python("bad", "print('so it is'); raise SystemExit(3)")]
    results = gpu_check.check("cpu", todo, path)
    assert {name: r["status"] for name, r in results["steps"].items()} == {"good": "passed", "writes": "passed", "bad": "failed"}
    assert results["steps"]["bad"]["output"] == "so it is\n"
    assert results["steps"]["writes"]["skip_reasons"] == ["made up"]
    assert json.loads(path.read_text()) == results
    slow = python("slow", "import time; time.sleep(60)")
    results = gpu_check.check("cpu", [slow], path, minutes=0.02)
    assert results["steps"]["slow"]["status"] == "timeout"
    text = gpu_check.summary(results, [*todo, slow])
    assert text.startswith("Dry run on the CPU")
    assert "nothing here ran on a GPU" in text
    assert text.endswith("2 steps passed, 1 failed, 1 ran out of time, 0 had nothing to run here, 0 were not reached")

    gpu_check.check("cpu", todo, path)
    assert marker.read_text() == "x"
    assert "passed before" in capsys.readouterr().out
    gpu_check.check("cpu", todo[:1], path, again=True)
    assert marker.read_text() == "xx"


class Day:
    """A clock, and steps that take as long as ``needed`` says, or as they are given."""

    def __init__(self, monkeypatch, needed):
        self.now, self.needed, self.given = 0.0, needed, []
        monkeypatch.setattr(gpu_check, "run", self.run)

    def run(self, step, device, results, seconds):
        if isinstance(reason := step.arguments(results), str):
            return {"status": "skipped", "seconds": 0.0, "skip_reasons": [reason]}
        self.given.append((step.name, seconds))
        takes = self.needed.get(step.name, 20.0)
        self.now += min(takes, seconds)
        return {"status": "passed" if takes <= seconds else "timeout", "seconds": min(takes, seconds)}


def test_a_day_with_a_gpu_for_eight_minutes_and_then_for_seven(monkeypatch, tmp_path, capsys):
    """The order of what steps tell, each within its share; the end of the time is kept; the next call begins with what was not reached."""
    path, todo = tmp_path / "gpu.json", gpu_check.steps("cuda")
    environment = {"compute-sanitizer": "/there", "sm_90a": True, "device": "a GPU", "torch": "2.10", "triton": "3.5"}
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "same")
    monkeypatch.setattr(gpu_check, "environment", lambda device: environment)
    monkeypatch.setattr(gpu_check.machine, "describe", lambda device: {"gpu": "a GPU"})
    day = Day(monkeypatch, {"values of the cuda kernels": 400.0, "the native library": 100.0})
    first = gpu_check.check("cuda", todo, path, minutes=8, clock=lambda: day.now)
    assert day.now <= 8 * 60
    assert json.loads(path.read_text()) == first
    reached = list(first["steps"])
    assert reached == [step.name for step in todo if step.name in reached]
    assert reached[:4] == ["the native library", "values of the triton kernels", "values of the cuda kernels", "golden cases"]
    assert reached[4:7] == ["compute-sanitizer memcheck", "compute-sanitizer racecheck", "times: connector"]
    assert first["steps"]["values of the cuda kernels"]["status"] == "timeout"
    given = dict(day.given)
    assert given["the native library"] == gpu_check.BUILD
    assert given["values of the cuda kernels"] < 100  # its share: the rest of the day does not wait for one step
    late = [step.name for step in todo if step.name not in reached]
    assert late
    assert f"not run  {late[-1]}" in gpu_check.summary(first, todo)

    day.given.clear()
    second = gpu_check.check("cuda", todo, path, minutes=7, clock=lambda: day.now)
    assert day.now <= 15 * 60
    assert list(second["steps"])[: len(reached)] == reached
    assert [name for name, _ in day.given][: len(late)] == late
    # Then what was cut off, with what the others left.
    assert dict(day.given)["values of the cuda kernels"] > 100
    gpu_check.check("cuda", todo, path, minutes=15, clock=lambda: day.now)
    statuses = {step["status"] for step in json.loads(path.read_text())["steps"].values()}
    assert statuses == {"passed", "skipped"}  # nothing was timed here, so no tile is
    assert "passed before" in capsys.readouterr().out


def test_results_of_other_sources_are_dropped(tmp_path, monkeypatch):
    path = tmp_path / "gpu-cpu.json"
    gpu_check.check("cpu", [python("good", "")], path)
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "other")
    results = gpu_check.check("cpu", [python("new", "")], path)
    assert list(results["steps"]) == ["new"]


def test_an_interruption_leaves_what_was_done(tmp_path, monkeypatch):
    path = tmp_path / "gpu-cpu.json"
    run = gpu_check.run

    def interrupted(step, *others):
        if step.name == "second":
            raise KeyboardInterrupt
        return run(step, *others)

    monkeypatch.setattr(gpu_check, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check("cpu", [python("first", ""), python("second", "")], path)
    assert json.loads(path.read_text())["steps"]["first"]["status"] == "passed"


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu", "--only", "nonsense", "--out", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        gpu_check.main(["--library", str(tmp_path / "no.whl")])


def test_every_op_has_its_steps():
    for device in ("cuda", "cpu"):
        names = [step.name for step in gpu_check.steps(device)]
        assert len(set(names)) == len(names)
        for op in backends.OPS:
            assert any(f"of {op}" in name for name in names)


def test_a_library_built_elsewhere_is_used(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"built elsewhere")
    for libraries, error in ((["_C.abi3.so"], None), ([], "holds 0"), (["_C1.so", "_C2.so"], "holds 2")):
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
            for name in ("__init__.py", *libraries):
                wheel.writestr(f"cmoe_kernels/{name}", b"in the wheel")
        if error:
            with pytest.raises(ValueError, match=error):
                gpu_check._library_in(tmp_path / "a.whl")
        else:
            assert gpu_check._library_in(tmp_path / "a.whl") == b"in the wheel"
    assert gpu_check._library_in(tmp_path / "_C.abi3.so") == b"built elsewhere"


def case(name, backend, shape, ms, tokens=1024, **ratios):
    peers = {peer: {"p50_ms": ms * ratio, "ratio": ratio} for peer, ratio in (ratios or {"loop": 2.0}).items()}
    about = {"case": name, "shape": shape, "tokens": tokens, "dtype": "bfloat16", "backend": backend}
    return f"{name}/{shape}/T{tokens}/bfloat16/{backend}", {**about, "ours": {"p50_ms": ms}, "peers": peers}


def test_tiles_are_timed_where_a_peer_is_faster():
    cases = dict(
        [
            case("soft_gate", "triton", "a", 1.0, loop=2.0),
            case("sparse_experts", "triton", "a", 1.0, loop=2.0, mm=0.7),
            case("soft_experts", "triton", "a", 1.0, mm=0.4),
            case("topk_gate", "cuda", "a", 1.0, mm=0.4),
        ]
    )
    assert gpu_check.lost({"cases": cases}) == (
        "--only",
        "soft_experts/a/T1024/bfloat16/triton,sparse_experts/a/T1024/bfloat16/triton",
    )
    assert gpu_check.lost({"cases": {}}) == "no time was measured"
    assert gpu_check.lost({"cases": dict([case("soft_gate", "triton", "a", 1.0)])}) == "Triton is ahead everywhere"


def test_one_command_fills_in_what_a_gpu_has_shown(tmp_path):
    """The faster backend over all shapes, where both ran everywhere; the tiles behind the wildcards; the status in README."""
    experts = (("cuda", "a", 1.0), ("triton", "a", 4.0), ("cuda", "b", 3.0), ("triton", "b", 1.0))
    cases = dict(
        case(*of)
        for of in (
            *(("soft_experts", *of) for of in experts),
            *(("soft_gate", b, "a", ms) for b, ms in (("cuda", 2.0), ("triton", 1.0))),
            *(("soft_gate", b, "b", ms, 64) for b, ms in (("cuda", 1.0), ("triton", 2.0))),
            *(("topk_gate", b, s, 1.0) for b, s in (("cuda", "a"), ("triton", "a"), ("cuda", "b"))),
            *(("soft_connector", b, "a", 1.0) for b in ("cuda", "triton")),
        )
    )
    steps = {
        "golden cases": {"status": "passed", "tests": 30},
        "edge sizes": {"status": "failed", "tests": 3},
        "tiles of what lost": {"status": "passed", "tiles": {"sm_90 half gemm 64": [64, 64, 64, 4, 3, 2]}},
    }
    environment = {"capability": "9.0", "device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.8.0"}
    results = {"dry_run": False, "date": "2026-12-01", "cases": cases, "steps": steps, "environment": environment}
    path, preferred, tiles, readme = (tmp_path / name for name in ("gpu.json", "preferred.json", "tiles.json", "README.md"))
    path.write_text(json.dumps(results))
    before = {"soft_gate": {"few": "cuda", "many": "cuda"}}
    preferred.write_text(json.dumps({"sm_80": before, "sm_90": {"topk_gate": before["soft_gate"]}}))
    tiles.write_text(json.dumps({"* half * *": [128, 64, 64, 8, 3, 1]}))
    readme.write_text(f"> Status.\n> {gpu_fill.BEGIN}\n> none\n> {gpu_fill.END}\n\nrest")
    gpu_fill.fill(path, preferred, tiles, readme)
    assert json.loads(preferred.read_text()) == {
        "sm_80": before,
        "sm_90": {"topk_gate": before["soft_gate"], "soft_experts": {"many": "cuda"}, "soft_gate": {"few": "cuda", "many": "triton"}},
    }
    assert list(json.loads(tiles.read_text())) == ["* half * *", "sm_90 half gemm 64"]
    assert "run on NVIDIA H200 (2026-12-01, torch 2.13.0, triton 3.8.0): 2 steps" in readme.read_text()
    assert "**failed: edge" in readme.read_text()
    assert readme.read_text().endswith(f"> {gpu_fill.END}\n\nrest")
    path.write_text(json.dumps(results | {"dry_run": True}))
    with pytest.raises(ValueError, match="dry run"):
        gpu_fill.fill(path, preferred, tiles, readme)


def test_readme_says_what_the_committed_results_say():
    text = (ROOT / "README.md").read_text()
    found = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("gpu-*.json")]
    real = [r for r in found if not r.get("dry_run", True)]
    assert gpu_fill.insert(text, gpu_fill.status(real[-1] if real else None)) == text


def blocked(tmp_path):
    """Sources as they lie in git, where importing what a machine with a GPU may lack is an error; and the environment for them."""
    for folder in ("cmoe_kernels", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "unimed", "vnnet"))
    for file in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, tmp_path)
    absent = tmp_path / "blocked"
    for package in ("hypothesis", "xdist", "transformers", "safetensors", "pytest_benchmark"):
        (absent / package).mkdir(parents=True)
        (absent / package / "__init__.py").write_text("raise ImportError('blocked')")
    # An editable installation would find the library of the checkout in the place of the one that the copy lacks.
    finders = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', type(f).__name__)]\n"
    (absent / "sitecustomize.py").write_text(finders)
    # Their pytest plugins are entry points of the environment: not loaded, as where the packages are absent.
    env = os.environ | {"PYTHONPATH": str(absent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env.pop("CMOE_BACKEND", None)
    env.pop("PYTEST_ADDOPTS", None)
    return env


@pytest.mark.costly
def test_dry_run_with_torch_triton_and_pytest_only(tmp_path):
    """Tests, times, JSON and summary, as where nothing else is installed and no library was built."""
    env = blocked(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", "out", "--only"]
    words = "promises of soft_gate,graphs,times: Mix,tiles,memcheck,library"
    done = subprocess.run([*command, words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "gpu-cpu.json").read_text())
    assert results["dry_run"]
    assert results["environment"]["native library"].startswith("absent")
    assert results["steps"]["promises of soft_gate"]["tests"] > 10
    skips = {name: step["skip_reasons"] for name, step in results["steps"].items() if step["status"] == "skipped"}
    assert skips == {
        "CUDA graphs": ["needs CMOE_TEST_DEVICE=cuda and a GPU that torch can use"],
        "compute-sanitizer memcheck": ["no compute-sanitizer here"],
        "tiles of what lost": ["no time was measured"],
    }
    assert set(results["cases"]) == {"sparse_experts/tiny_gated/T1/bfloat16", "sparse_experts_forward/tiny_gated/T1/bfloat16"}
    for found in results["cases"].values():
        assert not found["wrong"]
        assert found["peers"]["torch loop"]["ratio"] > 0
        assert found["skipped"]["megablocks"] == "it is for GPUs"
    assert "Dry run on the CPU" in done.stdout


def test_a_check_that_is_ended_ends_its_step(tmp_path):
    """Nothing goes on in the background, where it would take the GPU from the next check."""
    code = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'step')!r}).write_text(str(os.getpid())); time.sleep(60)"
    check = (
        "import signal, sys; from benchmarks import gpu_check as g; g.fingerprint = lambda d: ''; g.environment = lambda d: {}\n"
        f"g.steps = lambda *_: [g.Step('slow', (sys.executable, '-c', {code!r}))]; g.main(['--device', 'cpu', '--out', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", check], cwd=ROOT, stdout=subprocess.DEVNULL)
    step, end = tmp_path / "step", time.monotonic() + 60
    while not (step.exists() and step.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(step.read_text()), 0)


def test_a_failed_test_is_kept_with_what_it_said(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_wrong():\n    assert 2 == 3, 'largest error 2 above 3'\ndef test_right():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={tmp_path / '0.xml'}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    found = gpu_check._tests(tmp_path)
    assert found == {"tests": 2, "skipped": 0, "failures": {"test_it.test_wrong": "AssertionError: largest error 2 above 3"}}
    results = {"environment": {"device": "d", "torch": "t", "triton": "t"}, "dry_run": False, "cases": {}}
    results["steps"] = {"it": {"status": "failed", **found}}
    assert "failed: test_it.test_wrong: AssertionError: largest error 2 above 3" in gpu_check.summary(results, [python("it", "")])


def test_the_launches_of_a_step_are_read_from_the_profilers_trace():
    def kernel(name, ts, dur):
        return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"grid": [4, 1, 1], "registers per thread": 168}}

    def step(at, slow):
        return [kernel("gemm", at, 10.0 * slow), {"cat": "gpu_memset", "name": "fill", "ts": at + 30.0, "dur": 2.0, "args": {}}]

    events = [{"cat": "cpu_op", "name": "aten::mm", "ts": 0.0, "dur": 99.0}, *step(300.0, 3), *step(100.0, 1), *step(200.0, 2)]
    assert gpu_times.launches({"traceEvents": events}) == {
        "busy_us": 22.0,
        "span_us": 32.0,
        "kernels": [{"name": "gemm", "us": 20.0, "grid": [4, 1, 1], "registers": 168}, {"name": "fill", "us": 2.0}],
    }
    with pytest.raises(ValueError, match="5 launches in 3 steps"):
        gpu_times.launches({"traceEvents": events[1:-1]})
