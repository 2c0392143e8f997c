"""``python -m examples.vnnet``: demo, study, train, evaluate. Heavy imports wait until a command needs them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from examples.vnnet.files import UserError

console = Console()
if not console.is_terminal:
    console = Console(width=180)  # a file has no edge: tables keep their words whole
errors = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "VN-Net (arXiv 2404.16037): forecasts at weather stations from numbers and satellite pictures, fused by a CMoE connector.\n\n"
        "Start here:\n\n"
        "  [cyan]python -m examples.vnnet demo[/]              generated weather and real airports: training, tables, plots\n\n"
        "  [cyan]python -m examples.vnnet study --out s[/]     how much pictures help, and one model against four, on three seeds\n\n"
        "  [cyan]python -m examples.vnnet train DATA --run r[/]   your own stations, with or without pictures\n\n"
        "DATA is a folder with stations.npy (T, N, 23), data.json and, for vision, pictures.npy (T, H, W, C): see examples/vnnet/README.md."
    ),
)
Cache = Annotated[Path, typer.Option(help="folder for generated data and the archive of real data")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default all. Results are the same bits for the same number", min=1)]


def command(body: Callable[..., None]) -> Callable[..., None]:
    """UserErrors become one line and exit code 2; VNNET_DEBUG=1 shows the traceback."""

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            body(*args, **kwargs)
        except (UserError, OSError) as error:
            if os.environ.get("VNNET_DEBUG"):
                raise
            errors.print("[bold red]error:[/] ", end="")
            errors.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            errors.print("stopped; the same command with --resume (study: as it was) goes on")
            raise typer.Exit(130) from None

    return app.command()(run)


@command
def demo(
    out: Annotated[Path, typer.Option(help="folder for runs, tables and plots")] = Path("runs/vnnet-demo"),
    cache: Cache = Path(".cache/vnnet"),
    steps: Annotated[int, typer.Option(help="training steps of a model", min=1)] = 195,
    hours: Annotated[int, typer.Option(help="hours of generated weather", min=300)] = 3000,
    threads: Threads = None,
) -> None:
    """Train NNet and VN-Net on generated weather and NNet on real airports; end with tables and plots. At most 10 minutes on two cores.

    Run again after it was interrupted, it goes on; a finished one only prints its tables.
    """
    from examples.vnnet import study as s

    began = time.perf_counter()
    s.settle(threads)
    arms = ("nnet", "cmoe", "airports")
    rows = s.run(out, cache, arms, (0,), steps, console, hours)
    s.show(console, rows, arms, (0,))
    s.draw_models(out, cache, hours)
    console.print(f"tables and plots: {out} · {(time.perf_counter() - began) / 60:.1f} minutes", highlight=False)


@command
def study(
    out: Annotated[Path, typer.Option(help="folder for rows, runs, tables and plots")] = Path("runs/vnnet-study"),
    cache: Cache = Path(".cache/vnnet"),
    seeds: Annotated[int, typer.Option(help="how many seeds", min=1)] = 3,
    arms: Annotated[str, typer.Option(help="comma-separated; all: see README")] = "nnet,cmoe,airports,temperature,humidity,visibility,wind",
    steps: Annotated[int, typer.Option(help="training steps of a model", min=1)] = 195,
    hours: Annotated[int, typer.Option(help="hours of generated weather", min=300)] = 3000,
    threads: Threads = None,
) -> None:
    """What pictures are worth, and one CMoE model against four models. The same command again goes on where it stopped.

    Example: [cyan]python -m examples.vnnet study --out runs/vnnet-study --threads 1[/]
    """
    from examples.vnnet import study as s

    s.settle(threads)
    wanted = tuple(name.strip() for name in arms.split(",") if name.strip())
    for name in wanted:
        if name not in s.ARMS:
            raise UserError(f"--arms has {name!r}; valid are {', '.join(s.ARMS)}")
    rows = s.run(out, cache, wanted, range(seeds), steps, console, hours)
    s.show(console, rows, wanted, range(seeds))
    console.print(f"tables and plots: {out}", highlight=False)


@command
def train(
    data: Annotated[Path, typer.Argument(help="folder with stations.npy, data.json and, for vision, pictures.npy")],
    run: Annotated[Path, typer.Option(help="folder of the run")],
    version: Annotated[str, typer.Option(help="paper or repository")] = "paper",
    fusion: Annotated[str, typer.Option(help="cmoe or plain")] = "cmoe",
    factors: Annotated[str, typer.Option(help="comma-separated")] = "temperature,humidity,visibility,wind",
    vision: Annotated[bool, typer.Option(help="--no-vision trains NNet")] = True,
    size: Annotated[str, typer.Option(help="small (the demo's) or full (the release's)")] = "small",
    frames: Annotated[int, typer.Option(help="pictures before the forecast, one an hour", min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 400,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    rate: Annotated[float, typer.Option(help="Adam's highest rate", min=0)] = 6e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    validation: Annotated[float, typer.Option(help="share of the hours before the test part")] = 0.15,
    test: Annotated[float, typer.Option(help="share of the hours at the end")] = 0.15,
    zero_is_missing: Annotated[
        bool, typer.Option("--zero-is-missing", help="mask targets of exactly 0, as the release does; says what it loses")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint, with the same settings")] = False,
    threads: Threads = None,
) -> None:
    """Train on your own data; missing values are masked and counted.

    Examples:

      [cyan]python -m examples.vnnet train DATA --run runs/mine[/]

      [cyan]python -m examples.vnnet train DATA --run runs/numbers --no-vision[/]

      [cyan]python -m examples.vnnet train DATA --run runs/mine --resume[/]     after it was stopped
    """
    from examples.vnnet import study as s
    from examples.vnnet.data import FACTORS, Tables, Windows, load
    from examples.vnnet.model import Settings
    from examples.vnnet.train import Plan
    from examples.vnnet.train import train as training

    s.settle(threads)
    names = tuple(name.strip() for name in factors.split(",") if name.strip())
    for name in names:
        if name not in FACTORS:
            raise UserError(f"--factors has {name!r}; valid are {', '.join(FACTORS)}")
    if size not in ("small", "full"):
        raise UserError(f"--size is {size!r}; valid are small, full")
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise UserError(f"--validation {validation} and --test {test} must be shares that leave hours to train on")
    weather = load(data, validation, test)
    if vision and weather.pictures is None:
        raise UserError(f"{data}: has no pictures.npy; add it, or train with --no-vision")
    tables = Tables.fit(weather)
    sizes: dict[str, Any] = {
        "stations": weather.stations.shape[1],
        "factors": names,
        "version": version,
        "fusion": fusion,
        "vision": vision,
        "frames": frames,
    }
    if weather.pictures is not None:
        sizes["channels"] = weather.pictures.shape[3]
    settings = Settings.small(**sizes) if size == "small" else Settings(**sizes)
    parts = [Windows(weather, tables, split, names, settings.history, settings.horizon, frames) for split in ("train", "validation")]
    s.say(console, weather, parts, zero_is_missing)
    plan = Plan(steps=steps, batch=batch, rate=rate, seed=seed, zero_is_missing=zero_is_missing)
    training(run, settings, plan, parts[0], parts[1], resume, console)
    console.print(f"trained: {run}; next: python -m examples.vnnet evaluate {run} {data}", highlight=False, soft_wrap=True)


@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    data: Annotated[Path, typer.Argument(help="the data it was trained on, or later hours of the same stations")],
    validation: Annotated[float, typer.Option(help="as in training")] = 0.15,
    test: Annotated[float, typer.Option(help="as in training")] = 0.15,
    threads: Threads = None,
) -> None:
    """Errors by hour ahead on the test part, beside forecasts without learning; with pictures, their worth. Writes into the run."""
    from examples.vnnet import study as s

    s.settle(threads)
    s.evaluate_own(run, data, validation, test, console)


if __name__ == "__main__":
    app(prog_name="python -m examples.vnnet")
