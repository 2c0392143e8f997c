"""The bytes of an image: from a data: URL, or from a host that the server was told to trust.

A host is reached at an address that was checked, so that a name cannot change between check and use. A name must lead to public addresses
only; a private or loopback address must itself be in the list. Redirects and proxies are not followed.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from unimed.serve.settings import Place, Refused, Settings

MEDIA: tuple[str, ...] = ("image/", "application/dicom", "application/zip", "application/octet-stream")
MEDIA += ("application/gzip", "application/x-gzip", "application/nifti", "application/x-nifti")
FETCH_SECONDS = 10.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_CHUNK = 1 << 16
Resolve = Callable[[str, int], list[str]]


def is_remote(url: str) -> bool:
    return url[:5].lower() != "data:"


def from_data(url: str, settings: Settings) -> bytes:
    head, comma, data = url[5:].partition(",")
    media, *options = head.lower().split(";")
    if not comma or "base64" not in options:
        raise _wrong("write it as data:image/png;base64,..., for DICOM data:application/dicom;base64,...")
    if not media.startswith(MEDIA):
        raise _wrong("its media type must be image/..., application/dicom, application/gzip (NIfTI), application/zip (a DICOM series)")
    try:
        made = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _wrong("it is not valid base64") from None
    if not made:
        raise _wrong("it is empty")
    if len(made) > settings.max_bytes:
        raise Refused(413, f"image_url: more than {settings.max_bytes} bytes", code="image_too_large", param="messages")
    return made


def _wrong(what: str) -> Refused:
    return Refused(400, f"image_url: {what}", code="invalid_image", param="messages")


def _public(host: str, port: int) -> list[str]:
    """The addresses of a name; one that is not public refuses the name."""
    try:
        found = list(dict.fromkeys(str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    except OSError:
        raise _wrong("its host is not found") from None
    for address in found:
        if not _is_public(ipaddress.ip_address(address.partition("%")[0])):
            raise _wrong("its host leads to an address that is not public; the server's --allow-image-hosts may name the address itself")
    return found


def _is_public(one: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(one, ipaddress.IPv6Address):
        if one.sixtofour or one.teredo or one in _NAT64:  # an address of version 4 inside
            return False
        if one.ipv4_mapped:
            one = one.ipv4_mapped
    return one.is_global and not one.is_multicast


def _addresses(host: str, port: int, places: tuple[Place, ...], scheme_port: int, resolve: Resolve) -> list[str]:
    if not any(place.host == host and (place.port or scheme_port) == port for place in places):
        raise _wrong("images are taken as data: URLs; this server was not told to trust that host (--allow-image-hosts)")
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        return resolve(host, port)


def fetch(url: str, settings: Settings, resolve: Resolve = _public) -> bytes:
    """The image at an http or https URL of an allowed host. It blocks; its time is limited."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise _wrong("not a URL") from None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise _wrong("only data:, http: and https: URLs are taken")
    if parts.username is not None or parts.password is not None:
        raise _wrong("a URL with a user or password is not taken")
    usual = 443 if parts.scheme == "https" else 80
    addresses = _addresses(host, port or usual, settings.image_hosts, usual, resolve)
    end = time.monotonic() + FETCH_SECONDS
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection = _Pinned(host, port or usual, addresses[0], parts.scheme == "https")
        try:
            connection.request("GET", target, headers={"Accept": "*/*", "Accept-Encoding": "identity"})
            return _read(connection.getresponse(), end, settings)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        raise _wrong("its host did not send it") from None


def _read(response: http.client.HTTPResponse, end: float, settings: Settings) -> bytes:
    if 300 <= response.status < 400:
        raise _wrong("its host answers with a redirect, which is not followed")
    if response.status != 200:
        raise _wrong(f"its host answers with status {response.status}")
    parts, size = [], 0
    while part := response.read1(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > settings.max_bytes:
            raise Refused(413, f"image_url: more than {settings.max_bytes} bytes", code="image_too_large", param="messages")
        if time.monotonic() > end:
            raise _wrong(f"its host took more than {FETCH_SECONDS:g} seconds")
    if not size:
        raise _wrong("it is empty")
    return b"".join(parts)


class _Pinned(http.client.HTTPConnection):
    """A connection to one address; the name serves the certificate and the Host header only."""

    def __init__(self, host: str, port: int, address: str, secure: bool) -> None:
        super().__init__(host, port, timeout=FETCH_SECONDS / 2)
        self._address = address
        self._context = ssl.create_default_context() if secure else None
        self.default_port = 443 if secure else 80

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._context:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)
