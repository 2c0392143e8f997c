"""`unimed convert`: checkpoints of other projects into our folders and back; `app.py` registers its commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unimed.cli.shared import RunPath, console, new_table, run_folder
from unimed.notice import NOTICE

if TYPE_CHECKING:
    from unimed.models.convert.checkpoint import Row

Out = Annotated[Path, typer.Option("--out", help="what is made; it must not exist")]


def eva(
    file: Annotated[Path, typer.Argument(help="eva_vit_g.pth, as BLIP-2 publishes it")],
    out: Out,
    image_size: Annotated[int, typer.Option(help="pixels of a side; positions are interpolated if the file has others")] = 224,
) -> None:
    """EVA-CLIP ViT-g to a folder that vision.from takes.

    Example: [cyan]unimed convert eva eva_vit_g.pth --out checkpoints/eva-vit-g[/]
    """
    from unimed.models.convert import eva

    _done(eva.convert(file, out, image_size), out)


def llama(source: Annotated[Path, typer.Argument(help="Meta's folder, or one of transformers with *.bin")], out: Out) -> None:
    """Llama to a folder that language.from takes: safetensors and tokenizer.

    Reads Meta's files (consolidated.*.pth, params.json, tokenizer.model) and folders of transformers (*.bin or *.safetensors).

    Example: [cyan]unimed convert llama llama-2-7b-chat --out checkpoints/llama-2-7b-chat[/]
    """
    from unimed.models.convert import llama

    _done(llama.convert(source, out), out)


def release(
    file: Annotated[Path, typer.Argument(help="checkpoint_0.pth of the released code")],
    base: Annotated[Path, typer.Option(help="folder with the two converted folders (eva, llama), or a saved model without LoRA")],
    out: Out,
    config: Annotated[Path | None, typer.Option(help="the training YAML, for what shapes cannot show; by default the file's own")] = None,
) -> None:
    """A checkpoint of the released code to a model folder; with LoRA, an adapter folder.

    Example: [cyan]unimed convert release checkpoint_0.pth --base checkpoints --out uni-med[/]
    """
    from unimed.models.convert import release

    _done(release.convert(file, base, out, config), out)


def config(file: Annotated[Path, typer.Argument(help="a training YAML of the released code")], out: Out) -> None:
    """A configuration of the released code to a recipe.

    Example: [cyan]unimed convert config uni_med.yaml --out uni-med-recipe.yaml[/]
    """
    from unimed.models.convert import config
    from unimed.train import recipe as recipes

    rows = config.convert(file, out)
    recipes.load(out)
    _done(rows, out)


def export(run: RunPath, out: Out) -> None:
    """A run's trained tensors in the layout of the released code.

    Example: [cyan]unimed convert export full-size --out checkpoint_0.pth[/]
    """
    from unimed.models.convert import export

    folder = run_folder(run)
    _done(export.convert(folder / "model" if (folder / "model").is_dir() else folder, out), out)


def _done(rows: list[Row], out: Path) -> None:
    table = new_table()
    for text in ("from", "to", "tensors"):
        table.add_column(text, justify="right" if text == "tensors" else "left")
    for theirs, ours, count in rows:
        table.add_row(theirs, ours, f"{count:,}")
    console.print(table, highlight=False)
    console.print(f"{sum(row.tensors for row in rows):,} entries; made: {out} · {NOTICE}", highlight=False)


COMMANDS: dict[str, Callable[..., None]] = {body.__name__: body for body in (eva, llama, release, config, export)}
