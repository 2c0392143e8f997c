"""One question with its answer, whatever dataset it comes from, and the image it is about."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGE_TASKS = ("vqa", "refer", "identify", "caption", "cls")
TASKS = (*IMAGE_TASKS, "qa")


@dataclass(frozen=True)
class Example:
    """``question`` is the bare content: the VQA question, the object's name (refer), the box text (identify), the class question (cls),
    "" (caption).

    size: (width, height) of the original image, None where no task needs it. box: pixel xyxy (refer, identify).
    template: what an answer "without looking" may depend on, e.g. "vqa/modality" or "refer/liver". answer_type: "OPEN" or "CLOSED" (vqa).
    """

    id: str
    task: str
    dataset: str
    question: str
    answer: str
    image: Path | np.ndarray | None
    size: tuple[int, int] | None
    box: tuple[float, float, float, float] | None
    template: str
    answer_type: str | None = None
    subject: str = ""
