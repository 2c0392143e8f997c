"""A server under load: 16 clients, some of which send nonsense, dawdle or leave, and two kills of the worker.

    python tests/unimed/soak.py [--requests 10000] [--minutes 20] [--model RUN] [--out FILE.json]

It sends fewer where the minutes are over first, and says how many. Without --model it takes an untrained model of the sizes of the tiny
recipe. CI runs 120 requests on a smaller one.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]

from serving import Server, body, httpx, png, url

CLIENTS = 16
KINDS = {"plain": 60, "stream": 25, "malformed": 5, "slow": 5, "aborted": 5}  # in percent
MALFORMED = [b"{", b'{"messages": []}', json.dumps(body("[vqa] no image")).encode(), json.dumps(body("x", url(b"no image"))).encode()]


class Question:
    """One question and the Session's own answer to it."""

    def __init__(self, session, seed: int) -> None:
        rng = random.Random(seed)
        task = ("vqa", "refer", "caption", "qa")[seed % 4]
        image = None if task == "qa" else png(seed, (30 + seed % 20, 40))
        text = "" if task == "caption" else f"question {seed} " + "about " * rng.randrange(5)
        self.tokens = rng.randrange(4, 25)
        self.body = body(text, image and url(image), task=task, max_tokens=self.tokens)
        self.text = session.answer(image, text, task, max_new_tokens=self.tokens).text


class Soak:
    """``outcomes`` counts what became of the requests; ``wrong`` has what must not be."""

    def __init__(self, server: Server, questions: list[Question], count: int, kills: int, minutes: float = 60) -> None:
        self.server, self.questions, self.count, self.most = server, questions, count, 60 * minutes
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.seconds: list[float] = []
        self.memory: list[tuple[int, int, int, int]] = []  # requests so far, bytes of the front, worker, its bytes
        self._done, self._lock = 0, threading.Lock()
        self._kill_at = [(number + 1) / (kills + 1) for number in range(kills)]  # of the way
        self._here = threading.local()

    def run(self) -> "Soak":
        self.started = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self._one, range(self.count)))
        self.took = time.monotonic() - self.started
        return self

    def _one(self, number: int) -> None:
        if time.monotonic() - self.started > self.most:
            return
        rng = random.Random(number)
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        if not hasattr(self._here, "client"):
            self._here.client = httpx.Client(base_url=self.server.url, timeout=120, trust_env=False)
        try:
            outcome = getattr(self, f"_{kind}")(rng)
        except Exception as error:
            outcome = "lost"
            self.wrong.append(f"request {number} ({kind}): {type(error).__name__} {error}")
        with self._lock:
            self.outcomes[outcome] += 1
            self._done += 1
            way = max(self._done / self.count, (time.monotonic() - self.started) / self.most)
            due = self._kill_at and way >= self._kill_at[0]
            if due:
                self._kill_at.pop(0)
            look = self._done % max(1, min(250, self.count // 40)) == 0
        if due:
            os.kill(self.server.worker(), signal.SIGKILL)
        if look:
            self._look()

    def _look(self) -> None:
        resident = int(Path(f"/proc/{self.server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        worker = int(self.server.metric("unimed_worker_resident_memory_bytes"))
        self.memory.append((self._done, resident, self.server.worker(), worker))

    def _post(self, data) -> "httpx.Response":
        given = {"Content-Type": "application/json"}
        return self._here.client.post("/v1/chat/completions", content=data, headers=given)

    def _answered(self, question: Question, response) -> str:
        if response.status_code != 200:
            raise AssertionError(f"status {response.status_code}: {response.text[:200]}")
        if response.json()["choices"][0]["message"]["content"] != question.text:
            raise AssertionError("its answer is not the Session's")
        return "answered"

    def _plain(self, rng) -> str:
        question, start = rng.choice(self.questions), time.monotonic()
        outcome = self._answered(question, self._post(json.dumps(question.body)))
        self.seconds.append(time.monotonic() - start)
        return outcome

    def _slow(self, rng) -> str:
        question = rng.choice(self.questions)
        data = json.dumps(question.body).encode()

        def parts():
            for at in range(0, len(data), len(data) // 4 + 1):
                time.sleep(0.05)
                yield data[at : at + len(data) // 4 + 1]

        return self._answered(question, self._post(parts())) + " to a slow one"

    def _stream(self, rng) -> str:
        question = rng.choice(self.questions)
        text = self._post(json.dumps(question.body | {"stream": True})).text
        events = [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
        if "error" in events[-1]:
            if events[-1]["error"]["code"] != "broken":
                raise AssertionError(events[-1]["error"]["message"])
            return "stream broken off by a kill"
        content = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        if content != question.text or not text.endswith("[DONE]\n\n"):
            raise AssertionError("its stream is not the Session's answer")
        return "streamed"

    def _malformed(self, rng) -> str:
        response = self._post(rng.choice(MALFORMED))
        if response.status_code != 400 or not response.json()["error"]["message"]:
            raise AssertionError(f"status {response.status_code}")
        return "refused with a reason"

    def _aborted(self, rng) -> str:
        question = rng.choice(self.questions)
        try:
            patience = httpx.Timeout(60, read=rng.random() * 0.2)
            httpx.post(f"{self.server.url}/v1/chat/completions", json=question.body, timeout=patience, trust_env=False)
        except httpx.ReadTimeout:
            return "left"
        return "answered before it left"

    def growth(self) -> dict[str, float | None]:
        """How much memory grew from the first fifth of a process's life on, in percent: the front's, and the longest worker's."""
        lives = Counter(worker for _, _, worker, size in self.memory if size)
        longest = max(lives, key=lambda worker: lives[worker])
        found = {"front": [front for _, front, _, _ in self.memory], "worker": [s for _, _, w, s in self.memory if w == longest and s]}
        return {name: _growth(sizes) for name, sizes in found.items()}

    def report(self) -> dict:
        ordered = sorted(self.seconds)
        return {
            "requests": self._done,
            "clients": CLIENTS,
            "outcomes": dict(sorted(self.outcomes.items())),
            "wrong": self.wrong[:20],
            "seconds": round(self.took, 1),
            "requests_a_second": round(self._done / self.took, 1),
            "p50_ms": round(1000 * statistics.median(ordered), 1),
            "p99_ms": round(1000 * ordered[int(len(ordered) * 0.99)], 1),
            "mean_batch": round(self.server.metric("unimed_batch_size_sum") / self.server.metric("unimed_batch_size_count"), 2),
            "worker_restarts": self.server.metric("unimed_worker_restarts_total"),
            "memory_growth_percent": self.growth(),
        }


def _growth(sizes: list[int]) -> float | None:
    warm = sizes[len(sizes) // 5 :]
    part = len(warm) // 4
    return round(100 * (statistics.median(warm[-part:]) / statistics.median(warm[:part]) - 1), 2) if part else None


class Steady(Soak):
    """Plain questions only, for the comparison of batch sizes."""

    def _one(self, number: int) -> None:
        if not hasattr(self._here, "client"):
            self._here.client = httpx.Client(base_url=self.server.url, timeout=120, trust_env=False)
        self.outcomes[self._plain(random.Random(number))] += 1


def compare(run: Path, questions: list[Question], count: int, folder: Path) -> dict[str, dict]:
    """The same plain questions with batches and without."""
    found = {}
    for batch in (16, 1):
        with Server(run, folder / f"batch-{batch}", "--max-batch", str(batch)) as server:
            Steady(server, questions, 3 * CLIENTS, 0).run()
            made = Steady(server, questions, count, 0).run()
            ordered = sorted(made.seconds)
            found[f"max_batch {batch}"] = {
                "requests": count,
                "requests_a_second": round(count / made.took, 1),
                "p50_ms": round(1000 * statistics.median(ordered), 1),
                "p99_ms": round(1000 * ordered[int(len(ordered) * 0.99)], 1),
            }
    return found


def main() -> int:
    import unimed
    from unimed.models.build import build
    from unimed.models.spec import ModelSpec

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--compare", type=int, default=600, help="requests of each side of the comparison of batch sizes")
    parser.add_argument("--model", type=Path, help="a run")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), given.model
        if run is None:
            from model_samples import TEXTS, lively

            run = folder / "runs" / "tiny"
            model, processor = build(ModelSpec(), TEXTS)
            lively(model).save_pretrained(run / "model")
            processor.save_pretrained(run / "model")
        session = unimed.load(run, device="cpu")
        questions = [Question(session, seed) for seed in range(60)]
        with Server(run, folder / "soak") as server:
            made = Soak(server, questions, given.requests, kills=2, minutes=given.minutes).run()
            report = made.report()
            report["exit_status"] = server.stop()
        print(json.dumps(report, indent=1), flush=True)  # the comparison may be interrupted
        report["comparison"] = compare(run, questions, given.compare, folder)
        first, second = (report["comparison"][f"max_batch {batch}"]["requests_a_second"] for batch in (16, 1))
        report["times_the_throughput_of_max_batch_1"] = round(first / second, 2)
    text = json.dumps(report, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
