"""The dispatcher of unimed serve: dead and hanging workers, batches, the start."""

import asyncio
import io
import json
import socket

import pytest

from unimed.errors import UserError

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from unimed.serve.dispatch import LAST_WORDS, Dispatcher
from unimed.serve.settings import Refused
from unimed.serve.telemetry import Telemetry


def asked(text, stream=False):
    return {"image": None, "fields": {"question": text, "task": "qa"}, "stream": stream}


async def heard(job):
    events = []
    while not events or events[-1].kind not in LAST_WORDS:
        events.append(await asyncio.wait_for(job.events.get(), 30))
    return events


def with_dispatcher(settings, body):
    """Runs ``body(dispatcher)`` beside a dispatcher; gives its result and the log's events."""

    async def run():
        log = io.StringIO()
        dispatcher = Dispatcher(settings, Telemetry(log))
        dispatcher.start()
        await asyncio.wait_for(dispatcher.first.wait(), 60)
        try:
            return await body(dispatcher), [json.loads(line) for line in log.getvalue().splitlines()]
        finally:
            await dispatcher.stop()

    return asyncio.run(run())


def test_questions_of_a_dead_worker_are_asked_again(settings):
    async def ask(dispatcher):
        texts = ["one", "die once", "two", "die", "three"]
        jobs = [dispatcher.submit(asked(text)) for text in texts]
        jobs.append(dispatcher.submit(asked("die later", stream=True)))
        return [await heard(job) for job in jobs], [job.tries for job in jobs], dispatcher.inside

    (events, tries, inside), log = with_dispatcher(settings(max_batch=8), ask)
    last = [one[-1] for one in events]
    assert [one.kind for one in last] == ["done", "done", "done", "error", "done", "broken"]
    assert last[3].value == "3 workers died over this question"
    assert [one.value["text"] for one in last if one.kind == "done"] == ["one", "die once", "two", "three"]
    assert tries[0] == 0  # answered before its neighbour killed the worker
    assert tries[1:5] == [1, 1, 3, 1]  # who sat beside is asked again by itself, once
    assert [one.kind for one in events[5]] == ["piece", "broken"]  # a begun stream is not begun again
    assert inside == {}
    assert sum(event["event"] == "worker_ended" for event in log) == 4


def test_a_worker_that_hangs_is_replaced(settings):
    async def ask(dispatcher):
        return await heard(dispatcher.submit(asked("hang")))

    events, log = with_dispatcher(settings(stall=1.5), ask)
    assert [one.kind for one in events] == ["done"]
    assert [event["event"] for event in log][:3] == ["worker_ready", "worker_silent", "worker_ended"]


def test_a_batch_is_what_waits_and_a_cancelled_question_leaves_it(settings, tmp_path):
    async def ask(dispatcher):
        first = dispatcher.submit(asked("wait"))
        waiting = [dispatcher.submit(asked(str(number))) for number in range(6)]
        with pytest.raises(Refused, match="6 questions are waiting, at most 6 may") as caught:
            dispatcher.submit(asked("too many"))
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        dispatcher.cancel(waiting[2])
        dispatcher.cancel(first)
        return [await heard(job) for at, job in enumerate(waiting) if at != 2]

    events, _ = with_dispatcher(settings(max_batch=4, max_queue=6), ask)
    assert [one[-1].value["batch"] for one in events] == [4, 4, 4, 4, 1]
    assert [one[-1].value["text"] for one in events] == ["0", "1", "3", "4", "5"]
    assert (tmp_path / "cancelled").exists()


def test_a_model_that_cannot_be_loaded_ends_the_start(settings, tmp_path):
    async def ask(dispatcher):
        return dispatcher.failed, dispatcher.ready

    assert with_dispatcher(settings(model=tmp_path / "absent"), ask)[0] == ("no such model", False)


def test_serving_it_is_one_line(settings, tmp_path):
    from unimed.serve.run import run

    with pytest.raises(UserError, match=r"^no such model$"):
        run(settings(model=tmp_path / "absent", port=0), lambda port, about: None, Telemetry(io.StringIO()))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen there"):
        run(settings(port=taken.getsockname()[1]), lambda port, about: None, Telemetry(io.StringIO()))
