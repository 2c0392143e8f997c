"""The server as `unimed serve` starts it: uvicorn, with connections that cannot be held open by silence, and an end that answers first."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from unimed.errors import UserError
from unimed.serve.api import application
from unimed.serve.dispatch import Dispatcher
from unimed.serve.settings import Refused, Settings
from unimed.serve.telemetry import Telemetry
from unimed.serve.worker import where


def protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's connection, which ends when a request's head, or a reader, takes longer than ``seconds``."""

    class Connection(H11Protocol):
        _head: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_head()

        def _wait_for_head(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            if waits and self._head is None:
                self._head = self.loop.call_later(seconds, self._cut)
            elif not waits and self._head is not None:
                self._head.cancel()
                self._head = None

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._reader:
                self._reader.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for timer in (self._head, self._reader):
                if timer:
                    timer.cancel()

        def _cut(self) -> None:
            self._head = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            import h11

            body = json.dumps(Refused(400, "not a valid HTTP request", code="invalid_http").body).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Connection


class _Server(uvicorn.Server):
    """Tells when the model is there, and ends where it cannot be loaded."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher, ready: Callable[[int, dict[str, Any]], None]) -> None:
        super().__init__(config)
        self.dispatcher, self._tell = dispatcher, ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._waits = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        await self.dispatcher.first.wait()
        if self.dispatcher.failed:
            self.should_exit = True
        else:
            self._tell(self.servers[0].sockets[0].getsockname()[1], self.dispatcher.about)


class _Places(logging.Handler):
    """What libraries log about their faults, without its words, which may quote a request."""

    def __init__(self, telemetry: Telemetry) -> None:
        super().__init__(logging.ERROR)
        self.telemetry = telemetry

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.telemetry.event("fault", logger=record.name, error=where(error) if error else f"{record.module}:{record.lineno}")


def run(settings: Settings, ready: Callable[[int, dict[str, Any]], None], telemetry: Telemetry | None = None) -> None:
    """Serves until SIGINT or SIGTERM, then answers what was accepted. ``ready`` gets the port and what is known of the model."""
    telemetry = telemetry or Telemetry()
    app = application(settings, telemetry)
    root = logging.getLogger()
    before, root.handlers = root.handlers, [_Places(telemetry)]
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=protocol(settings.body_timeout), ws="none", log_config=None, access_log=False,
        server_header=False, lifespan="on", backlog=settings.max_open, timeout_keep_alive=30,
        timeout_graceful_shutdown=int(settings.timeout + settings.body_timeout),
    )  # fmt: skip
    server = _Server(config, app.app.state.dispatcher, ready)
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again once it has ended: the end is the wanted one
            signal.signal(one, lambda *_: None)
    try:
        server.run()
    except SystemExit:  # uvicorn, where it cannot listen
        raise UserError(f"--host {settings.host} --port {settings.port}: cannot listen there; is the port in use?") from None
    finally:
        root.handlers = before
    if server.dispatcher.failed:
        raise UserError(server.dispatcher.failed)
