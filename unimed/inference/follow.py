"""One call of `generate`, row by row: where a row ends, how likely its tokens were, and its text while it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria


class Generated(NamedTuple):
    """text, its confidence and gates as in `Answer`. ended: by the model itself. The other fields count tokens."""

    text: str
    confidence: float = math.nan
    gates: tuple[float, ...] = ()
    ended: bool = True
    tokens: int = 0
    prompt_tokens: int = 0


class Follow:
    """What a caller does while rows are made; rows are numbered as the questions were given. This one does nothing."""

    def stopped(self, row: int) -> bool:
        """Whether a row's text is of no more use: the row ends with the next token, and `done` is not called."""
        return False

    def streams(self, row: int) -> bool:
        """Whether `piece` gets this row's text."""
        return False

    def piece(self, row: int, text: str) -> None:
        """More text of a row. Its pieces, joined, are its answer."""

    def done(self, row: int, made: Generated) -> None:
        """The whole answer of a row, as soon as the row has ended; others of the batch may go on."""


class Rows(StoppingCriteria):
    """Watches the rows of one call: ends each at its own limit, and tells `follow`. The tokens are those of a call by itself.

    limits: tokens that each row may have. first: the number of the first row. gated: whether each row has an image, so gates.
    """

    def __init__(self, session: Any, prompts: Tensor, limits: Sequence[int], gated: Sequence[bool], follow: Follow, first: int) -> None:
        self.made: list[Generated | None] = [None] * len(limits)
        self.chances = _Chances()
        self._open = set(range(len(limits)))
        self._sent = [0] * len(limits)
        self._gates: list[Tensor] = []
        self._images = [sum(gated[:row]) if has else None for row, has in enumerate(gated)]
        self._session, self._limits, self._follow, self._first = session, limits, follow, first
        self._width, self._lengths = prompts.shape[1], prompts.sum(1).tolist()

    def __enter__(self) -> Rows:
        self._hook = self._session.connector.register_forward_hook(lambda module, given, out: self._gates.append(out.gates.float().mean(1)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        made = input_ids[:, self._width :]
        last, stop = made[:, -1].tolist(), [False] * len(made)
        for row in sorted(self._open):
            number, ended = self._first + row, last[row] in self._session.ends
            if self._follow.stopped(number):
                self._open.discard(row)
                stop[row] = True
            elif ended or made.shape[1] >= self._limits[row]:
                self._open.discard(row)
                stop[row] = True
                self._close(row, made[row], ended)
            elif self._follow.streams(number):
                text = self._text(made[row])
                self._send(row, text[: max(text.rfind(" "), text.rfind("\n"), 0)])  # the last word may go on
        return torch.tensor(stop, device=input_ids.device)

    def _text(self, tokens: Tensor) -> str:
        return self._session.processor.decode_answers([tokens], prompt_length=0)[0]

    def _send(self, row: int, text: str) -> None:
        if len(text) > self._sent[row]:
            self._follow.piece(self._first + row, text[self._sent[row] :])
            self._sent[row] = len(text)

    def _close(self, row: int, tokens: Tensor, ended: bool) -> None:
        confidence = float(torch.stack([step[row] for step in self.chances.steps]).mean().exp())
        image = self._images[row]
        gates = () if image is None else tuple(torch.cat(self._gates)[image].tolist())
        made = Generated(self._text(tokens), confidence, gates, ended, len(tokens), int(self._lengths[row]))
        self.made[row] = made
        if self._follow.streams(self._first + row):
            self._send(row, made.text)
        self._follow.done(self._first + row, made)


class _Chances(LogitsProcessor):
    """The logarithm of each greedy token's probability, a tensor of rows a step. It changes nothing."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_32 = scores.float()
        self.steps.append(scores_32.max(-1).values - scores_32.logsumexp(-1))
        return scores
