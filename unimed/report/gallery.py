"""Images with their boxes, and answers right and wrong, as the page takes them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from unimed.records import box as boxes
from unimed.tasks import TASKS, metrics
from unimed.tasks.answers import read
from unimed.tasks.item import Item
from unimed.tasks.protocol import STANDARD
from unimed.tasks.reading import CHATTY, INVERTED, UNPARSABLE
from unimed.tasks.task import task_of

THUMBNAIL = 280  # longest side of an embedded image, in pixels
TRUE, GUESS = "#00d1a0", "#ff8a1f"

Load = Callable[[Item], Image.Image]


def quality(item: Item, prediction: str) -> float:
    """How good one answer is: the strict headline metric of its task, so that a box counts wherever it stands in the answer."""
    return metrics.score(item.task, [prediction], [item], coco=False)[STANDARD.metric(TASKS[item.task])]


def note(item: Item, prediction: str) -> str:
    """What to know of a box answer, in a few words."""
    reading = read(item, prediction)
    if reading.kind == INVERTED:
        return "corners in the wrong order"
    if reading.kind == UNPARSABLE and reading.box:
        return "several boxes, the first is drawn"
    if reading.box is None:
        return f"no box in the answer “{prediction[:40]}”"
    return f"IoU {quality(item, prediction):.2f}" + (", among other text" if reading.kind == CHATTY else "")


def _guess(item: Item, prediction: str) -> boxes.Box | None:
    """The predicted box in pixels, its corners in order."""
    box = read(item, prediction).box if task_of(item).box == "answer" else None
    return boxes.in_order(boxes.to_pixels(box, item.size)) if box and item.size else None


def data_uri(image: Image.Image, longest: int = THUMBNAIL, optimize: bool = True) -> str:
    small = image.copy()
    small.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=optimize)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(image: Image.Image, true: boxes.Corners | None, guess: boxes.Corners | None) -> dict[str, Any]:
    """The image, the true box drawn whole and the predicted one dashed, in pixels of the original."""
    width, height = image.size
    stroke = max(width, height) / 90
    drawn = []
    for box, colour, dash in ((true, TRUE, ""), (guess, GUESS, f"{3 * stroke:.2f} {1.6 * stroke:.2f}")):
        if box is not None:
            x1, y1, x2, y2 = box
            sides = {"x": x1, "y": y1, "width": max(x2 - x1, 0), "height": max(y2 - y1, 0)}
            drawn.append({**{name: f"{value:.1f}" for name, value in sides.items()}, "colour": colour, "dash": dash})
    return {"width": width, "height": height, "uri": data_uri(image), "stroke": f"{stroke:.2f}", "boxes": drawn}


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` (two or more) positions out of `count`, evenly spaced, the first and the last among them."""
    return [i * (count - 1) // (wanted - 1) for i in range(wanted)] if count > wanted else list(range(count))


def box_grid(items: Sequence[Item], predictions: Sequence[str], load: Load, wanted: int = 15) -> list[dict[str, Any]]:
    """Predicted and true boxes on images from best to worst, evenly spaced over the ranking: not only the best ones."""
    found = [(item, text) for item, text in zip(items, predictions, strict=True) if task_of(item).box == "answer"]
    found.sort(key=lambda pair: -quality(*pair))
    return [
        {
            "picture": picture(load(item), item.box, _guess(item, text)),
            "question": item.question,
            "note": note(item, text),
        }
        for item, text in (found[index] for index in spread(len(found), wanted))
    ]


def right_and_wrong(items: Sequence[Item], predictions: Sequence[str], load: Load) -> list[dict[str, Any]]:
    """For every task an answer that is right and one that is not, where there are such, on the image with most to see."""

    def visible(pair: tuple[Item, str]) -> int:
        item = pair[0]  # a slab of a volume looks like a thin strip from the front and the side
        return min(item.size or load(item).size) if item.image is not None else 0

    blocks = []
    for task in TASKS:
        found = [(item, text) for item, text in zip(items, predictions, strict=True) if item.task == task]
        if not found:
            continue
        right = [pair for pair in found if metrics.is_right(*pair)]
        wrong = [pair for pair in found if not metrics.is_right(*pair)]
        shown = [_answer(*max(pairs, key=visible), load, good) for pairs, good in ((right, True), (wrong, False)) if pairs]
        blocks.append({"tag": task, "share": f"{len(right)} of {len(found)} right", "shown": shown})
    return blocks


def _answer(item: Item, text: str, load: Load, good: bool) -> dict[str, Any]:
    task = task_of(item)
    kind = read(item, text).kind
    return {
        "picture": picture(load(item), item.box, _guess(item, text)) if item.image is not None else None,
        "question": task.shown.replace("{}", item.question) or task.about.capitalize(),
        "answer": text,
        "true": item.answer,
        "right": good,
        "words": [*([kind.replace("_", " ")] if kind else []), *([f"score {quality(item, text):.2f}"] if task.graded else [])],
    }
