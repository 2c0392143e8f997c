"""The `unimed` command. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from unimed import NOTICE
from unimed.cli import data as data_commands
from unimed.errors import UserError

RUNS = Path("runs")

console = Console()
errors = Console(stderr=True)
debugging = False

app = typer.Typer(
    name="unimed",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog=f"[bold red]{NOTICE}.[/]",
    help=(
        "Uni-Med: one medical vision-language model for six tasks, with a mixture of experts as its connector.\n\n"
        "Start here:\n\n"
        "  [cyan]unimed demo[/]                    sample, training, evaluation, report\n\n"
        "  [cyan]unimed predict ct.png liver --task refer[/]   ask the newest model\n\n"
        "  [cyan]unimed COMMAND --help[/]          what a command does, with examples"
    ),
)
sample_app = typer.Typer(no_args_is_help=True, help="The small CT and MR data set that the demo learns from.", epilog=f"{NOTICE}.")
app.add_typer(sample_app, name="sample")
data_app = typer.Typer(no_args_is_help=True, help="Own data: import it, check it, count it.", epilog=f"{NOTICE}.")
app.add_typer(data_app, name="data")

Overrides = Annotated[list[str] | None, typer.Argument(help="dotted recipe overrides, for example train.max_steps=50", show_default=False)]
Strict = Annotated[bool, typer.Option("--strict", help="stop at the first bad record of the data (data.strict=true)")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N")]
Verify = Annotated[bool, typer.Option("--verify", help="hash the model's files before they are read")]
RunPath = Annotated[str, typer.Argument(help="a run: its name under runs/, or its folder")]


def command(owner: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose UserErrors become one line and exit code 2 (with --debug: the traceback)."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                if name != "train" and _rank() is not None:
                    raise UserError(f"unimed {name}: runs in one process; only unimed train runs under torchrun")
                with warnings.catch_warnings():
                    _quiet_libraries()
                    body(*args, **kwargs)
            except (UserError, OSError) as error:
                if debugging:
                    raise
                if _reports_errors():
                    errors.print("[bold red]error:[/] ", end="")
                    errors.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                errors.print("stopped")
                raise typer.Exit(130) from None

        return owner.command(name, epilog=f"{NOTICE}.")(run)

    return register


def _rank() -> int | None:
    """This process's number among those of torchrun; None for a single process."""
    many = "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    return int(os.environ.get("RANK", "0")) if many else None


def _reports_errors() -> bool:
    """Before the processes of torchrun have found each other, all meet the same error: the first one says it."""
    distributed = sys.modules.get("torch.distributed")
    return not _rank() or (distributed is not None and distributed.is_initialized())


def _quiet_libraries() -> None:
    """Warnings are one line each; those that libraries raise about their own insides are left out (with --debug: everything)."""
    import logging

    if _rank():  # the first process says what all find in the data
        logging.getLogger("unimed").setLevel(logging.ERROR)
    if debugging:
        return
    for library in ("transformers", "accelerate", "peft", "torch", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def _show_warning(message: Warning | str, *where: Any) -> None:
    if not _rank():
        errors.print("[bold yellow]warning:[/] ", end="")
        errors.print(" ".join(str(message).split()), markup=False, highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            console.print(f"unimed {version('cmoe-kernels')} · {NOTICE}", highlight=False)
        except PackageNotFoundError:
            console.print(f"unimed, not installed as a package · {NOTICE}", highlight=False)
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version and stop")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; may stand anywhere on the line")] = False,
) -> None:
    pass


@command(sample_app, "build")
def sample_build(
    out: Annotated[Path, typer.Option(help="folder of the data set")] = Path(".cache/unimed/sample"),
) -> None:
    """Cut the vendored CT and MR volumes into slices with questions, boxes and synthetic reports.

    Works offline, gives the same bytes every time, and does nothing when the sample is there already.

    Example: [cyan]unimed sample build[/]
    """
    _build_sample(out)


@command(sample_app, "fetch")
def sample_fetch(
    dest: Annotated[Path, typer.Option(help="folder for the archives")] = Path(".cache/unimed/archives"),
    names: Annotated[list[str] | None, typer.Argument(help="which archives; all of them by default", show_default=False)] = None,
) -> None:
    """Download the larger archives (more volumes, SmolLM2), each checked against its pinned sha256.

    Example: [cyan]unimed sample fetch[/]
    """
    from unimed.sample.archives import fetch_sample

    with _bar() as progress:
        task = progress.add_task("fetching", total=None, note="")
        fetch_sample(dest, names or None, progress=lambda done, total, what: progress.update(task, completed=done, total=total, note=what))
    console.print(f"archives are in {dest} · {NOTICE}", highlight=False)


for _name, _body in data_commands.COMMANDS.items():
    command(data_app, _name)(_body)


@command(app, "train")
def train(
    recipe: Annotated[str, typer.Argument(help="tiny, smollm2, released, or a YAML file")] = "tiny",
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="the run's name; by default the recipe's")] = None,
    llm: Annotated[str | None, typer.Option(help="the language model: tiny or smollm2")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's last checkpoint, by the run's own recipe")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start again where a run of this name exists")] = False,
    strict: Strict = False,
) -> None:
    """Train a model by a recipe; the run goes to runs/NAME.

    Examples:

      [cyan]unimed train[/]                                            the tiny recipe

      [cyan]unimed train tiny train.max_steps=50 connector.router=hard --name hard[/]

      [cyan]unimed train --name hard --resume[/]                       after it was interrupted; nothing needs to be typed again

      [cyan]unimed train --llm smollm2[/]                              SmolLM2-135M with LoRA

      [cyan]unimed train tiny data.sets.mine.root=mine --name mine[/]  own data (unimed data import)

      [cyan]torchrun --nproc-per-node 2 -m unimed train[/]             two processes, each with its own batches
    """
    if "=" in recipe:  # an override, and the recipe left out
        recipe, overrides = "tiny", [recipe, *(overrides or [])]
    overrides = [*(overrides or []), *["data.strict=true"] * strict]
    if resume:
        loaded, run = _stored_recipe(recipe, llm, overrides, name)
    else:
        loaded = _recipe(recipe, llm, overrides, name)
        run = RUNS / loaded.name
    _train(loaded, run, resume, overwrite)


@command(app, "evaluate")
def evaluate(run: RunPath, overrides: Overrides = None, device: Device = "auto", verify: Verify = False, strict: Strict = False) -> None:
    """Score a run on the held-out slabs and the held-out subject, beside answers that need no image.

    Writes metrics.json and predictions.json into the run.

    Examples:

      [cyan]unimed evaluate tiny[/]

      [cyan]unimed evaluate tiny evaluate.limit=20 'evaluate.splits=[slab]'[/]
    """
    _evaluate(_run_folder(run), [*(overrides or []), *["data.strict=true"] * strict], device, verify)


@command(app, "report")
def report(run: RunPath) -> None:
    """Write the run's report.html: the table, boxes on slices, answers, losses, router gates. One file, no network.

    Example: [cyan]unimed report tiny[/]
    """
    _report(_run_folder(run))


@command(app, "predict")
def predict(
    image: Annotated[str, typer.Argument(help="png, jpg, tiff, DICOM or NIfTI file, or folder or zip of a DICOM series; - for qa")],
    question: Annotated[str, typer.Argument(help="the question; an organ for refer, a box x1,y1,x2,y2 in pixels for identify")] = "",
    task: Annotated[str, typer.Option(help="vqa, refer, identify, caption, cls or qa")] = "vqa",
    model: Annotated[str | None, typer.Option(help="a run or a saved model; by default the newest run")] = None,
    save: Annotated[Path | None, typer.Option(help="refer, identify: write the image with its box drawn here")] = None,
    plane: Annotated[str, typer.Option(help="volumes: axial, coronal or sagittal")] = "axial",
    index: Annotated[int | None, typer.Option("--slice", help="volumes, frames, pages: which one; the middle one by default")] = None,
    window: Annotated[str | None, typer.Option(help="grey images: lowest,highest value shown, for example --window=-160,240")] = None,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Answer one question about one image.

    Examples:

      [cyan]unimed predict slice.png 'which plane is shown' --task vqa[/]

      [cyan]unimed predict ct.nii.gz liver --task refer --slice 12 --save boxed.png[/]

      [cyan]unimed predict slice.png 12,30,80,96 --task identify[/]

      [cyan]unimed predict slice.png --task caption[/]

      [cyan]unimed predict - 'Which organ makes bile?' --task qa[/]
    """
    from unimed.inference.ask import ask
    from unimed.tasks import TASKS

    _no_bars_of_transformers()
    answer = ask(image, question, task, _model_folder(model), plane, index, window, device, verify)
    console.print(answer.text, highlight=False, markup=False, soft_wrap=True)
    if answer.box is not None:
        corners = ", ".join(f"{value:.0f}" for value in answer.box)
        console.print(f"box in pixels (x1, y1, x2, y2): {corners} of {answer.size[0]} x {answer.size[1]}", highlight=False)
        if answer.original and max(abs(one - other) for one, other in zip(answer.original, answer.box, strict=True)) > 0.01:
            corners = ", ".join(f"{value:.0f}" for value in answer.original)
            console.print(f"the same in pixels (in a volume: voxels) of the file: {corners}", highlight=False)
    elif TASKS[task].box == "answer":
        console.print("the answer holds no readable box", style="yellow")
    if save is not None:
        answer.draw(save)
        console.print(f"drawn in {save}", highlight=False)
    console.print(f"{answer.note}{NOTICE}", style="dim", highlight=False, markup=False, soft_wrap=True)


@command(app, "demo")
def demo(
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="the run's name; demo by default")] = None,
    llm: Annotated[str | None, typer.Option(help="the language model: tiny or smollm2")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a run of this name that another command made")] = False,
) -> None:
    """The whole job: build the sample, train the tiny model, evaluate it, write the report.

    It starts again each time, and replaces the run that it made before.

    Examples:

      [cyan]unimed demo[/]

      [cyan]unimed demo --llm smollm2[/]

      [cyan]unimed demo train.max_steps=20 evaluate.limit=5[/]    a quick look
    """
    start = time.perf_counter()
    # Overrides come after the default, so name=x holds; --name comes after both.
    loaded = _recipe("tiny", llm, ["name=demo", *(overrides or [])], name)
    if loaded.data.sets or not loaded.data.root:
        raise UserError("unimed demo: trains on the built-in sample; for own data: unimed train tiny data.sets.NAME.root=FOLDER")
    run = RUNS / loaded.name
    _may_replace(run, overwrite)
    _build_sample(Path(loaded.data.root))
    _train(loaded, run, resume=False, overwrite=True, command="demo")
    _evaluate(run, None)
    _report(run)
    console.print(f"demo: {(time.perf_counter() - start) / 60:.1f} minutes in all", highlight=False)


@command(app, "doctor")
def doctor() -> None:
    """Say what is installed, which kernels this machine uses, and what is missing for what.

    Example: [cyan]unimed doctor[/]
    """
    from unimed.doctor import lines

    for title, text in lines():
        console.print(f"[bold]{title:<24}[/] {escape(text)}", highlight=False, soft_wrap=True)
    from cmoe_kernels.doctor import report as kernels

    console.print(f"\n{kernels()}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{NOTICE}.", style="bold red")


def _no_bars_of_transformers() -> None:
    """Its bars for files that are read in a moment come between ours."""
    if not debugging:
        from transformers.utils import logging

        logging.disable_progress_bar()


def _recipe(recipe: str, llm: str | None, overrides: list[str] | None, name: str | None) -> Any:
    from unimed.train import config

    if llm not in (None, "tiny", "smollm2"):
        raise UserError(f"--llm {llm}: no such language model; valid are tiny, smollm2")
    if llm and recipe != llm:
        if recipe not in ("tiny", "smollm2"):
            raise UserError(f"--llm {llm}: chooses between the recipes tiny and smollm2; for {recipe} set language.kind instead")
        recipe = llm
    return config.load(recipe, [*(overrides or []), *([f"name={name}"] if name is not None else [])])


def _stored_recipe(recipe: str, llm: str | None, overrides: list[str] | None, name: str | None) -> tuple[Any, Path]:
    """The recipe and folder of the run to go on with; `recipe` only names it where nothing else does."""
    from unimed.train.run import stored_recipe

    names = [text for text in overrides or [] if text.startswith("name=")]
    run = RUNS / _recipe(recipe, llm, names, name).name
    loaded = stored_recipe(run, [text for text in overrides or [] if text not in names])
    if not _rank():
        console.print(f"resuming {run} by its own recipe.yaml", highlight=False)
    return loaded, run


def _may_replace(run: Path, overwrite: bool) -> None:
    from unimed.train.run import RECIPE_FILE, started_with

    if (run / RECIPE_FILE).exists() and not overwrite and started_with(run).get("command") != "demo":
        raise UserError(f"{run}: exists, and unimed demo did not make it; choose another --name, or replace it with --overwrite")


def _bar() -> Any:
    from unimed.train.progress import bar

    return bar(console)


def _build_sample(out: Path) -> None:
    from unimed.sample.build import build_sample

    with _bar() as progress:
        task = progress.add_task("sample", total=None, note="")
        build_sample(out, progress=lambda done, total, what: progress.update(task, completed=done, total=total, note=what))
    console.print(f"sample: {out} · {NOTICE}", highlight=False)


def _train(recipe: Any, run: Path, resume: bool, overwrite: bool, command: str = "train") -> None:
    from unimed.train import processes
    from unimed.train.progress import TrainingProgress
    from unimed.train.run import train as run_training

    _no_bars_of_transformers()
    run_training(recipe, run, resume, overwrite, [TrainingProgress(console)], command)
    processes.end()
    if not _rank():
        console.print(f"trained: {run}/model · {NOTICE}", highlight=False)


def _evaluate(run: Path, overrides: list[str] | None, device: str = "auto", verify: bool = False) -> None:
    from rich.table import Table

    from unimed.evaluate.evaluate import TRAINED
    from unimed.evaluate.run import answer_table, evaluate_run, odd_answers
    from unimed.tasks import TASKS

    _no_bars_of_transformers()
    with _bar() as progress:
        tasks: dict[str, Any] = {}

        def show(split: str, row: str, done: int, total: int) -> None:
            key = f"{split}: {row}"
            if key not in tasks:
                tasks[key] = progress.add_task(key, total=total, note="")
            progress.update(tasks[key], completed=done, total=total)
            if done == total and not console.is_terminal:
                console.print(f"evaluation of {split}: {row}, {total} answers", highlight=False)

        result = evaluate_run(run, overrides, show, device, verify)
    for strict, what in ((False, "headline metric of each task"), (True, "the same answers, scored strictly")):
        header, lines = answer_table(result, strict)
        table = Table(title=f"{result['run']}: {what} · {NOTICE}")
        for i, text in enumerate(header):
            table.add_column(text, justify="left" if i == 0 else "right", no_wrap=True)
        for split, rows in lines.items():
            table.add_row(f"[italic]{result['splits'][split]['name']}[/]")
            for row in rows:
                table.add_row(*row, style="bold" if row[0] == TRAINED else None, end_section=row[0] == TRAINED)
        console.print(table)
        for name in header[1:]:
            task = name.partition("\n")[0]
            console.print(f"{' '.join(name.split())}: {TASKS[task].nature[strict]}", style="dim", highlight=False, soft_wrap=True)
    for row, reason in result["left_out"].items():
        console.print(f"{row}: left out ({reason})", style="yellow", highlight=False, soft_wrap=True)
    for part in result["splits"].values():
        for better, how in ((part["better"], ""), (part["better_strict"], "scored strictly, ")):
            good = [task for task, is_better in better.items() if is_better]
            count = f"{len(good)} of {len(better)} tasks: {', '.join(good) or 'none'}"
            console.print(f"{part['name']}: {how}better than the baselines on {count}", highlight=False, soft_wrap=True)
        odd = [f"{task} {count} {kind}" for task, kinds in odd_answers(part, TRAINED).items() for kind, count in kinds.items()]
        console.print(f"{part['name']}: answers that are not simply one: {', '.join(odd) or 'none'}", highlight=False, soft_wrap=True)
    _show_gates(run)


def _show_gates(run: Path) -> None:
    """The router's gates per task, as the last steps of training saw them."""
    from rich.table import Table

    from unimed import io
    from unimed.train.trainer import ROUTER_FILE

    history = io.read_json(run / ROUTER_FILE) if (run / ROUTER_FILE).is_file() else []
    if not history:
        return
    last = history[-1]
    table = Table(title=f"{run.name}: mean gate of each expert, at step {last['step']}", title_justify="left")
    table.add_column("task", no_wrap=True)
    for expert in range(len(next(iter(last["tasks"].values()))["gates"])):
        table.add_column(f"expert {expert + 1}", justify="right")
    for task, entry in last["tasks"].items():
        table.add_row(task, *(f"{gate:.3f}" for gate in entry["gates"]))
    console.print(table)


def _report(run: Path) -> None:
    from unimed.report.report import write

    with console.status("report") if console.is_terminal else _nothing():
        path = write(run)
    console.print(f"report: {path} · {NOTICE}", highlight=False)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _run_folder(run: str) -> Path:
    for path in (RUNS / run, Path(run)):
        if path.is_dir():
            return path
    known = sorted(path.parent.name for path in RUNS.glob("*/recipe.yaml"))
    raise UserError(f"no run {run!r}: not a folder, and runs/ has {', '.join(known) or 'none'}; train one with: unimed train tiny")


def _model_folder(model: str | None) -> Path:
    if model is not None:
        return _run_folder(model)
    found = sorted(RUNS.glob("*/model"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no trained model under runs/; train one with: unimed demo, or name one with --model")
    return found[-1].parent


def main() -> None:
    """Entry point of the command; `--debug` may stand anywhere on the line."""
    global debugging
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debugging = len(arguments) < len(sys.argv) - 1
    app(args=arguments)
