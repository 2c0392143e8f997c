"""A model for lmms-eval, which finds it by the entry point `lmms_eval.models`:

    lmms-eval --model unimed --model_args pretrained=runs/demo,task=vqa --tasks vqa_rad --batch_size 16

Source: lmms_eval/api/model.py and registry_v2.py of lmms-eval 0.7.3.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

import unimed
from unimed.errors import UserError
from unimed.harnesses.common import request, until


def manifest() -> Any:
    """How lmms-eval learns the name."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="unimed", simple_class_path="unimed.harnesses.lmms_eval.UniMed")


class UniMed(lmms):
    """``pretrained``: a run or a model folder. ``task``: the task whose prompt asks each question; a tag before a question takes another.

    One greedy answer a question. Sampling and beams that a benchmark sets are not used, which a warning says.
    """

    is_simple = True

    def __init__(self, pretrained: str, task: str = "vqa", device: str = "auto", dtype: str = "auto", batch_size: int | str = 16) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: expected a positive number")
        self.batch_size = int(batch_size)
        self.task = task
        self.session = unimed.load(pretrained, device=device, dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in order. Each request is (prompt, options, pictures of a document, document, task, split)."""
        found: list[str] = []
        warned = False
        with tqdm(total=len(requests), disable=self.rank != 0, desc="unimed") as bar:
            for start in range(0, len(requests), self.batch_size):
                part = [one.args for one in requests[start : start + self.batch_size]]
                asked = []
                for prompt, options, pictures, document, task, split in part:
                    images = pictures(self.task_dict[task][split][document]) or []
                    asked.append(request(prompt, images, self.task, options.get("max_new_tokens")))
                    if not warned and (options.get("do_sample") or (options.get("num_beams") or 1) > 1):
                        warned = True
                        bar.write("unimed: greedy answers; the sampling or beams that the benchmark sets are not used")
                for answer, (prompt, options, *_) in zip(self.session.answer(asked), part, strict=True):
                    found.append(until(answer.text, options.get("until")))
                    self.cache_hook.add_partial("generate_until", (prompt, options), found[-1])
                bar.update(len(part))
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("unimed answers questions (generate_until); likelihoods of given texts are not computed")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("unimed answers one question at a time (generate_until); no recipe trains on dialogues")
