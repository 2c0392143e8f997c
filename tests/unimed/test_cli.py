import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unimed.cli import app as cli
from unimed.cli import shared
from unimed.cli import train as train_commands

ROOT = Path(__file__).resolve().parents[2]
NOTICE = "Research use, not for diagnosis"
pytestmark = pytest.mark.usefixtures("without_java")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def shell(*arguments, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "unimed", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.fixture
def at_work(small_run, monkeypatch):
    monkeypatch.chdir(small_run.parents[1])
    return small_run


def test_help_is_quick_and_teaches(tmp_path):
    heavy = ("torch", "transformers", "numpy", "matplotlib", "omegaconf")
    code = f"import sys, unimed.cli.app; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert loaded.stdout.strip() == "[]"
    shown = shell("--help", cwd=tmp_path)
    assert shown.returncode == 0
    for name in ("train", "evaluate", "predict", "report", "demo", "doctor", "sample", "estimate", "convert"):
        assert name in shown.stdout
    assert NOTICE in shown.stdout


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "report", "demo", "doctor", "estimate"])
def test_every_command_has_an_example_and_the_notice(name):
    shown = run(name, "--help").output
    assert "Example" in shown
    assert f"unimed {name}" in shown
    assert NOTICE in shown


def test_version():
    shown = run("--version")
    assert shown.exit_code == 0
    assert "unimed" in shown.output
    assert NOTICE in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "tiny", "train.max_stepz=5"], ["train.max_stepz", "5", "train.max_steps"]),
        (["train", "gigantic"], ["gigantic", "tiny"]),
        (["train", "unimed-7b-release"], ["'unimed-7b-release' cannot run here", "unimed convert eva", "unimed train tiny"]),
        (["train", "tiny", "--llm", "gpt"], ["gpt", "smollm2"]),
        (["train", "tiny", "--name", "../outside"], ["../outside"]),
        (["train", "tiny", "data.root=nowhere"], ["nowhere", "unimed sample build"]),
        (["evaluate", "nothing"], ["nothing", "small"]),
        (["report", "nothing"], ["nothing", "small"]),
        (["predict", "x.png", "what", "--task", "speech"], ["speech", "vqa, refer, identify, caption, cls, qa"]),
        (["predict", "absent.png", "what"], ["absent.png"]),
        (["predict", "corrupt.png", "what"], ["corrupt.png", "not a readable image"]),
        (["predict", "corrupt.dcm", "what"], ["corrupt.dcm"]),
        (["predict", "corrupt.nii.gz", "what"], ["corrupt.nii.gz"]),
        (["predict", "x.png", "what", "--model", "nothing"], ["nothing", "small"]),
        (["predict", "corrupt.png", "what", "--window", "high"], ["--window high"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(at_work, arguments, words):
    for name in ("corrupt.png", "corrupt.dcm", "corrupt.nii.gz"):
        Path(name).write_bytes(b"not an image")
    result = run(*arguments)
    assert result.exit_code == 2
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_strict_stops_training_and_evaluation_at_the_first_bad_record(at_work, small_overrides, tmp_path):
    from data_samples import slake

    slake(tmp_path / "data", detections=[{"Liver": [90, 2, 8, 8]}])
    overrides = [text for text in small_overrides if not text.startswith(("data.root", "name="))]
    root = f"data.root={tmp_path / 'data'}"
    for command in (["train", "tiny", *overrides, root, "--name", "strict"], ["evaluate", "small", root, "evaluate.splits=[train]"]):
        result = run(*command, "--strict")
        assert result.exit_code == 2
        (line,) = result.output.strip().splitlines()
        assert re.match(r"error: \S+/data/imgs/xmlab0/detection\.json\[0\]: the box of 'Liver' is", line)
    assert not Path("runs/strict").exists()


def test_debug_shows_the_traceback_anywhere_on_the_line(tmp_path):
    plain = shell("train", "tiny", "train.max_stepz=5", cwd=tmp_path)
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert len(plain.stderr.strip().splitlines()) == 1
    deep = shell("train", "tiny", "train.max_stepz=5", "--debug", cwd=tmp_path)
    assert "Traceback" in deep.stderr
    assert "UserError" in deep.stderr


@pytest.mark.parametrize("missing", ["typer", "omegaconf"])
def test_without_its_packages_unimed_says_how_to_get_them(tmp_path, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['unimed', 'train']; from unimed.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert shown.stderr.strip().splitlines() == [
        f'error: the package {missing} is not installed; get all that unimed needs with: pip install "cmoe-kernels[unimed]"'
    ]


def test_what_needs_no_model_is_said_before_torch_is_imported(tmp_path):
    """One process, one line each: torch and transformers take seconds."""
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    (tmp_path / "runs" / "done" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "done" / "model" / "config.json").write_text("{}")
    for name in ("begun", "done"):
        (tmp_path / "runs" / name / "recipe.yaml").write_text("data:\n  root: gone\n")
    code = """
import sys
from typer.testing import CliRunner
from unimed.cli import app
for line in sys.stdin.read().splitlines():
    shown = CliRunner().invoke(app.app, line.split(), env={"COLUMNS": "400"})
    print(shown.exit_code, [name for name in ("torch", "transformers", "gradio") if name in sys.modules], shown.output.strip())
"""
    lines = {
        "train tiny": "no such folder; make the sample with",
        "train tiny data.sets.mine.root=gone": "data.sets.mine.root=gone: no such folder",
        "train tiny --name begun": "this run exists",
        "train unimed-7b-release": "is missing",
        "predict missing.png what? --model done": "missing.png: no such image",
        "predict missing.png what? --model begun": "no trained model there",
        "chat missing.png --model begun": "missing.png: no such image",
        "evaluate gone": "no run 'gone'",
        "evaluate begun": "no trained model there",
        "evaluate done": "data.root=gone: no such folder",
        "evaluate done --data gone": "--data gone: no such folder",
        "merge begun --out new": "no trained model there",
        "report gone": "no run 'gone'",
        "page --model begun": "no trained model there",
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    shown = done.stdout.splitlines()
    assert len(shown) == len(lines)
    for (line, said), given in zip(lines.items(), shown, strict=True):
        assert given.startswith("2 [] error: "), (line, given)
        assert said in given, (line, given)


def test_the_installed_command_is_the_one_that_says_so():
    assert 'unimed = "unimed.__main__:main"' in (ROOT / "pyproject.toml").read_text().splitlines()


def test_warnings_are_one_line_and_libraries_keep_theirs(monkeypatch):
    def lines():
        warnings.warn("the router never trains;\n  give an auxiliary loss", stacklevel=1)
        warnings.warn_explicit("inner workings", FutureWarning, "x.py", 1, module="transformers.modeling_utils")
        yield "a", "b"

    monkeypatch.setattr("unimed.doctor.lines", lines)
    shown = run("doctor").output
    assert "warning: the router never trains; give an auxiliary loss\n" in shown
    assert "inner workings" not in shown


def test_the_doctor_lists_what_the_full_size_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("unimed.doctor.lines", lambda: [])
    eva = tmp_path / "weights" / "eva-vit-g"
    eva.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (eva / name).touch()
    (tmp_path / "sets" / "slake" / "imgs").mkdir(parents=True)
    (tmp_path / "sets" / "slake" / "train.txt").touch()
    shown = run("doctor", "--checkpoints", str(tmp_path / "weights"), "--data", str(tmp_path / "sets")).output
    of = {line.split()[0]: line for line in shown.splitlines() if re.match(r"(vision|language|data)\.", line)}
    assert len(of) == 10
    found = {key for key, line in of.items() if "found: " in line}
    assert found == {"vision.from", "data.sets.slake"}
    assert re.search("licence: Llama 2 Community License; unimed convert llama", of["language.from"])
    assert all("http" in line and "licence: " in line for line in of.values())


def test_the_doctor_names_only_packages_that_something_imports():
    from unimed.doctor import OPTIONAL

    source = "".join(path.read_text() for path in (ROOT / "unimed").rglob("*.py"))
    for name in {*OPTIONAL, "sacrebleu"}:
        imported = re.search(rf"^\s*(import|from) {name}\b|find_spec\(\"{name}\"\)", source, re.MULTILINE)
        assert (name in OPTIONAL) <= bool(imported), name


def test_the_doctor_prints_the_command_that_installs(tmp_path, monkeypatch):
    from unimed import INSTALL, doctor

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "lines", lambda: [("pydicom", f"missing; {INSTALL}")])
    assert "[unimed]" in INSTALL
    assert INSTALL in run("doctor").output


def test_a_run_goes_on_with_nothing_typed_again(at_work, tmp_path, monkeypatch):
    shutil.copytree(at_work, tmp_path / "runs" / "small")
    monkeypatch.chdir(tmp_path)
    shown = run("train", "--name", "small", "--resume", "train.threads=1", "evaluate.limit=2")
    assert shown.exit_code == 0, shown.output
    assert "resuming runs/small by its own recipe.yaml" in shown.output
    refused = run("train", "tiny", "optim.lr=0.5", "--name", "small", "--resume")
    assert refused.exit_code == 2
    assert "optim.lr=0.5" in refused.output
    assert run("train", "--name", "absent", "--resume").output.strip() == (
        "error: runs/absent: nothing to resume: no recipe.yaml there; leave out --resume to start"
    )


def test_the_demo_replaces_only_what_it_made(at_work, small_overrides, tmp_path, monkeypatch):
    shutil.copytree(at_work, tmp_path / "runs" / "small")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for name in (["--name", "small"], ["name=small"]):
        shown = run("demo", *small_overrides, "train.max_steps=2", "train.save_every=2", *name)
        assert shown.exit_code == 2
        assert shown.output.strip() == (
            "error: runs/small: exists, and unimed demo did not make it; choose another --name, or replace it with --overwrite"
        )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    train_commands._may_replace(Path("runs/small"), overwrite=True)
    start = Path("runs/small/start.json")
    start.write_text(json.dumps({**json.loads(start.read_text()), "command": "demo"}))
    train_commands._may_replace(Path("runs/small"), overwrite=False)


def test_commands_for_one_process_say_so_under_torchrun(at_work, monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    shown = run("evaluate", "small")
    assert shown.exit_code == 2
    assert shown.output.strip() == "error: unimed evaluate: runs in one process; only unimed train runs under torchrun"
    monkeypatch.setenv("RANK", "1")
    assert run("evaluate", "small").output == ""


def test_a_device_that_is_not_there_is_one_line(at_work, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    question = ["predict", "-", "where is the liver?", "--task", "qa", "--model", "small"]
    for device, words in (("cuda", "PyTorch finds no GPU here"), ("tpu", "must be auto, cpu, cuda, or cuda:N")):
        for command in (question, ["evaluate", "small"]):
            shown = run(*command, "--device", device)
            assert shown.exit_code == 2
            assert words in shown.output
            assert len(shown.output.strip().splitlines()) == 1
    assert run(*question, "--device", "cpu").exit_code == 0


def test_predicting_reads_the_model_once_and_verifies_on_request(at_work, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(at_work / "model", folder)
    card = folder / "README.md"
    card.write_bytes(card.read_bytes()[:-2] + b"?\n")  # the same size
    hashed = []
    monkeypatch.setattr("unimed.io.sha256", lambda path: hashed.append(path.name) or "")
    question = ["predict", "-", "where is the liver?", "--task", "qa", "--model", folder]
    assert run(*question).exit_code == 0
    assert hashed == ["manifest.json"]  # by which answers of other weights are told apart
    monkeypatch.undo()
    shown = run(*question, "--verify")
    assert shown.exit_code == 2
    assert "README.md is not what was written (sha256 differs)" in shown.output


def test_no_trained_model_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("predict", "x.png", "what")
    assert result.exit_code == 2
    assert "unimed demo" in result.output


def test_a_model_with_missing_or_extra_keys_is_refused(at_work, tmp_path):
    from safetensors.torch import load_file, save_file

    for change in ("missing", "extra"):
        folder = tmp_path / change
        shutil.copytree(at_work / "model", folder)
        (folder / "manifest.json").unlink()
        weights = load_file(folder / "model.safetensors")
        if change == "missing":
            weights.pop(next(key for key in weights if "connector" in key))
        else:
            weights["connector.surplus"] = next(iter(weights.values())).clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        result = run("predict", "-", "where is the liver?", "--task", "qa", "--model", folder)
        assert result.exit_code == 2
        assert change in result.output
        assert "connector" in result.output


def test_a_corrupt_model_is_refused(at_work, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(at_work / "model", folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    result = run("predict", "-", "where is the liver?", "--task", "qa", "--model", folder)
    assert result.exit_code == 2
    assert "corrupt" in result.output


def test_predicting_prints_answer_and_notice_and_draws_the_box(at_work, sample_folder, tmp_path):
    image = sample_folder / "images" / "ct_axial_014.jpg"
    drawn = tmp_path / "boxed.png"
    result = run("predict", image, "5,5,15,15", "--task", "identify", "--save", drawn)
    assert result.exit_code == 0, result.output
    assert NOTICE in result.output
    assert "5, 5, 15, 15" in result.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["boxed.png"]


def test_the_demo_does_it_all_and_answers_as_the_readme_says(small_overrides, sample_folder, tmp_path, monkeypatch):
    """README's commands from `make demo` on, in their folder; of the demo 40 steps of a smaller model and two items a task."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sample_folder, ".cache/unimed/sample")
    overrides = [text for text in small_overrides if not text.startswith(("name=", "data.root=", "evaluate.limit=", "train.max_steps="))]
    result = run("demo", *overrides, "train.max_steps=40", "train.save_every=40", "evaluate.limit=2")
    assert result.exit_code == 0, result.output
    (asked,) = re.findall(r"^    \.venv/bin/unimed (predict .*)$", (ROOT / "README.md").read_text(), flags=re.M)
    answered = run(*shlex.split(asked))
    drawn = answered.exit_code == 0 and Path("boxed.png").stat().st_size > 0
    assert drawn or "there is no box to draw" in answered.output, answered.output  # after 40 steps an answer need not hold one
    made = tmp_path / "runs" / "demo"
    names = {path.name for path in made.iterdir()}
    assert {"report.html", "metrics.json", "predictions.jsonl", "metrics.jsonl", "router.json", "model"} <= names
    for words in (
        NOTICE,
        "majority answer",
        "image blanked",
        "untrained",
        "mean gate of each expert",
        "report.html",
        "scored strictly",
        "repeats count",
    ):
        assert words in result.output
    assert "…" not in result.output  # no figure is cut in 80 columns


def test_garbage_is_collected_again_after_imports():
    with shared.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), shared.importing():
        raise ImportError
    assert gc.isenabled()


def test_the_demo_prepares_batches_beside_where_there_is_a_second_core(monkeypatch, tmp_path):
    from unimed.cli import train

    seen = []
    monkeypatch.chdir(tmp_path)
    for name in ("build", "score", "write_report"):
        monkeypatch.setattr(train, name, lambda *a, **k: None)
    monkeypatch.setattr(train, "_train", lambda recipe, *a, **k: seen.append(recipe.data.workers))
    for cores, given in ((1, []), (2, []), (2, ["data.workers=0"])):
        monkeypatch.setattr(train.os, "cpu_count", lambda cores=cores: cores)
        train.demo(given, None, "tiny", False)
    assert seen == [0, 1, 0]
