"""The process that holds the model. It answers one batch after the other, and says nothing of what it was asked but to the front.

From the front: ("batch", jobs), ("cancel", key), ("stop",). To the front: ("ready", about), ("failed", reason), then of each job ("piece",
key, text), ("done", key, answer), ("bad", key, reason) or ("error", key, where), and ("alive",), and ("idle",) after a batch.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from unimed.errors import UserError
from unimed.serve.settings import Settings

Job = dict[str, Any]


def main(front: Connection, settings: Settings) -> None:
    _quiet()
    try:
        session = _load(settings)
    except Exception as error:
        front.send(("failed", str(error) if isinstance(error, UserError | OSError) else where(error)))
        return
    cancelled: set[int] = set()
    batches: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(front, batches, cancelled), daemon=True).start()
    tasks = [*session.processor.tasks, "qa"]
    front.send(("ready", {"name": os.path.basename(os.path.abspath(session.name)), "tasks": tasks, "device": str(session.device)}))
    while (batch := batches.get()) is not None:
        _Batch(session, front, cancelled).answer(batch)
        cancelled.difference_update(job["key"] for job in batch)
        front.send(("idle",))


def _quiet() -> None:
    """Signals of the terminal are the front's. Libraries quote file headers in warnings, so this process has no standard streams.

    The frames of a crash, which hold no values, still go to the front's standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kept = os.dup(2)
    faulthandler.enable(file=kept)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def _load(settings: Settings) -> Any:
    import torch

    from unimed.inference.session import load
    from unimed.records import limits

    if settings.threads:
        torch.set_num_threads(settings.threads)
    limits.lower(settings.max_pixels, settings.unpacked)
    return load(settings.model, device=settings.device, verify=settings.verify)


def _listen(front: Connection, batches: queue.SimpleQueue[list[Job] | None], cancelled: set[int]) -> None:
    while True:
        try:
            kind, *rest = front.recv()
        except (EOFError, OSError):  # the front is gone: so is the reason to go on
            os._exit(0)
        if kind == "batch":
            batches.put(rest[0])
        elif kind == "cancel":
            cancelled.add(rest[0])
        else:
            batches.put(None)
            return


def where(error: BaseException) -> str:
    """The kind of an error and the line that raised it: its text may quote what was asked."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f"{type(error).__name__}" + (f" in {os.path.basename(last.filename)}:{last.lineno}" if last else "")


class _Batch:
    """One batch, and what its caller hears of each row while it is made (`unimed.inference.follow.Follow`)."""

    def __init__(self, session: Any, front: Connection, cancelled: set[int]) -> None:
        self.session, self.front, self.cancelled = session, front, cancelled
        self._told = 0.0
        self._sent: dict[int, int] = {}  # characters of a job's answer that the front has
        self._over: set[int] = set()

    def answer(self, jobs: Sequence[Job]) -> None:
        """Each job ends in one message. An error of a batch is that of one of its jobs: each is then answered by itself."""
        ready = []
        for job in jobs:
            if job["key"] not in self.cancelled and (asked := self._prepared(job)) is not None:
                ready.append((job, asked))
            self._alive()
        for part in [ready] if len(ready) < 2 else [ready, *([one] for one in ready)]:
            left = [(job, asked) for job, asked in part if job["key"] not in self._over | self.cancelled]
            if not left:
                continue
            try:
                self._generate(left)
            except Exception as error:
                if len(part) == 1:
                    self._refuse(part[0][0], error)

    def _prepared(self, job: Job) -> Any:
        from unimed.inference.request import Request, prepare

        try:
            return prepare(Request(job["image"], **job["fields"]), self.session.class_questions)
        except Exception as error:
            self._refuse(job, error)
            return None

    def _refuse(self, job: Job, error: Exception) -> None:
        self._over.add(job["key"])
        kind, text = ("bad", str(error)) if isinstance(error, UserError) else ("error", where(error))
        self.front.send((kind, job["key"], text))

    def _generate(self, ready: Sequence[tuple[Job, Any]]) -> None:
        self.jobs, self.asked = [job for job, _ in ready], [asked for _, asked in ready]
        self._seen = [0] * len(ready)
        limits = [asked.max_new_tokens for asked in self.asked]
        self.session.generate([asked.item for asked in self.asked], len(ready), limits, follow=self)

    def stopped(self, row: int) -> bool:
        self._alive()
        return self.jobs[row]["key"] in self.cancelled

    def streams(self, row: int) -> bool:
        return self.jobs[row]["stream"]

    def piece(self, row: int, text: str) -> None:
        key = self.jobs[row]["key"]
        before = self._sent.get(key, 0)  # of a batch that failed: the same text comes again
        self._seen[row] += len(text)
        if self._seen[row] > before:
            self._sent[key] = self._seen[row]
            self.front.send(("piece", key, text[max(0, len(text) - (self._seen[row] - before)) :]))

    def done(self, row: int, made: Any) -> None:
        key = self.jobs[row]["key"]
        answer = self.session.read(self.asked[row], made.text, made.confidence, made.gates)
        self._over.add(key)
        found = {
            "text": answer.text,
            "box": [round(value, 2) for value in answer.box] if answer.box else None,
            "task": answer.task,
            "confidence": round(answer.confidence, 4),
            "gates": [round(value, 4) for value in answer.gates],
            "kind": answer.parsed.kind,
            "notes": list(answer.notes),
            "finish": "stop" if made.ended else "length",
            "tokens": made.tokens,
            "prompt_tokens": made.prompt_tokens,
            "batch": len(self.jobs),
        }
        self.front.send(("done", key, found))

    def _alive(self) -> None:
        if time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            self.front.send(("alive",))
