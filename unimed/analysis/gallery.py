"""Slices with their boxes, and answers right and wrong, as HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from unimed.data import boxes
from unimed.data.example import TASKS, Example
from unimed.tasks import metrics

THUMBNAIL = 280  # longest side of an embedded slice, in pixels
TRUE, GUESS = "#00d1a0", "#ff8a1f"


def quality(example: Example, prediction: str) -> float:
    """The task's headline metric of one answer."""
    return metrics.score(example.task, [prediction], [example], coco=False)[metrics.HEADLINE[example.task]]


def is_right(example: Example, prediction: str) -> bool:
    """A box is right from an IoU of one half on; anything else when it has every word (ROUGE ends a hair below one)."""
    return quality(example, prediction) >= (0.5 if example.task == "refer" else 1 - 1e-6)


def data_uri(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def slice_with_boxes(image: Image.Image, true: boxes.Box | None, guess: boxes.Box | None) -> str:
    """An inline SVG: the slice, the true box drawn whole and the predicted one dashed, in pixels of the original."""
    width, height = image.size
    stroke = max(width, height) / 90
    parts = [f'<image href="{data_uri(image)}" width="{width}" height="{height}"/>']
    for box, colour, dash in ((true, TRUE, ""), (guess, GUESS, f' stroke-dasharray="{3 * stroke:.2f} {1.6 * stroke:.2f}"')):
        if box is not None:
            x1, y1, x2, y2 = box
            size = f'x="{x1:.1f}" y="{y1:.1f}" width="{max(x2 - x1, 0):.1f}" height="{max(y2 - y1, 0):.1f}"'
            parts.append(f'<rect {size} fill="none" stroke="{colour}" stroke-width="{stroke:.2f}"{dash}/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` (two or more) positions out of `count`, evenly spaced, the first and the last among them."""
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)] if count > wanted else list(range(count))


def box_grid(examples: Sequence[Example], predictions: Sequence[str], load, wanted: int = 15) -> str:
    """Predicted and true boxes on slices from best to worst, evenly spaced over the ranking: not the best ones alone."""
    found = [(example, text) for example, text in zip(examples, predictions, strict=True) if example.task == "refer"]
    found.sort(key=lambda pair: -quality(*pair))
    figures = []
    for index in spread(len(found), wanted):
        example, text = found[index]
        guess = boxes.from_text(text)
        assert example.size is not None
        picture = slice_with_boxes(load(example), example.box, boxes.to_pixels(guess, example.size) if guess else None)
        note = f"IoU {quality(example, text):.2f}" if guess else f"no box in the answer “{text[:40]}”"
        figures.append(f"<figure>{picture}<figcaption><b>{escape(example.question)}</b> · {escape(note)}</figcaption></figure>")
    return f"<div class=grid>{''.join(figures)}</div>" if figures else "<p>No box task among the held-out examples.</p>"


def right_and_wrong(examples: Sequence[Example], predictions: Sequence[str], load) -> str:
    """For every task an answer that is right and one that is not, where there are such, on the slice with most to see."""

    def visible(pair: tuple[Example, str]) -> int:
        # Held-out slabs look like thin strips from the front and the side.
        example = pair[0]
        return min(example.size or load(example).size) if example.image is not None else 0

    blocks = []
    for task in TASKS:
        found = [(example, text) for example, text in zip(examples, predictions, strict=True) if example.task == task]
        if not found:
            continue
        right = [pair for pair in found if is_right(*pair)]
        wrong = [pair for pair in found if not is_right(*pair)]
        cells = [_example(*max(pairs, key=visible), load, good) for pairs, good in ((right, True), (wrong, False)) if pairs]
        share = f"{len(right)} of {len(found)} right"
        blocks.append(f"<h3>{escape(task)} <span class=lead>· {share}</span></h3><div class=pair>{''.join(cells)}</div>")
    return "".join(blocks)


def _example(example: Example, text: str, load, good: bool) -> str:
    picture = ""
    if example.image is not None:
        guess = boxes.from_text(text) if example.task == "refer" else None
        inside = boxes.to_pixels(guess, example.size) if guess and example.size else None
        picture = f"<figure>{slice_with_boxes(load(example), example.box, inside)}</figure>"
    question = {"refer": f"Where is {example.question}?", "caption": "Findings (reference is synthetic text composed from the masks)"}.get(
        example.task, f"What is in {example.question}?" if example.task == "identify" else example.question
    )
    word = f'<span class="tag {"yes" if good else "no"}">{"right" if good else "wrong"}</span>'
    score = f" · score {quality(example, text):.2f}" if example.task in ("refer", "caption") else ""
    lines = [f"<p><b>{escape(question)}</b></p>", f"<p>answer: {escape(text) or '<i>(empty)</i>'}</p>"]
    lines.append(f"<p>true: {escape(example.answer)}</p><p>{word}{score}</p>")
    return f'<div class="example {"right" if good else "wrong"}">{picture}<div>{"".join(lines)}</div></div>'
