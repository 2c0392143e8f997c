"""The driver of `make gpu-check`, rehearsed on the CPU: steps, limits, resuming, results, summary. Nothing here runs on a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmoe_kernels import backends, native

if backends.INTERPRETED:
    pytest.skip("for the ordinary process", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_bench, gpu_check

ROOT = Path(__file__).parents[2]


def python(name, code, limit=60.0):
    return gpu_check.Step(name, (sys.executable, "-c", code), limit=limit)


WRITES = "import json, sys; json.dump({'rows': [], 'skip_reasons': ['made up']}, open(sys.argv[1].removeprefix('--write='), 'w'))"


def test_each_step_ends_in_a_result_and_what_passed_is_not_run_again(tmp_path, capsys):
    path, marker = tmp_path / "results" / "gpu-cpu.json", tmp_path / "marker"
    once = f"import pathlib; p = pathlib.Path({str(marker)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    todo = [python("good", once), python("writes", WRITES), python("bad", "print('so it is'); raise SystemExit(3)")]
    todo.append(python("slow", "import time; time.sleep(60)", limit=1.0))
    results = gpu_check.check("cpu", todo, path)
    assert {name: r["status"] for name, r in results["steps"].items()} == {
        "good": "passed",
        "writes": "passed",
        "bad": "failed",
        "slow": "timeout",
    }
    assert results["steps"]["bad"]["output"] == "so it is\n"
    assert results["steps"]["writes"]["skip_reasons"] == ["made up"]
    assert json.loads(path.read_text()) == results
    text = gpu_check.summary(results, todo)
    assert text.startswith("Dry run on the CPU")
    assert "nothing here ran on a GPU" in text
    assert text.endswith("2 steps passed, 1 failed, 1 ran out of time, 0 had nothing to run here")

    gpu_check.check("cpu", todo[:3], path)
    assert marker.read_text() == "x"
    assert "passed before" in capsys.readouterr().out
    gpu_check.check("cpu", todo[:1], path, again=True)
    assert marker.read_text() == "xx"


def test_results_of_other_sources_are_dropped(tmp_path, monkeypatch):
    path = tmp_path / "gpu-cpu.json"
    gpu_check.check("cpu", [python("good", "")], path)
    monkeypatch.setattr(gpu_check, "fingerprint", lambda device: "other")
    results = gpu_check.check("cpu", [python("new", "")], path)
    assert list(results["steps"]) == ["new"]


def test_an_interruption_leaves_what_was_done(tmp_path, monkeypatch):
    path = tmp_path / "gpu-cpu.json"
    run = gpu_check.run

    def interrupted(step, device):
        if step.name == "second":
            raise KeyboardInterrupt
        return run(step, device)

    monkeypatch.setattr(gpu_check, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check("cpu", [python("first", ""), python("second", "")], path)
    assert json.loads(path.read_text())["steps"]["first"]["status"] == "passed"


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err
    assert gpu_check.main(["--device", "cpu", "--only", "nonsense", "--out", str(tmp_path)]) == 2


def test_every_step_is_below_ten_minutes_and_every_op_has_one():
    for device in ("cuda", "cpu"):
        todo = gpu_check.steps(device)
        assert len({step.name for step in todo}) == len(todo)
        assert all(step.limit < 600 for step in todo)
        for op in backends.OPS:
            assert any(f"of {op}" in step.name for step in todo)
    assert sum("times" in step.name for step in gpu_check.steps("cuda")) == 15


def test_on_sm90_the_products_of_both_architectures_are_compared(monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.native, "cuda_kernels", lambda: native.CudaKernels("sm_80, sm_90a", ""))
    todo = gpu_check.steps("cuda")
    assert len({step.name for step in todo}) == len(todo)
    assert sum("times" in step.name for step in todo) == 30
    old = [step for step in todo if step.env.get("CMOE_CUDA_SM90") == "0"]
    assert len(old) == 16
    assert all(step.name.startswith(gpu_check.SM80) == (step.command[-2:] == ("--backend", "cuda")) for step in todo)


def test_dry_run_without_the_native_library_hypothesis_and_xdist(tmp_path):
    """A copy of the sources as they lie in git, where importing either package is an error: tests, times, JSON and summary."""
    for folder in ("cmoe_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__", "unimed"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    blocked = tmp_path / "blocked"
    for package in ("hypothesis", "xdist"):
        (blocked / package).mkdir(parents=True)
        (blocked / package / "__init__.py").write_text("raise ImportError('blocked')")
    # An editable installation would find the library of the checkout in the place of the one that the copy lacks.
    finders = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', type(f).__name__)]\n"
    (blocked / "sitecustomize.py").write_text(finders)
    # Their pytest plugins are entry points of the environment: not loaded, as where the packages are absent.
    env = os.environ | {"PYTHONPATH": str(blocked), "PYTEST_ADDOPTS": "-p no:hypothesispytest -p no:xdist -p no:xdist.looponfail"}
    env.pop("CMOE_BACKEND", None)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", "out", "--only"]
    words = "promises of soft_gate,graphs,times of tiny"
    done = subprocess.run([*command, words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "gpu-cpu.json").read_text())
    assert results["dry_run"]
    assert results["environment"]["native library"].startswith("absent")
    assert results["steps"]["promises of soft_gate"]["tests"] > 10
    gpu = results["steps"]["graphs, synchronisation, TF32, bad indices"]
    assert gpu["status"] == "skipped"
    assert gpu["skip_reasons"] == ["needs CMOE_TEST_DEVICE=cuda and a GPU that torch can use"]
    for shape, tokens in gpu_bench.DRY:
        rows = results["steps"][f"times of {shape} at T = {tokens}"]["rows"]
        assert rows
        assert not [row for row in rows if "wrong" in row]
        for row in rows:
            assert row["peers"][gpu_bench.LOOP]["ratio"] > 0
    sparse = next(row for row in rows if row["op"] == "sparse_experts")
    assert set(sparse["peers"]) == {gpu_bench.LOOP, *gpu_bench.PEERS}
    assert "Dry run on the CPU" in done.stdout


def test_a_wrong_peer_is_not_timed(monkeypatch):
    arguments = gpu_bench.drawn(gpu_bench.SHAPES["tiny_gated"], 16, "cpu", gpu_bench.torch.bfloat16)["sparse_experts"]
    monkeypatch.setattr(
        gpu_bench,
        "PEERS",
        {
            "off": lambda x, **rest: 1.5 * gpu_bench.grouped_mm(x, **rest),
            "broken": lambda x, **rest: x.view(-1, 7),
            "absent": lambda **rest: (_ for _ in ()).throw(gpu_bench.Skipped("not today")),
        },
    )
    row = gpu_bench.measure("sparse_experts", arguments, True, "reference", "cpu", 0.01)
    assert row["peers"]["off"]["wrong"].startswith("y: error")
    assert row["peers"]["broken"]["failed"].startswith("RuntimeError")
    assert row["peers"]["absent"] == {"skipped": "not today"}
    assert row["peers"][gpu_bench.LOOP]["ours"]["calls"] > 0
    monkeypatch.setattr(gpu_bench.cmoe, "sparse_experts", lambda **given: 2 * gpu_bench.roofline.UNFUSED["sparse_experts"](**given))
    wrong = gpu_bench.measure("sparse_experts", arguments, False, "reference", "cpu", 0.01)
    assert "wrong" in wrong
    assert not wrong["peers"]


def timed(op, backend, step, ms, tokens=1024):
    return step, {
        "op": op,
        "pass": "forward",
        "backend": backend,
        "tokens": tokens,
        "peers": {"released loop": {"ours": {"p50_ms": ms}}, "x": {"skipped": "no"}},
    }


def test_the_faster_backend_is_noted(tmp_path):
    """Over all shapes; an op that one backend did not run everywhere stays as it was."""
    rows = [
        timed("soft_experts", b, s, ms) for b, s, ms in (("cuda", "a", 1.0), ("triton", "a", 4.0), ("cuda", "b", 3.0), ("triton", "b", 1.0))
    ]
    rows += [timed("soft_gate", "cuda", "a", 2.0), timed("soft_gate", "triton", "a", 1.0)]
    rows += [timed("soft_gate", "cuda", "b", 1.0, 64), timed("soft_gate", "triton", "b", 2.0, 64)]
    rows += [timed("topk_gate", "cuda", "a", 1.0), timed("topk_gate", "triton", "a", 2.0), timed("topk_gate", "cuda", "b", 1.0)]
    steps = {step: {"rows": [row for at, row in rows if at == step]} for step in ("a", "b")} | {"golden": {"status": "passed"}}
    steps[f"{gpu_check.SM80} of a"] = {"rows": [timed("soft_gate", "cuda", "", 0.1)[1]]}  # not what auto would run
    results = {"steps": steps, "environment": {"capability": "9.0"}}
    unmeasured = {"few": "unmeasured", "many": "unmeasured"}
    assert {op: of for op, of in gpu_check.preferences(results).items() if of != unmeasured} == {
        "soft_experts": unmeasured | {"many": "cuda"},
        "soft_gate": {"few": "cuda", "many": "triton"},
    }
    table = tmp_path / "preferred.json"
    before = {"soft_gate": {"few": "cuda", "many": "cuda"}}
    table.write_text(json.dumps({"sm_80": before, "sm_90": {"topk_gate": before["soft_gate"]}}))
    gpu_check.note_preferences(results, table)
    noted = json.loads(table.read_text())
    assert noted["sm_80"] == before
    assert noted["sm_90"]["soft_gate"] == {"few": "cuda", "many": "triton"}
    assert noted["sm_90"]["soft_experts"] == {"few": "unmeasured", "many": "cuda"}
    assert noted["sm_90"]["topk_gate"] == before["soft_gate"]
    assert noted["sm_90"]["balance_loss"] == unmeasured
