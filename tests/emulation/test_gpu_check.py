"""`make gpu-check` on emulated kernels: its steps run as on a GPU, values first, and its times are of the backend "cuda"."""

import dataclasses
import json

import pytest

from tests.emulation import library

if not library.WANTED:
    pytest.skip("needs CMOE_EMULATE_CUDA=1", allow_module_level=True)

from benchmarks import gpu_check


@pytest.mark.costly
def test_values_and_times_of_emulated_kernels(tmp_path):
    named = {step.name: step for step in gpu_check.steps("cpu")}

    def less(name, *arguments):
        return dataclasses.replace(named[name], command=(*named[name].command, *arguments))

    todo = [less("values of the cuda kernels", "--sample", "7"), less("times: the ops", "--only", "soft_gate/tiny/T1/")]
    path = tmp_path / "gpu-cpu.json"
    results = gpu_check.check("cpu", todo, path, minutes=9)
    assert {name: step["status"] for name, step in results["steps"].items()} == {step.name: "passed" for step in todo}, results
    assert results["steps"]["values of the cuda kernels"]["tests"] == 7
    case = json.loads(path.read_text())["cases"]["soft_gate/tiny/T1/float32/cuda"]
    assert case["served_by"] == {"soft_gate": "cuda"}
    assert case["peers"]["torch"]["ratio"] > 0
    # Nothing is left to do, so the next call does nothing.
    assert gpu_check.check("cpu", todo, path, minutes=9) == results
