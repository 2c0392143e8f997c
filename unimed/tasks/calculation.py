"""calculation: a measured quantity of the image, such as the cardiothoracic ratio. No release has it: both protocols score it alike.

within_10   an answer that holds one number, within a tenth of the true one; none, several and no number are wrong
error       mean relative error of the answers that hold one number, at most 1 each
"""

import re
from collections.abc import Sequence
from statistics import median_low
from typing import NamedTuple

import numpy as np

from unimed.errors import UserError
from unimed.tasks import answers, reading
from unimed.tasks.asked import Asked
from unimed.tasks.item import Item
from unimed.tasks.metrics.released import mean
from unimed.tasks.task import Task

TOLERANCE = 0.1
_NUMBER = re.compile(r"(?<![\w.,-])[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


class Ratios(NamedTuple):
    """ctr: heart width over thorax width. cpar: heart area over the area of both lungs. Widths in pixels, or in mm with a spacing."""

    ctr: float
    cpar: float
    heart_width: float
    thorax_width: float


def ratios(heart: np.ndarray, right_lung: np.ndarray, left_lung: np.ndarray, spacing: float | tuple[float, float] | None = None) -> Ratios:
    """Cardiothoracic and cardiopulmonary area ratio of three masks of one frontal image.

    Widths are the whole extent along the image's rows; the thorax reaches from one lung's outer edge to the other's. ``spacing``: mm from
    row to row and from column to column, as in DICOM's PixelSpacing, or one number for both. The area ratio is our own definition.
    """
    masks = {"heart": np.asarray(heart), "right_lung": np.asarray(right_lung), "left_lung": np.asarray(left_lung)}
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.shape != masks["heart"].shape:
            raise UserError(f"ratios: {name} has the shape {mask.shape}; the three masks must be two-dimensional and of one shape")
        if not mask.any():
            raise UserError(f"ratios: {name} is an empty mask")
    steps = np.ravel(1.0 if spacing is None else spacing)
    if steps.size not in (1, 2) or not (np.isfinite(steps) & (steps > 0)).all():
        raise UserError(f"ratios: spacing {spacing!r} must be one or two positive numbers, in mm")
    lungs = (masks["right_lung"] != 0) | (masks["left_lung"] != 0)
    heart_width, thorax_width = (_width(mask) * float(steps[-1]) for mask in (masks["heart"] != 0, lungs))
    cpar = np.count_nonzero(masks["heart"]) / np.count_nonzero(lungs)
    return Ratios(heart_width / thorax_width, cpar, heart_width, thorax_width)


def _width(mask: np.ndarray) -> int:
    columns = np.flatnonzero(mask.any(axis=0))
    return int(columns[-1] - columns[0] + 1)


def answer(value: float) -> str:
    """A number as an answer: four significant digits."""
    return np.format_float_positional(float(f"{value:.4g}"), trim="-")


def ask(asked: Asked) -> Item:
    one = asked.annotation
    name, unit = asked.text(one.name, "name"), " ".join(one.unit.split())
    return asked.item("calculation", f"What is the {name}{unit and f' in {unit}'}?", answer(one.value), f"calculation/{name.lower()}")


def value(text: str) -> float | None:
    """The one number of a text; None without one or with several."""
    found = {float(number) for number in _NUMBER.findall(text)}
    return found.pop() if len(found) == 1 else None


def error(item: Item, prediction: str) -> float | None:
    """The relative error, at most 1; None unless the prediction holds exactly one number."""
    given, wanted = value(answers.spoken(prediction)), value(item.answer)
    if wanted is None:
        raise UserError(f"{item.id}: the answer {item.answer!r} of a calculation item must hold one number")
    if given is None:
        return None
    return min(abs(given - wanted) / abs(wanted), 1.0) if wanted else float(given != 0)


def read(item: Item, text: str) -> reading.Reading:
    if value(text) is None:
        return reading.Reading(reading.UNPARSABLE)
    number = _NUMBER.search(text)
    alone = number is not None and not text[: number.start()].strip()
    return reading.Reading("" if alone else reading.CHATTY, frozenset([answers.strict(text)]))


def is_right(item: Item, prediction: str) -> bool:
    found = error(item, prediction)
    return found is not None and found <= TOLERANCE + 1e-9


def score(predictions: Sequence[str], items: Sequence[Item], coco: bool | None) -> dict[str, float]:
    pairs = list(zip(items, predictions, strict=True))
    errors = [found for item, text in pairs if (found := error(item, text)) is not None]
    return {"within_10": mean([float(is_right(item, text)) for item, text in pairs]), "error": mean(errors)}


class Median:
    """The answer in the middle; of two, the lower."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._texts: dict[float, str] = {}

    def add(self, item: Item) -> None:
        self._values.append(value(item.answer) or 0.0)
        self._texts[self._values[-1]] = item.answer

    def answer(self) -> str:
        return self._texts[median_low(self._values)]


TASK = Task(
    tag="calculation",
    about="measured quantity of the image",
    wordings={"": ("{}",)},
    makes={"number": ask},
    read=read,
    kinds=(reading.EMPTY, reading.UNPARSABLE, reading.CHATTY),
    score=score,
    is_right=is_right,
    majority=Median,
    headline="within_10",
    strict="within_10",
    nature=("one number, within a tenth of the true one; not in the release", "the same"),
)
