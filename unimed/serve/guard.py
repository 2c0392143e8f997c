"""What holds for every request: an id, a host name that is ours, the key, a place among the open ones, one log line, one error shape."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from unimed.serve.settings import Refused, Settings, is_loopback
from unimed.serve.telemetry import Telemetry
from unimed.serve.worker import where

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
PROBES = ("/health", "/ready")  # they need no key
ALWAYS = (*PROBES, "/metrics")  # answered also when too many requests are open
GONE = 499  # in logs and metrics: the client left before its answer
_ID = re.compile(r"[0-9a-fA-F-]{8,64}")  # a client's own id reaches the log, so it must be a number


class Guard:
    """An ASGI application around another. ``scope["state"]`` has ``id``, and ``log``, to which a route may add numbers and task names."""

    def __init__(self, app: Any, settings: Settings, telemetry: Telemetry) -> None:
        self.app, self.settings, self.telemetry = app, settings, telemetry
        self._keys = [key.encode() for key in settings.keys]
        self._open = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, start, status = Headers(scope=scope), time.monotonic(), 0
        key = headers.get("x-request-id", "")
        key = key if _ID.fullmatch(key) else secrets.token_hex(12)
        log: dict[str, Any] = {}
        scope.setdefault("state", {}).update(id=key, log=log)

        async def sends(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", key.encode()), (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        self._open += 1
        self.telemetry.open.set(self._open)
        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, sends)
        except Refused as refused:
            await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, sends)
        except Exception as error:  # a fault of ours; Starlette has sent its 500
            log["error"] = where(error)
            if not status:
                fault = Refused(500, "the server failed; its log has the request id", "server_error")
                await JSONResponse(fault.body, 500)(scope, receive, sends)
        finally:
            self._open -= 1
            self.telemetry.open.set(self._open)
            self._note(scope, log, log.pop("status", status) or GONE, time.monotonic() - start)

    def _check(self, path: str, headers: Headers) -> None:
        if not self._keys and not is_loopback(_name(headers.get("host", ""))):  # a page that rebinds its name to this machine
            raise Refused(421, "this server has no key, so it answers to the names of this machine only", code="wrong_host")
        if self._keys and path not in PROBES:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            found = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]  # each is compared, whichever fits
            if scheme.lower() != "bearer" or not any(found):
                refused = Refused(401, "a valid key is needed: Authorization: Bearer KEY", "authentication_error", "invalid_api_key")
                refused.headers = {"WWW-Authenticate": "Bearer"}
                raise refused
        if self._open > self.settings.max_open and path not in ALWAYS:
            raise Refused(429, f"{self.settings.max_open} requests are open, which is the most", "rate_limit_error", "too_many_requests")

    def _note(self, scope: Message, log: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")  # never the path itself, which is the client's text
        method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "OTHER"
        self.telemetry.requests.labels(route, str(status)).inc()
        self.telemetry.seconds.labels(route).observe(seconds)
        if route not in PROBES:
            key = scope["state"]["id"]
            self.telemetry.event("request", id=key, method=method, route=route, status=status, ms=round(seconds * 1000, 1), **log)


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
