"""The queue of accepted questions, the batches that the worker gets, and a new worker for one that died.

A question is with the front until it is answered. When a worker dies, what it had is asked again, one at a time, so that a question
that kills workers takes no others along; after `Settings.tries` deaths it fails. An answer that has begun to stream cannot be asked
again: it ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from unimed.serve import worker
from unimed.serve.settings import Refused, Settings
from unimed.serve.telemetry import Telemetry

SLOWEST_RETRY = 30.0  # seconds between two tries to start a worker
LAST_WORDS = ("done", "bad", "error", "broken")


class Event(NamedTuple):
    """kind: piece, done, bad (the question's fault), error (ours) or broken (a begun stream whose worker died)."""

    kind: str
    value: Any


class Job:
    """One accepted question. ``events``: what is to be told its sender; the last one is of LAST_WORDS."""

    def __init__(self, key: int, ask: dict[str, Any]) -> None:
        self.key, self.ask = key, ask
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.tries = 0
        self.begun = self.over = False

    def tell(self, kind: str, value: Any) -> None:
        if not self.over:
            self.begun = self.begun or kind == "piece"
            self.over = kind in LAST_WORDS
            self.events.put_nowait(Event(kind, value))


class Dispatcher:
    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self.settings, self.telemetry = settings, telemetry
        self.about: dict[str, Any] = {}  # of the model, once a worker has loaded it
        self.failed = ""  # the reason why the first worker could not load the model
        self.ready = False
        self.pid: int | None = None
        self.waiting: deque[Job] = deque()
        self.inside: dict[int, Job] = {}  # with the worker
        self._keys = itertools.count(1)
        self._last = 1  # size of the last batch
        self._gather: asyncio.TimerHandle | None = None
        self._heard = 0.0
        self._front: Any = None
        self._stopping = False
        self._sender = ThreadPoolExecutor(1, "to-worker")  # a pipe may be full for a moment
        self.first = asyncio.Event()  # the first worker is ready, or has failed

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Ends the worker. uvicorn has answered all that was accepted by then."""
        self._stopping = True
        self._send(("stop",))
        _, late = await asyncio.wait({self._running}, timeout=5)
        for task in late:
            task.cancel()
            await asyncio.wait({task})
        self._sender.shutdown(wait=False)

    def submit(self, ask: dict[str, Any]) -> Job:
        if len(self.waiting) >= self.settings.max_queue:
            raise Refused(429, f"{len(self.waiting)} questions are waiting, at most {self.settings.max_queue} may; ask again later",
                          "rate_limit_error", "queue_full")  # fmt: skip
        job = Job(next(self._keys), ask)
        self.waiting.append(job)
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """Its sender is gone, or has waited too long: what is made of it is of no use."""
        job.over = True
        if job.key in self.inside:
            self._send(("cancel", job.key))
        else:
            with contextlib.suppress(ValueError):
                self.waiting.remove(job)

    def _dispatch(self, gathered: bool = False) -> None:
        """A batch for an idle worker. While questions come in parallel, the others of the last batch get a moment to come back."""
        if gathered:
            self._gather = None
        if not self.ready or self.inside or not self.waiting:
            return
        if not gathered and len(self.waiting) < min(self._last, self.settings.max_batch) and not self.waiting[0].tries:
            if self._gather is None:
                self._gather = self._loop.call_later(self.settings.gather, self._dispatch, True)
            return
        if self._gather:
            self._gather.cancel()
            self._gather = None
        batch = [self.waiting.popleft()]
        while self.waiting and len(batch) < self.settings.max_batch and not (batch[0].tries or self.waiting[0].tries):
            batch.append(self.waiting.popleft())
        self._last = len(batch)
        self.inside = {job.key: job for job in batch}
        self._heard = self._loop.time()
        self.telemetry.batch(len(batch))
        self._send(("batch", [{"key": job.key, **job.ask} for job in batch]))

    def _send(self, message: tuple[Any, ...]) -> None:
        def send(front: Any = self._front) -> None:
            with contextlib.suppress(OSError, ValueError):  # the worker died, which its reader finds out
                front.send(message)

        if self._front is not None:
            self._sender.submit(send)

    async def _run(self) -> None:
        """One worker after the other."""
        failures = 0
        while not self._stopping:
            loaded = await self._one_worker()
            if self.failed or self._stopping:
                return
            failures = 0 if loaded else failures + 1
            self.telemetry.event("worker_ended", restarts=True, loaded=loaded)
            self.telemetry.restarts.inc()
            self._take_back()
            if not loaded:
                await asyncio.sleep(min(SLOWEST_RETRY, 0.5 * 2**failures))

    async def _one_worker(self) -> bool:
        """Runs a worker until it ends; whether it had loaded the model."""
        context = multiprocessing.get_context("spawn")
        front, back = context.Pipe()
        process = context.Process(target=worker.main, args=(back, self.settings), daemon=True, name="unimed-worker")
        await asyncio.to_thread(process.start)
        back.close()
        self.pid, self._front = process.pid, front
        inbox: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()
        threading.Thread(target=self._listen, args=(front, inbox), daemon=True).start()
        watch = asyncio.create_task(self._watch())
        loaded = False
        try:
            while (message := await inbox.get()) is not None:
                self._heard = self._loop.time()
                loaded = loaded or message[0] == "ready"
                self._hear(*message)
        finally:
            watch.cancel()
            self.ready, self._front, self.pid = False, None, None
            self.telemetry.worker(None)
            process.kill()
            await asyncio.to_thread(process.join)
            front.close()
        return loaded

    def _listen(self, front: Any, inbox: asyncio.Queue[tuple[Any, ...] | None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            try:
                while True:
                    self._loop.call_soon_threadsafe(inbox.put_nowait, front.recv())
            except (EOFError, OSError):
                self._loop.call_soon_threadsafe(inbox.put_nowait, None)

    def _hear(self, kind: str, *rest: Any) -> None:
        if kind == "ready":
            self.about, self.ready = rest[0], True
            self.telemetry.worker(self.pid)
            self.telemetry.event("worker_ready", pid=self.pid, device=self.about["device"])
            self.first.set()
            self._dispatch()
        elif kind == "failed":
            self.telemetry.event("worker_failed")
            if not self.about:
                self.failed = rest[0]
                self.first.set()
        elif kind == "idle":
            for job in self.inside.values():
                job.tell("error", "no answer came")  # every job but a cancelled one was told its last word
            self.inside = {}
            self._dispatch()
        elif kind != "alive" and (of := self.inside.get(rest[0])):
            of.tell(kind, rest[1])

    def _take_back(self) -> None:
        """What a dead worker had: asked again before all others, or ended."""
        again = []
        for job in self.inside.values():
            job.tries += 1
            if job.over:
                continue
            if job.begun:
                job.tell("broken", "the model worker died while it answered")
            elif job.tries >= self.settings.tries:
                job.tell("error", f"{job.tries} workers died over this question")
            else:
                again.append(job)
        self.inside = {}
        self.waiting.extendleft(reversed(again))

    async def _watch(self) -> None:
        """Kills a worker that has work and says nothing."""
        while True:
            await asyncio.sleep(1)
            if self.inside and self._loop.time() - self._heard > self.settings.stall and self.pid:
                self.telemetry.event("worker_silent", pid=self.pid)
                os.kill(self.pid, signal.SIGKILL)
