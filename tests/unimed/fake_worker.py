"""A worker without a model, which does what the question says. The front starts it as it starts the real one."""

import os
import threading
import time
from pathlib import Path

ANSWER = {
    "box": None,
    "confidence": 1.0,
    "gates": [],
    "kind": "",
    "notes": [],
    "finish": "stop",
    "tokens": 1,
    "prompt_tokens": 1,
    "batch": 1,
}


def main(front, settings):
    if settings.model.name == "absent":
        front.send(("failed", "no such model"))
        return
    cancelled, batches, there = set(), [], threading.Semaphore(0)

    def listen():
        while True:
            try:
                kind, *rest = front.recv()
            except (EOFError, OSError):
                os._exit(0)
            if kind == "cancel":
                cancelled.add(rest[0])
            else:
                batches.append(rest[0] if kind == "batch" else None)
                there.release()

    threading.Thread(target=listen, daemon=True).start()
    front.send(("ready", {"name": "fake", "tasks": ["qa"], "device": "cpu"}))
    while True:
        there.acquire()
        if (jobs := batches.pop(0)) is None:
            return
        for job in jobs:
            answer(front, job, len(jobs), cancelled, settings)
        front.send(("idle",))


def answer(front, job, size, cancelled, settings):
    key, question = job["key"], job["fields"]["question"]
    first = settings.model / question.replace(" ", "_")
    if question == "die" or (question.startswith("die once") and not first.exists()):
        Path(first).touch()
        os._exit(1)
    if question == "hang" and not first.exists():
        Path(first).touch()
        time.sleep(1000)
    if question == "die later" and not first.exists():
        Path(first).touch()
        front.send(("piece", key, "begun"))
        time.sleep(0.2)
        os._exit(1)
    if question == "wait":
        while key not in cancelled:
            time.sleep(0.01)
        (settings.model / "cancelled").touch()
        return
    if question == "bad":
        front.send(("bad", key, "what, where"))
        return
    if question == "fault":
        front.send(("error", key, "ValueError in x.py:1"))
        return
    if job["stream"]:
        front.send(("piece", key, question))
    front.send(("done", key, {**ANSWER, "text": question, "task": job["fields"]["task"], "batch": size}))
