"""The routes. `application` gives the whole ASGI application: also for a server other than `run.py`, such as Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from unimed.serve import images
from unimed.serve.chat import Chunks, completion, event, read
from unimed.serve.dispatch import Dispatcher, Event, Job
from unimed.serve.guard import GONE, Guard
from unimed.serve.settings import Refused, Settings
from unimed.serve.telemetry import Telemetry

_SMALL = 1 << 18  # bytes of a body that are read where they are; more go to a thread


def application(settings: Settings, telemetry: Telemetry | None = None) -> Guard:
    telemetry = telemetry or Telemetry()
    api = Api(settings, telemetry)
    app = FastAPI(title="unimed", docs_url=None, redoc_url=None, openapi_url=None, lifespan=api.lifespan, redirect_slashes=False)
    app.state.dispatcher = api.dispatcher
    app.add_api_route("/v1/chat/completions", api.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"], response_model=None)
    app.add_api_route("/health", api.health, methods=["GET"], response_model=None)
    app.add_api_route("/ready", api.ready, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", api.metrics, methods=["GET"], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    return Guard(app, settings, telemetry)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status, error.headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "no such path", 405: "the path does not take this method"}
    refused = Refused(error.status_code, words.get(error.status_code, "the request cannot be used"))
    return JSONResponse(refused.body, refused.status, error.headers)


class Api:
    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self.settings, self.telemetry = settings, telemetry
        self.dispatcher = Dispatcher(settings, telemetry)
        self._held = 0  # bytes of bodies that are not answered yet
        self._fetchers = ThreadPoolExecutor(8, "fetch")
        telemetry.waiting.set_function(lambda: len(self.dispatcher.waiting))

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.dispatcher.start()
        yield
        await self.dispatcher.stop()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def health(self) -> Response:
        """The front is there."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """The model is there, too."""
        ready = self.dispatcher.ready
        return JSONResponse({"status": "ready" if ready else "the model is being loaded"}, 200 if ready else 503)

    async def metrics(self) -> Response:
        return Response(self.telemetry.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @property
    def name(self) -> str:
        return self.dispatcher.about.get("name") or self.settings.model.resolve().name

    async def models(self) -> Response:
        tasks = self.dispatcher.about.get("tasks", [])
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "unimed", "tasks": tasks}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        log = request.state.log
        try:
            body = await self._body(request)
        except ClientDisconnect:
            log["status"] = GONE
            return Response(status_code=204)
        self._held += len(body)
        try:
            ask = await _off_loop(read, body, self.settings)
            log |= {"bytes": len(body), "task": ask.fields["task"], "stream": ask.stream, "image": ask.url is not None}
            if ask.model not in (None, self.name):
                raise Refused(404, f"model: this server has {self.name!r} only", code="model_not_found", param="model")
            image = await self._image(ask.url) if ask.url is not None else None
            job = self.dispatcher.submit({"image": image, "fields": ask.fields, "stream": ask.stream})
            try:
                first = await self._first(request, job)
            except BaseException:
                self.dispatcher.cancel(job)
                raise
        finally:
            self._held -= len(body)
        if first is None:
            log["status"] = GONE
            return Response(status_code=204)
        self._check(first, log)
        key = request.state.id
        if ask.stream:
            events = self._events(job, first, Chunks(key, self.name, ask), log)
            return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._count(first.value, log, job)
        return JSONResponse(completion(key, self.name, ask, first.value))

    async def _body(self, request: Request) -> bytes:
        """The body, within its limits of bytes and time."""
        settings, headers = self.settings, request.headers
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the Content-Type must be application/json")
        most = settings.max_bytes * 4 // 3 + 65536  # an image of max_bytes in base64, and what is around it
        too_large = Refused(413, f"the body has more than {most} bytes (an image may have {settings.max_bytes})", code="body_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > most:
            raise too_large
        if self._held + int(length) > settings.max_held:
            raise Refused(429, "too much is being read at once; ask again later", "rate_limit_error", "memory")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_timeout):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > most:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body did not come within {settings.body_timeout:g} seconds", code="slow_body") from None
        return b"".join(parts)

    async def _image(self, url: str) -> bytes:
        if images.is_remote(url):
            return await asyncio.get_running_loop().run_in_executor(self._fetchers, images.fetch, url, self.settings)
        return await _off_loop(images.from_data, url, self.settings)

    async def _first(self, request: Request, job: Job) -> Event | None:
        """The first that is known of an answer, which is all of it without streaming; None when the client has left."""
        heard, left = asyncio.create_task(job.events.get()), asyncio.create_task(_left(request))
        try:
            done, _ = await asyncio.wait({heard, left}, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            heard.cancel()
            left.cancel()
        if heard in done:
            return heard.result()
        self.dispatcher.cancel(job)
        if not done:
            raise self._late()
        return None

    def _late(self) -> Refused:
        return Refused(504, f"no answer within {self.settings.timeout:g} seconds", "server_error", "timeout")

    def _check(self, first: Event, log: dict[str, Any]) -> None:
        if first.kind == "bad":
            raise Refused(400, str(first.value), param="messages")
        if first.kind == "error":
            log["error"] = first.value
            raise Refused(500, "the model failed on this question; the server's log has the request id", "server_error")

    def _count(self, answer: dict[str, Any], log: dict[str, Any], job: Job) -> None:
        log |= {"tokens": answer["tokens"], "batch": answer["batch"], "tries": job.tries + 1}
        self.telemetry.tokens.inc(answer["tokens"])

    async def _events(self, job: Job, first: Event, chunks: Chunks, log: dict[str, Any]) -> AsyncIterator[bytes]:
        """The stream of one answer. Every end but that of the answer cancels the job."""
        log["outcome"] = "left"
        one, now = first, asyncio.get_running_loop().time
        end = now() + self.settings.timeout
        try:
            yield chunks.start()
            while one.kind == "piece":
                yield chunks.piece(one.value)
                one = await asyncio.wait_for(job.events.get(), max(0.0, end - now()))
            if one.kind == "done":
                self._count(one.value, log, job)
                yield chunks.end(one.value)
                log["outcome"] = "done"
                return
            refused = Refused(500, "the answer broke off: the model worker failed; ask again", "server_error", "broken")
        except TimeoutError:
            refused = self._late()
        finally:
            if not job.over:
                self.dispatcher.cancel(job)
        log["outcome"] = "broken"
        self.telemetry.broken.inc()
        yield event(refused.body)


async def _off_loop(function: Any, data: Any, settings: Settings) -> Any:
    return function(data, settings) if len(data) < _SMALL else await asyncio.to_thread(function, data, settings)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
