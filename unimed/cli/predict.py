"""`unimed predict`; `app.py` registers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from unimed import NOTICE
from unimed.cli.shared import Device, Verify, console, model_folder, no_bars_of_transformers


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

    no_bars_of_transformers()
    answer = ask(image, question, task, model_folder(model), plane, index, window, device, verify)
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


COMMANDS: dict[str, Callable[..., None]] = {"predict": predict}
