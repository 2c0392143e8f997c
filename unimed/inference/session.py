"""A model that is loaded once and answers: one request, many in batches, or piece by piece. Nothing here imports `unimed.train`."""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, overload

import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from unimed import io
from unimed.errors import TooLong, UserError
from unimed.inference.files import MODEL_FOLDER, RECIPE_FILE, RUN_FILE, fingerprint, model_in
from unimed.inference.follow import Follow, Generated, Rows
from unimed.inference.request import Answer, Asked, Request, prepare
from unimed.models.spec import DTYPES
from unimed.records import box as boxes
from unimed.tasks import TASKS, prompts
from unimed.tasks.answers import read
from unimed.tasks.item import Item

BATCH = 16  # requests that one call of the model answers


class Session:
    """A model and its processor on a device. ``class_questions``: the lists of classes that it learned. ``name``: what answers call it."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        class_questions: Sequence[str] = (),
        name: str = "",
        weights: str = "",
    ) -> None:
        self.model = model if device is None and dtype is None else model.to(device=device, dtype=dtype)
        self.processor = processor
        self.class_questions = tuple(class_questions)
        self.name, self.weights = name, weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def tasks(self) -> list[str]:
        """The tasks that the model learned, and those without an image, which need no tag of it."""
        return [tag for tag, task in TASKS.items() if tag in self.processor.tasks or not task.needs_image]

    @property
    def dialogue(self) -> bool:
        """Whether the model was trained on questions that follow one another. None of our recipes does so."""
        return bool((self.model.config.training or {}).get("dialogue"))

    @overload
    def answer(self, image: Sequence[Request]) -> list[Answer]: ...
    @overload
    def answer(self, image: Any, question: str = "", task: str = "vqa", **options: Any) -> Answer: ...

    def answer(self, image: Any, question: str = "", task: str = "vqa", **options: Any) -> Answer | list[Answer]:
        """The answer to one question, or to each of a list of requests, in order. A batch gives what each request gives by itself.

        ``options``: the other fields of `Request`.
        """
        if isinstance(image, Request):
            return self._answers([image])[0]
        if isinstance(image, list | tuple):
            return [answer for at in range(0, len(image), BATCH) for answer in self._answers(image[at : at + BATCH])]
        return self._answers([Request(image, question, task, **options)])[0]

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        return self.answer_prepared([prepare(request, self.class_questions) for request in requests])

    def answer_prepared(self, asked: Sequence[Asked]) -> list[Answer]:
        """The answers to requests whose images are open."""
        made = self.generate([one.item for one in asked], BATCH, [one.max_new_tokens for one in asked], details=True)
        return [self.read(one, *found[:3]) for one, found in zip(asked, made, strict=True)]

    @torch.inference_mode()
    def generate(
        self,
        items: Sequence[Item],
        batch_size: int = 40,
        max_new_tokens: int | Sequence[int] = 100,
        blank_images: bool = False,
        progress: Callable[[int], None] | None = None,
        details: bool = False,
        follow: Follow | None = None,
    ) -> list[Generated]:
        """One greedy answer an item, in order: one beam, no sampling, the evaluation form of the prompt, left padding.

        ``max_new_tokens``: of all, or one for each. ``details`` fills the fields beside the text, and so does ``follow``, which is told of
        each row while it is made; a row that it stops has an empty text. ``progress`` gets the number of items just answered.
        """
        limits = [max_new_tokens] * len(items) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        details = details or follow is not None or len(set(limits)) > 1
        found: list[Generated] = []
        with self._answering():
            for start in range(0, len(items), batch_size):
                part, most = items[start : start + batch_size], limits[start : start + batch_size]
                inputs = self._inputs(part, most, blank_images)
                gated = [item.image is not None for item in part]
                rows = Rows(self, inputs["attention_mask"], most, gated, follow or Follow(), start) if details else None
                options: dict[str, Any] = {}
                if rows:
                    options = {"logits_processor": LogitsProcessorList([rows.chances]), "stopping_criteria": StoppingCriteriaList([rows])}
                with rows or nullcontext():
                    sequences = self.model.generate(**inputs, max_new_tokens=max(most), do_sample=False, num_beams=1, **options)
                if rows:
                    found += [one or Generated("") for one in rows.made]
                else:
                    texts = self.processor.decode_answers(sequences, prompt_length=inputs["input_ids"].shape[1])
                    found += [Generated(text) for text in texts]
                if progress:
                    progress(len(part))
        return found

    def stream(self, request: Request, ended: Callable[[Generated], None] | None = None) -> Iterator[str]:
        """The answer in pieces, as they are made; joined, they are the text of `answer`. Leaving the loop stops the model.

        ``ended`` gets the whole answer after the last piece.
        """
        asked = prepare(request, self.class_questions)
        pieces = _Pieces()

        def work() -> None:
            try:
                self.generate([asked.item], 1, asked.max_new_tokens, follow=pieces)
                pieces.waiting.put(None)
            except BaseException as error:  # raised again where the pieces are read
                pieces.waiting.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while isinstance(piece := pieces.waiting.get(), str):
                yield piece
        finally:
            pieces.left.set()
            thread.join()
        if piece is not None:
            raise piece
        if ended is not None and pieces.made is not None:
            ended(pieces.made)

    @staticmethod
    def read(asked: Asked, text: str, confidence: float = math.nan, gates: tuple[float, ...] = ()) -> Answer:
        """A text as the answer to a request whose image is open."""
        parsed, box, opened = read(asked.item, text), asked.box, asked.opened
        if TASKS[asked.item.task].box == "answer" and opened and parsed.box:
            box = opened.to_original(boxes.in_order(boxes.to_pixels(parsed.box, opened.rgb.size)))
        return Answer(text, box, asked.item.task, confidence, gates, opened.notes if opened else (), parsed)

    @property
    def connector(self) -> Any:
        return (self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model).connector

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    @contextmanager
    def _answering(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def _inputs(self, items: Sequence[Item], limits: Sequence[int], blank_images: bool = False) -> dict[str, Tensor]:
        images = [item.open() for item in items if item.image is not None]
        if blank_images:
            images = [Image.new("RGB", image.size) for image in images]
        batch = self.processor(
            text=[prompts.chat(prompts.instruction(item, None)) for item in items],
            images=images or None,
            task=[item.task for item in items],
            padding_side="left",
        )
        device = self.device
        inputs = {name: value.to(device) for name, value in batch.items()}
        positions = self.model.config.text_config.max_position_embeddings
        for place, (length, most) in enumerate(zip(inputs["attention_mask"].sum(1).tolist(), limits, strict=True)):
            if length + most > positions:
                what = f"a prompt of {length} tokens and an answer of up to {most}"
                raise TooLong(f"{what} do not fit the model's {positions} positions; shorten the question or max_new_tokens", place)
        return inputs


class _Pieces(Follow):
    """The pieces of one answer, for another thread that may leave."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.left = threading.Event()
        self.made: Generated | None = None

    def stopped(self, row: int) -> bool:
        return self.left.is_set()

    def streams(self, row: int) -> bool:
        return True

    def piece(self, row: int, text: str) -> None:
        self.waiting.put(text)

    def done(self, row: int, made: Generated) -> None:
        self.made = made


def load(path: str | os.PathLike, device: str = "auto", dtype: str | torch.dtype = "auto", verify: bool = False) -> Session:
    """The trained model of a run, of its ``model`` folder, or of a folder that save_pretrained wrote.

    ``device``: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:1". ``dtype``: "fp32", "bf16", "fp16", or "auto": on a GPU that of
    training, else as saved. ``verify`` hashes every file of the folder first; else only sizes are compared.
    """
    run = Path(path)
    folder = model_in(run)
    if (folder / io.MANIFEST).is_file():
        io.verify_folder(folder, hashes=verify)
    elif verify:
        raise UserError(f"{folder}: no {io.MANIFEST}, so there is nothing to verify the model by")
    from unimed.models.load import load as load_model
    from unimed.models.load import pick_device

    place = pick_device(device)
    home = run.parent if run.name == MODEL_FOLDER or run.name.startswith("checkpoint-") else run
    precision, archive = _trained_with(home / RECIPE_FILE)
    model, processor = load_model(folder, dtype=_dtype(dtype, precision if place.type == "cuda" else None), search=archive)
    record = io.read_json(home / RUN_FILE) if (home / RUN_FILE).is_file() else {}
    classes = [str(one) for one in record.get("class_questions", [])]
    return Session(model.to(place), processor, class_questions=classes, name=str(run), weights=fingerprint(folder)[:12])


def _dtype(wanted: str | torch.dtype, trained: str | None) -> torch.dtype | None:
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted == "auto":
        return getattr(torch, DTYPES[trained]) if trained in DTYPES else None
    if wanted not in DTYPES:
        raise UserError(f"dtype {wanted!r}: it must be auto, {', '.join(DTYPES)}, or a torch.dtype")
    return getattr(torch, DTYPES[wanted])


def _trained_with(recipe: Path) -> tuple[str | None, list[Path]]:
    """The precision of training, and where the base model of an adapter may lie, by a run's recipe; nothing where there is none."""
    if not recipe.is_file():
        return None, []
    try:
        found = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        precision, archive = found.get("train", {}).get("precision", "fp32"), found.get("language", {}).get("archive")
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{recipe}: not a recipe: {str(error).splitlines()[0]}") from error
    place = Path(archive) if archive else None
    return precision, [place if place.is_dir() else place.parent] if place else []
