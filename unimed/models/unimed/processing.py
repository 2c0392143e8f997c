"""Text and images in, tensors out; token ids in, answers out.

    <s>[INST] <Img><image> x N</Img> [task] instruction [/INST] answer</s>

`<ImageHere>` (or `<image>`) in a prompt marks where its image goes; a prompt has one image or none. Only the answer and `</s>` are learned.
Marks in text of users are text. `unimed.literal.literal` quotes them before the text becomes part of a prompt; the processor itself quotes
those in answers and in the messages of `apply_chat_template`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from unimed.errors import TooLong, UserError
from unimed.literal import is_quoted, literal, split
from unimed.models.unimed.configuration import TASKS
from unimed.models.unimed.tokenization import IMAGE_TOKEN, token_id
from unimed.records.pixels import to_rgb

PLACEHOLDER = "<ImageHere>"
TEXT_TASK = "qa"
_PARTS = (
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "IMAGE{%- else -%}{{ raise_exception('a part of type ' ~ part['type'] ~ ' is not supported: text and image are') }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
)
# A system message goes where Llama-2 chat has it: into the first user turn.
CHAT_TEMPLATE = (
    "{%- set turn = namespace(system='') -%}{%- for message in messages -%}"
    "{%- if message['role'] == 'system' and loop.first -%}{%- set turn.system -%}{{ '<<SYS>>\\n' }}"
    + _PARTS.replace("IMAGE", "")
    + "{{ '\\n<</SYS>>\\n\\n' }}{%- endset -%}"
    "{%- elif message['role'] == 'user' -%}{{ '[INST] ' }}{{ turn.system }}{%- set turn.system = '' -%}"
    + _PARTS.replace("IMAGE", "{%- elif part['type'] == 'image' -%}{{ '<Img><image></Img> ' }}")
    + "{{ ' [/INST]' }}{%- elif message['role'] == 'assistant' -%}{{ ' ' }}"
    + _PARTS.replace("IMAGE", "")
    + "{{ eos_token }}{%- else -%}{{ raise_exception('a message of role ' ~ message['role'] ~ ' at place ' ~ loop.index0 ~"
    " ' is not supported: system (the first only), user and assistant are') }}{%- endif -%}{%- endfor -%}"
    "{%- if turn.system -%}{{ raise_exception('a system message needs a user message behind it') }}{%- endif -%}"
)


class UniMedProcessor(ProcessorMixin):
    """Turns prompts, images and answers into what the model takes, and generated ids back into answers.

    Args:
        image_processor: resizes (bicubic, aspect ratio not kept) and normalises; no torchvision needed.
        tokenizer: knows `<image>` as one token.
        num_image_tokens: embeddings of one image, `UniMedConfig.num_image_tokens`.
        tasks: image tasks in the model's order.
        answer_prefix: set before an answer when it is tokenised: " " for byte-level vocabularies, "" where the tokenizer adds its own.
        max_prompt_tokens: a longer prompt is an error (cutting it would lose its end mark).
        max_answer_tokens: a longer answer is cut, and then teaches no `</s>`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 64,
        tasks: Sequence[str] = TASKS,
        answer_prefix: str = " ",
        max_prompt_tokens: int = 3800,
        max_answer_tokens: int = 1024,
        chat_template: str | None = CHAT_TEMPLATE,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.tasks = list(tasks)
        self.answer_prefix = answer_prefix
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = token_id(tokenizer, IMAGE_TOKEN)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "task_ids"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        task: str | Sequence[str | None] | None = None,
        answers: str | Sequence[str] | None = None,
        padding_side: str | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors of a batch.

        Args:
            text: prompts.
            images: PIL images in the order of the prompts that have a placeholder; None entries (samples without image) are skipped.
                They become RGB as image files do (`unimed.records.pixels.to_rgb`): 16 bits, transparency, EXIF orientation.
            task: one per prompt; by default read from the prompt's first `[tag]`. "qa" for text alone.
            answers: one per prompt, for training; adds `labels`.
            padding_side: by default "right" with answers and "left" without (generation continues at the right end).
        """
        prompts = _strings("text", text)
        placed = [_ours(prompt, PLACEHOLDER, IMAGE_TOKEN) for prompt in prompts]
        with_image = [sum(piece.count(IMAGE_TOKEN) for piece in split(prompt)[::2]) for prompt in placed]
        if max(with_image) > 1:
            raise UserError(f"prompt {with_image.index(max(with_image))} has {max(with_image)} image places, a prompt has one or none")
        pictures = self._pictures(images, expected=sum(with_image))
        names = self._task_names(prompts, task, with_image)

        learned = None
        if answers is not None:
            replies = _strings("answers", answers)
            if len(replies) != len(prompts):
                raise UserError(f"{len(replies)} answers for {len(prompts)} prompts, there must be one for each")
            learned = [self._answer_ids(reply) for reply in replies]
        rows = [self._prompt_ids(index, prompt) for index, prompt in enumerate(placed)]
        data = self._pad(rows, learned, padding_side or ("left" if learned is None else "right"))
        if pictures:
            data["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
            data["task_ids"] = torch.tensor([self.tasks.index(name) for name in names if name != TEXT_TASK])
        return BatchFeature(data, tensor_type=return_tensors)

    def _pictures(self, images: Any, expected: int) -> list[Image.Image]:
        if images is None or isinstance(images, Image.Image):
            images = [images]
        if not isinstance(images, list | tuple):
            raise UserError(f"images must be a list of PIL images, got {type(images).__name__}")
        flat = [image for entry in images for image in (entry if isinstance(entry, list | tuple) else [entry]) if image is not None]
        for index, image in enumerate(flat):
            if not isinstance(image, Image.Image):
                raise UserError(f"image {index} must be a PIL image, got {type(image).__name__}")
        if len(flat) != expected:
            raise UserError(f"{len(flat)} images for {expected} image places ({PLACEHOLDER}) in the prompts, the numbers must agree")
        return [_rgb(index, image) for index, image in enumerate(flat)]

    def _task_names(self, prompts: list[str], task: str | Sequence[str | None] | None, with_image: list[int]) -> list[str]:
        given: Sequence[str | None] = [task] * len(prompts) if task is None or isinstance(task, str) else list(task)
        if len(given) != len(prompts):
            raise UserError(f"{len(given)} tasks for {len(prompts)} prompts, there must be one for each")
        names = []
        for index, (prompt, name) in enumerate(zip(prompts, given, strict=True)):
            if name is None:
                tags = [tag for tag in re.findall(r"\[(\w+)\]", prompt) if tag in (*self.tasks, TEXT_TASK)]
                name = tags[0] if tags else (None if with_image[index] else TEXT_TASK)
            if name not in (*self.tasks, TEXT_TASK):
                what = f"unknown task {name!r}" if name is not None else "no task given and no task tag in the prompt"
                raise UserError(f"prompt {index}: {what}, it must be one of {', '.join((*self.tasks, TEXT_TASK))}")
            if with_image[index] and name == TEXT_TASK:
                raise UserError(
                    f"prompt {index}: {TEXT_TASK!r} is for text alone, but has an image place; use one of {', '.join(self.tasks)}"
                )
            names.append(name if with_image[index] else TEXT_TASK)
        return names

    def _prompt_ids(self, index: int, prompt: str) -> list[int]:
        text = _ours(prompt, IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens)
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = start + self._ids(text)
        if len(ids) > self.max_prompt_tokens:
            raise TooLong(f"prompt {index} has {len(ids)} tokens, at most {self.max_prompt_tokens} are allowed; shorten it", index)
        return ids

    def _answer_ids(self, answer: str) -> list[int]:
        # On its own, not with the prompt: generation starts from the prompt's ids, which must not depend on the answer.
        ids = self._ids(self.answer_prefix + literal(answer.strip()))
        return [*ids, self.tokenizer.eos_token_id][: self.max_answer_tokens]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=is_quoted(text))["input_ids"]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; marks in the messages' texts are spelled, but for the task's tag at the start of one."""
        try:
            return super().apply_chat_template(self._quoted(conversation), *args, **kwargs)
        except TemplateError as error:
            raise UserError(f"messages: {error}") from error

    def _quoted(self, messages: Any) -> Any:
        if isinstance(messages, list | tuple):
            return [self._quoted(message) for message in messages]
        if not isinstance(messages, dict):
            return messages
        found = dict(messages)
        for key in ("content", "text"):
            if isinstance(found.get(key), str):
                tag = re.match(r"\s*\[(\w+)\]", found[key])
                at = tag.end() if tag and tag[1] in (*self.tasks, TEXT_TASK) else 0
                found[key] = found[key][:at] + literal(found[key][at:])
            elif isinstance(found.get(key), list | tuple):
                found[key] = self._quoted(found[key])
        return found

    def _pad(self, prompts: list[list[int]], answers: list[list[int]] | None, side: str) -> dict[str, Tensor]:
        if side not in ("left", "right"):
            raise UserError(f"padding_side must be 'left' or 'right', got {side!r}")
        replies = answers or [[] for _ in prompts]
        longest = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
        pad = self.tokenizer.pad_token_id
        ids, mask, labels = [], [], []
        for prompt, reply in zip(prompts, replies, strict=True):
            row = prompt + reply
            gap = longest - len(row)
            before, after = (gap, 0) if side == "left" else (0, gap)
            ids.append([pad] * before + row + [pad] * after)
            mask.append([0] * before + [1] * len(row) + [0] * after)
            labels.append([-100] * (before + len(prompt)) + reply + [-100] * after)
        data = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return data if answers is None else {**data, "labels": torch.tensor(labels)}

    def decode_answers(self, sequences: Any, prompt_length: int | None = None) -> list[str]:
        """Answers in generated sequences: what follows the prompt (`prompt_length` tokens, else the last `[/INST]`), stripped."""
        rows = [torch.as_tensor(row) for row in sequences]
        if prompt_length is not None:
            return [text.strip() for text in self.tokenizer.batch_decode([row[prompt_length:] for row in rows], skip_special_tokens=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [text.rsplit("[/INST]", 1)[-1].strip() for text in texts]


def _rgb(index: int, image: Image.Image) -> Image.Image:
    try:
        return to_rgb(image).rgb
    except UserError as error:
        raise UserError(f"image {index}: {error}") from error


def _ours(text: str, mark: str, by: str) -> str:
    """``text`` with a mark replaced, but for where a user wrote it."""
    pieces = split(text)
    pieces[::2] = [piece.replace(mark, by) for piece in pieces[::2]]
    return "".join(pieces)


def _strings(name: str, value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not values or not all(isinstance(entry, str) for entry in values):
        raise UserError(f"{name} must be a string or a list of at least one string, got {type(value).__name__}")
    return list(values)
