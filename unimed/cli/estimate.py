"""`unimed estimate`; `app.py` registers it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from unimed.cli.shared import Overrides, console, new_table

GB = 10**9


def estimate(
    recipe: Annotated[str, typer.Argument(help="tiny, unimed-7b-release, or a YAML file")],
    overrides: Overrides = None,
    batch: Annotated[int | None, typer.Option(min=1, help="samples a step and process (train.batch_size)")] = None,
    device: Annotated[str, typer.Option(help="a100-80g, h100-80g, rtx4090, cpu, ...")] = "a100-80g",
    tokens: Annotated[int, typer.Option(min=2, help="tokens of text in a sample, beside the image's")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="bytes, as JSON")] = False,
) -> None:
    """The memory of a training step, without allocating it or reading weights; whether it fits, and what would make it fit.

    Examples:

      [cyan]unimed estimate unimed-7b-release --batch 4 --device a100-80g[/]

      [cyan]unimed estimate unimed-7b-release train.gradient_checkpointing=true --device rtx4090[/]
    """
    from unimed.estimate import report

    given = [*(overrides or []), *([f"train.batch_size={batch}"] if batch else [])]
    if as_json:
        console.print(json.dumps(report(recipe, given, device, tokens), indent=1), highlight=False, soft_wrap=True)
    else:
        with console.status("a step on tensors without data"):
            found = report(recipe, given, device, tokens)
        _say(found)


def _say(found: dict[str, Any]) -> None:
    def gb(count: int) -> str:
        return f"{count / GB:,.2f} GB" if count >= GB else f"{count / 1e6:,.2f} MB"

    def show(title: str, rows: list[tuple[str, str, str]]) -> None:
        table = new_table(title, header=False)
        for side in ("left", "right", "left"):
            table.add_column(justify=side)
        for row in rows:
            table.add_row(*row)
        console.print(table, highlight=False)

    show(
        f"{found['recipe']}: batch {found['batch']}, {found['tokens']} tokens of text a sample",
        [
            ("parameters", gb(found["parameters"]), "weights and buffers, in the dtypes of the recipe"),
            ("gradients", gb(found["gradients"]), "of what trains"),
            ("optimizer", gb(found["optimizer"]), "AdamW: two fp32 numbers for each that trains"),
            (
                "activations",
                gb(found["activations"]),
                f"on top of these at the peak; {gb(found['saved_for_backward'])} are saved by forward",
            ),
            ("total", gb(found["total"]), "the peak of live tensors"),
        ],
    )
    connector = found["connector"]
    show(
        "\nthe connector saves for backward",
        [
            ("our kernels", gb(connector["kernels"]), ""),
            ("our kernels, connector.recompute", gb(connector["kernels_recompute"]), "hidden layers are computed again"),
            ("plain loop over experts", gb(connector["loop"]), f"activations would be {gb(found['activations_without_kernels'])}"),
            ("plain loop, checkpointed", gb(connector["loop_recompute"]), ""),
        ],
    )
    name, size = found["device"], gb(found["device_bytes"])
    verdict = "fits" if found["fits"] else "does not fit"
    room = "" if name == "cpu" else "; 5 % and 1 GB are left for the driver and for gaps, a rule of thumb"
    console.print(f"\n{verdict} on {name} ({size}{room})", style="bold green" if found["fits"] else "bold red", highlight=False)
    if found["changes"]:
        rows = [(" ".join(one["overrides"]), gb(one["total"]), "fits" if one["fits"] else "") for one in found["changes"]]
        show("\nsmaller, each line with those before it", rows)
    if not found["fits"] and not any(one["fits"] for one in found["changes"]):
        console.print(
            "\nnone of these is enough: several devices with weights divided among them (FSDP), or a smaller model", highlight=False
        )


COMMANDS: dict[str, Callable[..., None]] = {"estimate": estimate}
