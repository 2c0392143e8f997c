"""What is known of a server from outside: counters for Prometheus and one JSON line an event. Neither holds anything that was asked."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Telemetry:
    def __init__(self, log: IO[str] | None = None) -> None:
        self._log = log or sys.stderr
        self._worker: int | None = None
        self.registry = made = CollectorRegistry()
        ProcessCollector(registry=made)
        self.requests = Counter("unimed_requests", "Requests by route and status", ["route", "status"], registry=made)
        self.seconds = Histogram("unimed_request_seconds", "Time to the whole response", ["route"], buckets=_SECONDS, registry=made)
        self.batches = Histogram("unimed_batch_size", "Questions in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=made)
        self.tokens = Counter("unimed_tokens", "Tokens of answers", registry=made)
        self.restarts = Counter("unimed_worker_restarts", "Workers that ended and were replaced", registry=made)
        self.broken = Counter("unimed_streams_broken", "Streams that ended with an error after they had begun", registry=made)
        self.open = Gauge("unimed_requests_open", "Requests that are read, waiting or answered", registry=made)
        self.waiting = Gauge("unimed_queue_length", "Accepted questions that wait", registry=made)
        up = Gauge("unimed_worker_up", "1 while a worker has the model", registry=made)
        up.set_function(lambda: int(self._worker is not None))
        memory = Gauge("unimed_worker_resident_memory_bytes", "Memory of the worker", registry=made)
        memory.set_function(lambda: _resident(self._worker))

    def worker(self, pid: int | None) -> None:
        self._worker = pid

    def batch(self, size: int) -> None:
        self.batches.observe(size)

    def event(self, name: str, **fields: Any) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": name, **fields}
        print(json.dumps(line), file=self._log, flush=True)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _resident(pid: int | None) -> int:
    """Bytes of memory of a process; 0 where that is unknown."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
