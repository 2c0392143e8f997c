"""What `unimed serve` was told, checked before anything starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from unimed.errors import UserError

SHORTEST_KEY = 16
MIB = 1 << 20


class Refused(Exception):
    """A request that is not answered: the status, a reason for its sender, and OpenAI's type and code of the error."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.headers = {"Retry-After": "1"} if status in (429, 503) else {}
        if status in (408, 413):
            self.headers["Connection"] = "close"  # the rest of the body is not read

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        message, param = (text and text[:1000].encode("utf-8", "replace").decode() for text in (str(self), self.param))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}


class Place(NamedTuple):
    """A host that images may come from; port None is that of the scheme."""

    host: str
    port: int | None


@dataclass(frozen=True)
class Settings:
    """Limits are per request unless they say otherwise. Sizes are in bytes, times in seconds.

    max_queue: accepted and waiting. max_open: requests that are read, waiting or answered. max_held: bytes of all bodies together.
    unpacked: of a file or volume. body_timeout: until a request is read, or until a reader takes what was sent. timeout: until the answer
    is whole. gather: the longest wait for the rest of a batch, only while requests come in parallel. stall: silence of a working worker.
    tries: workers that may die over one request.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_batch: int = 16
    max_queue: int = 64
    max_open: int = 128
    max_bytes: int = 32 * MIB
    max_held: int = 1024 * MIB
    max_pixels: int = 64_000_000
    unpacked: int = 512 * MIB
    max_tokens: int = 512
    max_question: int = 20_000
    body_timeout: float = 30
    timeout: float = 120
    gather: float = 0.01
    stall: float = 120
    tries: int = 3
    image_hosts: tuple[Place, ...] = ()
    device: str = "auto"
    verify: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_open", "max_bytes", "max_pixels", "max_tokens", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be above 0")
        if not self.keys and not is_loopback(self.host):
            raise UserError(
                f"--host {self.host}: without a key only this machine may ask (127.0.0.1, ::1 or localhost); give --api-key-file FILE"
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys of a file, one a line; lines that begin with # are comments."""
    if path is None:
        return ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file {path}: no key in it; write one a line, for example by: openssl rand -hex 32")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"--api-key-file {path}: key {number} must have {SHORTEST_KEY} or more ASCII characters without spaces")
    return keys


def read_places(names: list[str]) -> tuple[Place, ...]:
    """Hosts as they are typed: name, name:port, address, [v6]:port; several in one text are split at commas."""
    return tuple(_place(name.strip()) for text in names for name in text.split(",") if name.strip())


def _place(text: str) -> Place:
    host, port = text, ""
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or any(c in host for c in "/@*?# ") or (port and not (port.isdecimal() and 0 < int(port) < 65536)):
        raise UserError(f"--allow-image-hosts {text}: write a host, host:port or address, without scheme, path or *")
    return Place(host.lower().rstrip("."), int(port) if port else None)
