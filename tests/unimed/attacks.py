"""Requests that mean no good, all made here: bombs of a few kilobytes, and mutations from a seed. A file may unpack to 32 MiB."""

import contextlib
import gzip
import io
import json
import random
import socket
import struct
import zipfile
import zlib

import numpy as np
from dicom_samples import dicom_file
from PIL import Image
from serving import body, png, url


def zeros(mebibytes: int) -> bytes:
    """A raw deflate stream that unpacks to `mebibytes` MiB of zeros; it is about a thousandth of their size."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return first * mebibytes + packer.flush()


def claims_png(side: int = 100_000) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _black(side: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (side, side)).save(out, "PNG")
    return out.getvalue()


def bombs() -> dict[str, tuple[bytes, dict]]:
    """Files by name, with the fields of their request."""
    small = np.zeros((4, 4), np.uint8)
    plain = dicom_file(small)
    length = 144 + int.from_bytes(plain[140:144], "little")
    names = [b"UI" + len(name).to_bytes(2, "little") + name for name in (b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")]
    meta = plain[:length].replace(*names)
    deflated = meta[:140] + (len(meta) - 144).to_bytes(4, "little") + meta[144:] + zeros(40)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a.dcm", plain)
    central = archive.getvalue().index(b"PK\x01\x02")
    lying = archive.getvalue()[: central + 24] + (0xFFFFFFF0).to_bytes(4, "little") + archive.getvalue()[central + 28 :]
    header = gzip.compress(bytes(344) + b"n+1\0")
    return {
        "png of 100k x 100k": (claims_png(), {}),
        "png of 1001 x 1001, more than allowed": (_black(1001), {}),
        "deflated dicom": (deflated, {}),
        "deflated dicom without a group length": (deflated[:132] + deflated[144:], {}),
        "dicom of 60k x 60k": (dicom_file(small, Rows=60_000, Columns=60_000), {}),
        "dicom of many frames": (dicom_file(small[None], NumberOfFrames=2**31 - 1), {"plane": "coronal"}),
        "zip that says 4 GB": (lying, {}),
        "gzip of zeros": (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + zeros(40), {}),
        "gzip members": (header * 3, {}),
        "nifti of 32k x 32k x 32k": (gzip.compress(_nifti(32_000)), {}),
    }


def _nifti(side: int) -> bytes:
    import nibabel as nib

    made = nib.Nifti1Header()
    made.set_data_dtype(np.int16)
    made["dim"][:4] = 3, side, side, side
    made["vox_offset"], made["magic"] = 352, b"n+1"
    return made.binaryblock + bytes(4) + bytes(64)


WORDS = [
    None,
    True,
    -1,
    0,
    1e308,
    10**30,
    "",
    "x" * 3000,
    "\x00",
    "\ud800",
    [],
    {},
    [[[[]]]],
    {"a": {"b": 1}},
    "../../etc/passwd",
    "[refer]",
]
FIELDS = ["messages", "model", "stream", "max_tokens", "task", "plane", "slice", "window", "n", "stream_options", "user", "extra"]
PATHS = ["/../../../etc/passwd", "/v1/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../run.json", "//v1//models", "/v1/models%00", "/%ff"]
PATHS.append("/" + "a" * 9000)
ASK = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n"
RAW = [
    b"GET / HTTP/1.1\r\n\r\n",
    GET + b"X: a\nSet-Cookie: b\r\n\r\n",
    GET + b"X-Request-ID: a\rb\r\n\r\n",
    GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    ASK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    ASK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ASK + b"Content-Length: -1\r\n\r\n",
    ASK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
]


def attack(server, seed: int) -> int:
    """One request; its status."""
    rng = random.Random(seed)
    kind = seed % 6
    if kind == 0:
        return _post(server, rng.randbytes(rng.randrange(400)))
    if kind == 1:
        return _post(server, _flipped(rng, json.dumps(body("what?", url(png()), max_tokens=1)).encode()))
    if kind == 2:
        made = body("what?", url(png()), max_tokens=1)
        for field in rng.sample(FIELDS, 2):
            made[field] = rng.choice(WORDS)
        if rng.random() < 0.5:
            made["messages"] = [{"role": rng.choice(["user", "tool", 3]), "content": rng.choice([*WORDS, [rng.choice(WORDS)]])}]
        return _post(server, json.dumps(made).encode())
    if kind == 3:
        files = png(), dicom_file(np.arange(64, dtype=np.uint16).reshape(8, 8)), gzip.compress(_nifti(4) + bytes(64))
        data = _flipped(rng, rng.choice(files))
        return _post(server, json.dumps(body("what?", url(data, "application/octet-stream"), max_tokens=1)).encode())
    if kind == 4:
        return _raw(server, rng.choice(RAW))
    return _raw(server, f"{rng.choice(['GET', 'PUT', 'BREW'])} {rng.choice(PATHS)} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())


def _flipped(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])])
    for _ in range(rng.randrange(1, 8) if made else 0):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def _post(server, data: bytes) -> int:
    return server.client.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}).status_code


def _raw(server, data: bytes) -> int:
    """The status of bytes that are sent as they are; 400 where the connection is closed without one."""
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port), timeout=20) as made:
        try:
            made.sendall(data)
            with contextlib.suppress(OSError):  # "not connected": the server has closed it by now
                made.shutdown(socket.SHUT_WR)
            head = made.recv(1000)
        except ConnectionError:
            return 400
    assert b"\r\nSet-Cookie" not in head
    return int(head.split()[1]) if head else 400
