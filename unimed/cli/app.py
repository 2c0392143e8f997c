"""The `unimed` command. Heavy imports wait until a command needs them, so that --help is quick."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from unimed.cli import convert, data, estimate, evaluate, page, predict, sample, serve, shared, study, train
from unimed.cli.shared import console, errors, rank
from unimed.errors import UserError
from unimed.notice import NOTICE

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
convert_app = typer.Typer(no_args_is_help=True, help="Checkpoints of other projects: into our folders, and back.", epilog=f"{NOTICE}.")
app.add_typer(convert_app, name="convert")


def command(owner: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose UserErrors become one line and exit code 2 (with --debug: the traceback)."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                if name != "train" and rank() is not None:
                    raise UserError(f"unimed {name}: runs in one process; only unimed train runs under torchrun")
                with warnings.catch_warnings():
                    _quiet_libraries()
                    body(*args, **kwargs)
            except (UserError, OSError) as error:
                if shared.debugging:
                    raise
                if _reports_errors():
                    errors.print("error: ", style="bold red", end="")
                    errors.print(" ".join(str(error).split()), highlight=False, soft_wrap=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                errors.print("stopped")
                raise typer.Exit(130) from None

        return owner.command(name, epilog=f"{NOTICE}.")(run)

    return register


def _reports_errors() -> bool:
    """Before the processes of torchrun have found each other, all meet the same error: the first one says it."""
    distributed = sys.modules.get("torch.distributed")
    return not rank() or (distributed is not None and distributed.is_initialized())


def _quiet_libraries() -> None:
    """Warnings are one line each; those that libraries raise about their own insides are left out (with --debug: everything)."""
    import logging

    if rank():  # the first process says what all find in the data
        logging.getLogger("unimed").setLevel(logging.ERROR)
    if shared.debugging:
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # bars for files that are read in a moment come between ours
    for library in ("transformers", "accelerate", "peft", "torch", "huggingface_hub"):
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.showwarning = _show_warning  # type: ignore[assignment]


def _show_warning(message: Warning | str, *where: Any) -> None:
    if not rank():
        errors.print("warning: ", style="bold yellow", end="")
        errors.print(" ".join(str(message).split()), highlight=False, soft_wrap=True)


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


for _owner, _files in (
    (sample_app, (sample,)),
    (data_app, (data,)),
    (convert_app, (convert,)),
    (app, (train, evaluate, predict, page, serve, estimate, study)),
):
    for _file in _files:
        for _name, _body in _file.COMMANDS.items():
            command(_owner, _name)(_body)


@command(app, "doctor")
def doctor(
    checkpoints: Annotated[Path | None, typer.Option(help="folder of the 7B run's weights, in place of checkpoints/")] = None,
    data: Annotated[Path | None, typer.Option(help="folder of the 7B run's data sets, in place of data/")] = None,
) -> None:
    """Say what is installed, which kernels this machine uses, what is missing for what, and what the run at full size needs.

    Examples:

      [cyan]unimed doctor[/]

      [cyan]unimed doctor --checkpoints weights --data datasets[/]    look there for the pieces of unimed-7b-release
    """
    from unimed.doctor import full_size, lines

    for title, text in lines():
        console.print(f"[bold]{title:<24}[/] {escape(text)}", markup=True, highlight=False, soft_wrap=True)
    console.print("\n[bold]unimed train unimed-7b-release needs[/] (no weights or data are shipped)", markup=True, highlight=False)
    for title, text in full_size(checkpoints, data):
        console.print(f"[bold]{title:<24}[/] {escape(text)}", markup=True, highlight=False, soft_wrap=True)
    from cmoe_kernels.doctor import report as kernels

    console.print(f"\n{kernels()}\n", highlight=False, soft_wrap=True)
    console.print(f"{NOTICE}.", style="bold red")


def main() -> None:
    """Entry point of the command; `--debug` may stand anywhere on the line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    shared.debugging = len(arguments) < len(sys.argv) - 1
    app(args=arguments)
