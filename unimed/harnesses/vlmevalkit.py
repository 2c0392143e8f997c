"""A model for VLMEvalKit. Before its `run.py` starts, one line adds a run to the models that it knows:

    from unimed.harnesses.vlmevalkit import register
    register("unimed-demo", "runs/demo")

Source: vlmeval/vlm/base.py and vlmeval/config.py of VLMEvalKit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from vlmeval.vlm.base import BaseModel

import unimed
from unimed.harnesses.common import request


class UniMed(BaseModel):
    """``model_path``: a run or a model folder. ``task``: the task whose prompt asks each question."""

    INSTALL_REQ = False
    INTERLEAVE = False

    def __init__(self, model_path: str, task: str = "vqa", device: str = "auto", dtype: str = "auto") -> None:
        super().__init__()
        self.task = task
        self.session = unimed.load(model_path, device=device, dtype=dtype)

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of parts {"type": "text" | "image", "value": text | path}: all its text, its first picture."""
        text = "\n".join(part["value"] for part in message if part["type"] == "text")
        images: list[Any] = [part["value"] for part in message if part["type"] == "image"]
        return self.session.answer([request(text, images, self.task)])[0].text


def register(name: str, model_path: str, **options: Any) -> None:
    """Makes `--model NAME` of VLMEvalKit this run."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(UniMed, model_path=model_path, **options)
