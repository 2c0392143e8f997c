"""A server of `unimed serve` in a process of its own, on a very small model, and requests to it."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import pytest
from model_samples import lively, picture, small

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]
TOO_LONG = 120  # seconds until a server must be there


def save_model(run: Path) -> Path:
    """A run with an untrained model whose answers differ from question to question."""
    model, processor = small()
    lively(model).save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    return run


def png(seed: int = 1, size: tuple[int, int] = (40, 28)) -> bytes:
    out = BytesIO()
    picture(seed, size).save(out, "PNG")
    return out.getvalue()


def url(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64," + base64.b64encode(data).decode()


def body(text: str, image: str | None = None, **fields) -> dict:
    parts = [{"type": "text", "text": text}] + ([{"type": "image_url", "image_url": {"url": image}}] if image else [])
    return {"messages": [{"role": "user", "content": parts}], **fields}


class Server:
    """Started by `unimed serve`; ``log`` is its standard error. TMPDIR is an empty folder, in which nothing may appear."""

    def __init__(self, run: Path, folder: Path, *options: str) -> None:
        self.log, self.scratch = folder / "log", folder / "scratch"
        self.scratch.mkdir(parents=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.scratch), "COLUMNS": "200"}
        command = [sys.executable, "-m", "unimed", "serve", "--model", str(run), "--port", "0", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)

    def __enter__(self) -> "Server":
        end = time.monotonic() + TOO_LONG
        while not (found := re.search(r"answers at (http://\S+)/v1", self.log.read_text())):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=TOO_LONG, trust_env=False)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TOO_LONG)

    def chat(self, text: str, image: str | None = None, **fields) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body(text, image, **fields))

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def worker(self) -> int:
        """The process of the newest worker."""
        return [event["pid"] for event in self.events() if event["event"] == "worker_ready"][-1]

    def metric(self, name: str) -> float:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))
