import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from unimed.train.recipe import RECIPES

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_every_shipped_configuration_is_named_here():
    assert {path.stem for path in (RECIPES / "accelerate").glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_accelerate_reads_the_shipped_configurations(name, kind):
    path = str(RECIPES / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.distributed_type == kind
    arguments = launch_command_parser().parse_args(["--config_file", path, "--num_processes", "4", "-m", "unimed", "train", "tiny"])
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        return
    chosen = _validate_launch_command(arguments)[0]
    assert (chosen.module, chosen.training_script, chosen.num_processes) == (True, "unimed", 4)
    environment = prepare_multi_gpu_env(chosen)
    assert (environment.get("FSDP_VERSION"), environment.get("ACCELERATE_USE_FSDP")) == (("2", "true") if name == "fsdp2" else (None, None))


def test_the_slurm_script_is_bash_and_starts_torchrun_on_every_machine(tmp_path):
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    wrong = subprocess.run(["bash", script, "tiny"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "slurm.sh: give the run a name with --name NAME\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, line in {"scontrol": "printf 'node1\\nnode2\\n'", "srun": 'echo "$OMP_NUM_THREADS" "$@"'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    numbers = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_ID": "7"}
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", **numbers}
    command = ["bash", script, "tiny", "--name", "full"]
    for resume in ("", " --resume"):
        shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        start = "8 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 7 --rdzv-endpoint node1:29500"
        assert shown.stdout == f"{start} -m unimed train tiny --name full{resume}\n"
        (tmp_path / "runs" / "full").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "full" / "recipe.yaml").touch()


def test_the_ray_example_says_what_it_would_do(monkeypatch, capsys, tmp_path):
    from examples.cluster import ray_train

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ray_train.py", *arguments, "--storage", str(tmp_path)])
        code = ray_train.main()
        return code, *capsys.readouterr()

    said = f"would train tiny with 3 workers on CPUs in {tmp_path}/runs\n"
    assert run("tiny", "--workers", "3", "--cpu", "--dry-run", "train.max_steps=5") == (0, said, "")
    code, _, error = run("tiny", "train.max_step=5", "--dry-run")
    assert code == 2
    assert "train.max_steps" in error
    monkeypatch.setitem(sys.modules, "ray.train", None)
    assert run("tiny") == (2, "", "error: the package ray is not installed; get it with: pip install 'ray[train]'\n")
    assert not list(tmp_path.iterdir())
