"""What a run records, how files merge, and what the report makes of them."""

import copy
import dataclasses
import importlib.util
import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import cases, machine, record, report, steps
from tests import passed

RUN = {
    "date": "2026-01-02 03:04 UTC",
    "commit": "0123456789ab",
    "torch": "2.13.0",
    "torch_capability": "AVX2",
    "python": "3.11.0",
    "threads": 1,
    "copy_gbps": 20.0,
    "kernels": "0123456789ab",
}


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch):
    monkeypatch.setattr(machine, "gemm_rate", lambda *_: 100.0)


def instance(key, **changes):
    found = cases.find(key)
    return dataclasses.replace(found, case=dataclasses.replace(found.case, **changes))


def measured(key="soft_gate/tiny/T64/float32", memory=False, **changes):
    return record.measure(instance(key, **changes), RUN, seconds=0, least=2, memory=memory)


def test_a_record_holds_times_ratio_rates_and_bytes():
    r = measured()
    assert r["ours"]["calls"] == 2 * len(r["peers"])
    assert r["ours"]["p20_ms"] <= r["ours"]["p50_ms"] <= r["ours"]["p80_ms"]
    torch_peer = r["peers"]["torch"]
    assert torch_peer["ratio"] == pytest.approx(torch_peer["p50_ms"] / torch_peer["ours_p50_ms"], rel=1e-2)
    assert r["ours"]["copy_share"] == pytest.approx(r["bytes"] / r["ours"]["p50_ms"] / 1e6 / RUN["copy_gbps"], rel=0.05, abs=1e-4)
    assert r["ours"]["saved_bytes"] == 0
    assert torch_peer["saved_bytes"] == 64 * 5 * 4 + 64 * 4  # sigmoid, its sum
    assert r["run"]["gemm_gflops"] == {"float32": 100.0}
    assert json.loads(json.dumps(r)) == r


def test_a_gpu_has_cases_rows_and_a_file_of_its_own():
    (ours,) = cases.select("soft_gate/tiny/T64", tiny=True, ours=["reference"])
    r = record.measure(ours, RUN, seconds=0, least=2, memory=False)
    assert ours.key == "soft_gate/tiny/T64/float32/reference"
    assert r["served_by"] == {"soft_gate": "reference"}
    found = {i.key for i in cases.select("soft_connector/released", device="cuda", ours=("triton", "cuda"))}
    assert {f"soft_connector/released/T{t}/bfloat16/{b}" for t in (1, 8192) for b in ("triton", "cuda")} <= found
    gpu = {"gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "gpu_memory_gib": 139.8}
    document = example() | {"suite": "gpu"}
    document["machine"] |= gpu
    assert report.slug(document) == "gpu-nvidia-h200"
    document["cases"] = {f"{key}/cuda": {**case, "backend": "cuda"} for key, case in document["cases"].items()}
    text = report.markdown([document], [])
    assert "NVIDIA H200 (compute capability 9.0, 132 SMs, 139.8 GiB) beside" in text
    assert "- soft_connector/released/T64/bfloat16/cuda: **0.50** of fused torch" in text


def test_no_peer_is_begun_after_the_time():
    r = record.measure(instance("soft_gate/tiny/T64/float32"), RUN, seconds=0, least=2, memory=False, until=0.0)
    assert set(r["skipped"].values()) == {record.NO_TIME}
    assert "ours" not in r
    assert "torch" in driver.describe(r)


def broken(side):
    """A soft_gate case in which one side gives a wrong result."""
    make = cases.CASES["soft_gate"].make

    def build(shape, tokens, dtype):
        work = make(shape, tokens, dtype)
        right = work.ours if side == "ours" else work.peers[side]

        def wrong():
            step = right()
            forward = step.forward
            step.forward = lambda: forward().flip(0)
            return step

        if side == "ours":
            work.ours = wrong
        else:
            work.peers[side] = wrong
        return work

    return build


def test_a_wrong_kernel_posts_no_time():
    r = measured(make=broken("ours"))
    assert "y: largest error" in r["wrong"]["ours"]
    assert not r["peers"]
    assert "p50_ms" not in r.get("ours", {})


def test_a_wrong_or_failing_peer_posts_no_time():
    make = cases.CASES["soft_gate"].make

    def build(shape, tokens, dtype):
        work = broken("reference")(shape, tokens, dtype)
        work.peers["absent"] = lambda: (_ for _ in ()).throw(steps.Skipped("it is not installed"))
        work.peers["failing"] = lambda: 1 / 0
        return work

    r = measured(make=build)
    if "reference" not in r["skipped"]:
        assert "y: largest error" in r["wrong"]["reference"]
    assert r["skipped"]["absent"] == "it is not installed"
    assert r["skipped"]["failing"].startswith("it failed: ZeroDivisionError")
    assert set(r["peers"]) == {"torch"}
    assert make is cases.CASES["soft_gate"].make


def test_a_kernel_that_raises_is_wrong():
    make = cases.CASES["soft_gate"].make

    def build(shape, tokens, dtype):
        work = make(shape, tokens, dtype)
        work.ours = lambda: 1 / 0
        return work

    r = measured(make=build)
    assert r["wrong"] == {"ours": "ZeroDivisionError: division by zero"}
    assert not r["peers"]


def test_a_case_that_cannot_run_says_why():
    def absent(shape, tokens, dtype):
        raise steps.Skipped("it is not written yet")

    r = measured(make=absent)
    assert r["skipped"] == {"ours": "it is not written yet"}
    assert not r["peers"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_of_a_process_of_its_own():
    peak = record.peak_bytes("soft_experts/tiny/T64/float32", "stacking torch", 1)
    assert peak is None or 0 <= peak < 2**30
    with pytest.raises(RuntimeError, match="no such peer"):
        record.peak_bytes("soft_experts/tiny/T64/float32", "no such peer", 1)


def test_merging_keeps_the_other_cases(tmp_path):
    path, described = tmp_path / "deep" / "results.json", {"cpu": "a cpu"}
    one, two = ({"case": name, "run": RUN} for name in ("one", "two"))
    record.merge(path, described, "one", one)
    record.merge(path, described, "two", two)
    record.merge(path, described, "one", {**one, "again": True})
    document = json.loads(path.read_text())
    assert document["cases"] == {"one": {**one, "again": True}, "two": two}
    assert document["threads"] == RUN["threads"]
    with pytest.raises(ValueError, match="another machine"):
        record.merge(path, {"cpu": "another cpu"}, "one", one)
    with pytest.raises(ValueError, match="another machine"):
        record.merge(path, described, "one", {**one, "run": {**RUN, "threads": 64}})
    assert json.loads(path.read_text()) == document
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_the_driver_runs_lists_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "copy_bandwidth", lambda *_: 20.0)
    assert driver.main(["--list", "--only", "gemm_dw"]) == 0
    assert "gemm_dw/released/T256/bfloat16" in capsys.readouterr().out
    out = tmp_path / "results.json"
    assert driver.main(["--quick", "--only", "gemm_dw/tiny/T64,topk_gate/tiny/T1/", "--threads", "1", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert set(document["cases"]) == {"gemm_dw/tiny/T64/bfloat16", "gemm_dw/tiny/T64/float32", "topk_gate/tiny/T1/float32"}
    assert document["machine"] == machine.describe()
    assert "ours is" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        driver.main(["--only", "nothing_of_the_kind"])


def test_missing_are_also_times_of_other_kernels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "copy_bandwidth", lambda *_: 20.0)
    out = tmp_path / "results.json"

    def run():
        driver.main(["--quick", "--missing", "--dtype", "bfloat16", "--only", "topk_gate/tiny", "--threads", "1", "--out", str(out)])
        return capsys.readouterr().out.count("ours is")

    assert [run(), run()] == [2 * 2, 0]
    document = json.loads(out.read_text())
    assert set(document["cases"]) == {"topk_gate/tiny/T1/bfloat16", "topk_gate/tiny/T64/bfloat16"}
    document["cases"]["topk_gate/tiny/T64/bfloat16"]["run"]["kernels"] = "of another day"
    out.write_text(json.dumps(document))
    assert [run(), run()] == [2, 0]


def test_the_kernels_of_a_time_are_its_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(passed, "ROOT", tmp_path)
    states = []
    kernels, others = ("csrc/a.cpp", "cmoe_kernels/a.py", "benchmarks/timer.py"), ("benchmarks/report.py", "benchmarks/results/a.json")
    for name in (*kernels, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
        states.append(passed.digest(machine.TIMED))
    assert len(set(states)) == 3
    assert len(set(states[2:])) == 1
    assert all((machine.ROOT / name).exists() for name in machine.TIMED)


def test_peaks_are_measured():
    assert machine.best(lambda: torch.mm(torch.ones(8, 8), torch.ones(8, 8)), calls=2) > 0
    described = machine.describe()
    assert described["cores"] >= 1
    assert (
        machine.slug({**described, "cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz", "flags": ["amx_bf16"]}, 2)
        == "cpu-intel-xeon-amx-bf16-2-threads"
    )


@pytest.mark.skipif(platform.system() != "Linux", reason="glibc's malloc reads these variables")
def test_a_run_that_keeps_pages_has_a_file_of_its_own():
    code = "from benchmarks import machine as m; m.keep_pages(); print(m.describe()['pages'], m.slug(m.describe(), 2))"
    kept = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout
    assert kept == f"kept {machine.slug(machine.describe(), 2)}-pages-kept\n"


def example(ratios=(0.5, 2.0)):
    """A document like those in benchmarks/results/, at a real shape."""
    side = {"p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.25, "calls": 9, "saved_bytes": 100}
    ours = {**side, "saved_bytes": 42, "gflops": 1500.0, "gbps": 1.0, "gemm_share": 0.3, "copy_share": 0.05, "peak_bytes": 5_000_000}
    document = {"suite": "cpu", "machine": machine.describe(), "threads": 1, "cases": {}}
    for tokens in (64, 256):
        document["cases"][f"soft_connector/released/T{tokens}/bfloat16"] = {
            "case": "soft_connector",
            "title": "soft connector, forward and all gradients",
            "shape": "released",
            "tokens": tokens,
            "dtype": "bfloat16",
            "run": {**RUN, "gemm_loop": "torch.mm 2048^3", "gemm_gflops": {"bfloat16": 5000.0}},
            "flops": 1.5e9,
            "bytes": 1e6,
            "baseline": "released loop",
            "served_by": {"soft_experts": "cpu"},
            "ours": ours,
            "peers": {
                n: {**side, "p50_ms": x, "ratio": x} for n, x in zip(("released loop", "fused torch"), reversed(ratios), strict=True)
            },
            "skipped": {"vllm": "not here"},
            "wrong": {"other": "y: largest error"},
        }
    return document


def test_the_report_shows_gains_losses_and_what_was_left_out():
    document = example()
    text = report.markdown([document], [])
    assert "- soft_connector/released/T64/bfloat16: **0.50** of fused torch" in text
    assert "- vllm: not here (soft_connector/released/T64/bfloat16, soft_connector/released/T256/bfloat16)" in text
    assert "- other: WRONG, not timed: y: largest error" in text
    assert "torch.mm 2048^3 reaches bfloat16 5000 GFLOP/s" in text


def test_a_skipped_and_a_tiny_case_do_not_enter_the_tables():
    document = example()
    cases_ = document["cases"]
    skipped = copy.deepcopy(cases_["soft_connector/released/T64/bfloat16"])
    for name in ("ours", "flops", "bytes", "baseline", "served_by"):
        del skipped[name]
    cases_["soft_connector_prepacked/released/T64/bfloat16"] = {**skipped, "case": "soft_connector_prepacked", "peers": {}, "wrong": {}}
    cases_["soft_connector/tiny/T64/bfloat16"] = {**copy.deepcopy(cases_["soft_connector/released/T64/bfloat16"]), "shape": "tiny"}
    assert report.losses(document) == report.losses(example())
    assert "soft_connector_prepacked" in report.markdown([document], []).split("### Not timed")[1]
    assert "tiny" not in report.markdown([document], [])


def test_plots_repeat_byte_for_byte(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for plot in (report.plot_ratios, report.plot_roofline):
        for name in ("one.svg", "two.svg"):
            plot(example(), tmp_path / name)
        drawn = [(tmp_path / name).read_bytes() for name in ("one.svg", "two.svg")]
        assert drawn[0] == drawn[1]
        assert b"soft_connector" in drawn[0]
        assert len(drawn[0]) < 200_000


def test_readme_is_that_of_the_results():
    documents, models = record.documents(), record.documents(suites=[report.MODELS])
    text = report.README.read_text()
    assert report.insert(text, report.readme(documents, models)) == text, "run `make bench-report`"
    assert [
        line.split(" | ")[0].strip("| ")
        for line in text.splitlines()
        if any(line.startswith(f"| {t} |") for t in report.README_ROWS.values())
    ] == list(report.README_ROWS.values())


def test_readme_names_gains_and_losses(monkeypatch):
    document = example()
    key = "soft_connector/released/T64/bfloat16"
    monkeypatch.setattr(report, "README_MACHINE", report.slug(document))
    monkeypatch.setattr(report, "README_ROWS", {key: "a step"})
    text = report.readme([document], [{**document, "cases": {}}])
    assert "| a step | 2.00 | **0.50** (fused torch) |" in text
    assert "All 4 comparisons, with the 2 that we lose" in text


def test_the_report_of_whole_models():
    sides = {name: {"p20_ms": x, "p50_ms": x, "p80_ms": x, "calls": 3} for name, x in (("ours", 2.0), ("eager", 6.0), ("grouped_mm", 1.0))}
    run = {**RUN, "transformers": "5.23.0", "served_by": "cpu"}
    case = {"tokens": 256, "step": "train", "layers": 2, "error": 0.01, "ours": sides.pop("ours"), "run": run}
    case["peers"] = {name: {**side, "ratio": side["p50_ms"] / 2} for name, side in sides.items()}
    case["skipped"] = {"batched_mm": "it would copy 12 GiB of weights per layer"}
    lora = {
        "experts": 32,
        "tokens": 64,
        "rank": 16,
        "weights_bytes": 2**20,
        "frozen_peak_bytes": 2**20,
        "lora_peak_bytes": {"cmoe": 3 * 2**20},
    }
    document = {"suite": report.MODELS, "machine": machine.describe(), "threads": 2, "cases": {"train/T256": case}, "lora": lora}
    text = report.markdown([], [document])
    assert "| training step | 256 | 2 | 2 to 2 | 6 | 3.00 |  |  | 1 | **0.50** |" in text
    assert "Ours is slower in 1: training step, T = 256: **0.50** of grouped_mm." in text
    assert "batched_mm: it would copy 12 GiB of weights per layer (training step, T = 256)" in text
    assert "3 MiB (3.0 times the experts' weights) under cmoe" in text


def test_readme_without_markers_is_an_error():
    with pytest.raises(ValueError, match="once"):
        report.insert("nothing", "table")


@pytest.mark.skipif(importlib.util.find_spec("pytest_benchmark") is None, reason="pytest-benchmark is not installed")
def test_history_runs_when_asked(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/history.py", "-k", "topk_gate and tiny and T64", "-p", "no:cacheprovider"]
    # pytest-benchmark times nothing in a worker of xdist, which this process may be and that one is not.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--benchmark-json={tmp_path / 'history.json'}"], cwd=machine.ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    timed = json.loads((tmp_path / "history.json").read_text())["benchmarks"]
    assert [t["params"]["instance"] is not None for t in timed] == [True]
    assert timed[0]["extra_info"]["served_by"]["topk_gate"] in ("cpu", "reference")
