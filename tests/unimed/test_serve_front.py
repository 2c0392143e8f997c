"""The front of `unimed serve` by itself: limits, keys, errors, images. No model is loaded."""

import asyncio
import http.server
import io
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from serving import body, png, url
from typer.testing import CliRunner

from unimed.errors import UserError

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from unimed.serve import images  # noqa: E402
from unimed.serve.api import application  # noqa: E402
from unimed.serve.settings import Place, Refused, Settings, read_keys, read_places  # noqa: E402
from unimed.serve.telemetry import Telemetry  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-twenty-letters"


def test_what_libraries_log_has_no_words():
    import logging

    from unimed.serve.run import _Places

    log = io.StringIO()
    record = logging.LogRecord("asyncio", logging.ERROR, "x.py", 7, "never retrieved: %s", ("Wintergreen",), None)
    _Places(Telemetry(log)).handle(record)
    try:
        raise ValueError("Wintergreen")
    except ValueError:
        record.exc_info = sys.exc_info()
    _Places(Telemetry(log)).handle(record)
    assert json.loads(log.getvalue().splitlines()[0])["error"] == "x:7"
    assert "ValueError in test_serve_front.py" in log.getvalue()
    assert "Wintergreen" not in log.getvalue()


def with_api(settings, body, log=None):
    """Runs ``body(client)`` against the whole application; the client's host is this machine."""

    async def run():
        guard = application(settings, Telemetry(log or io.StringIO()))
        transport = httpx.ASGITransport(app=guard, raise_app_exceptions=False)
        async with (
            guard.app.router.lifespan_context(guard.app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
        ):
            return await body(client)

    return asyncio.run(run())


async def chat(client, text, image=None, headers=None, **fields):
    return await client.post("/v1/chat/completions", json=body(text, image, **fields), headers=headers)


def test_outcomes_have_openais_shapes(settings):
    async def ask(client):
        return {text: await chat(client, text) for text in ("hello", "bad", "fault")}

    found = with_api(settings(), ask)
    made = found["hello"].json()
    assert made["object"] == "chat.completion"
    assert made["choices"][0]["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert made["choices"][0]["unimed"]["notice"] == "Research use, not for diagnosis"
    assert made["id"] == "chatcmpl-" + found["hello"].headers["x-request-id"]
    assert found["bad"].json() == {"error": {"message": "what, where", "type": "invalid_request_error", "param": "messages", "code": None}}
    assert found["bad"].status_code == 400
    assert found["fault"].status_code == 500
    assert "ValueError" not in found["fault"].text


def test_a_stream_that_breaks_off_ends_with_an_error(settings):
    async def ask(client):
        whole, broken = await chat(client, "hello", stream=True), await chat(client, "die later", stream=True)
        return whole, broken, (await client.get("/metrics")).text

    whole, broken, metrics = with_api(settings(), ask)
    events = [json.loads(line[6:]) for line in broken.text.split("\n\n") if line and line != "data: [DONE]"]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == "begun"
    assert events[-1]["error"]["code"] == "broken"
    assert "[DONE]" not in broken.text
    assert whole.text.endswith("data: [DONE]\n\n")
    assert "unimed_streams_broken_total 1.0" in metrics
    assert "unimed_worker_restarts_total 1.0" in metrics


@pytest.mark.parametrize(("limits", "code"), [({"max_queue": 1}, "queue_full"), ({"max_open": 2}, "too_many_requests")])
def test_time_and_places_are_limited(settings, limits, code):
    async def ask(client):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)
        first = asyncio.create_task(chat(client, "wait"))  # is with the worker
        await asyncio.sleep(0.1)
        many = await asyncio.gather(*(chat(client, "wait") for _ in range(3)))
        return await first, many

    late, many = with_api(settings(timeout=0.6, max_batch=1, **limits), ask)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    assert [one.json()["error"]["code"] for one in many] == ["timeout", code, code]
    assert [(one.status_code, one.headers["retry-after"]) for one in many[1:]] == [(429, "1")] * 2


def test_a_key_is_needed_where_there_is_one(settings):
    async def ask(client):
        found = []
        for given in (
            None,
            "Bearer",
            "Bearer x",
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            "Bearer \xe4".encode("latin-1"),
            f"Bearer {KEY}",
            f"bearer  {KEY}",
        ):
            found.append((await client.get("/v1/models", headers={"Authorization": given} if given else {})).status_code)
        probes = [(await client.get(path)).status_code for path in ("/health", "/metrics")]
        return found, probes, await client.get("/v1/models")

    found, probes, refused = with_api(settings(keys=("another-key-of-25-letters", KEY), host="0.0.0.0"), ask)
    assert found == [401] * 6 + [200] * 2
    assert probes == [200, 401]
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"


def test_keys_are_compared_in_constant_time(settings, monkeypatch):
    import hmac

    compared, original = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or original(a, b))
    keys = (KEY, "another-key-of-25-letters")

    async def ask(client):
        return await client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})

    assert with_api(settings(keys=keys), ask).status_code == 200
    assert compared == [key.encode() for key in keys]  # all of them, also after one that fits


def test_a_page_of_another_site_gets_nothing(settings):
    async def ask(client):
        rebound = await client.get("/v1/models", headers={"Host": "evil.example"})
        preflight = await client.options(
            "/v1/chat/completions", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        )
        simple = await client.post("/v1/chat/completions", content=json.dumps(body("hi")), headers={"Content-Type": "text/plain"})
        local = [await client.get("/health", headers={"Host": host}) for host in ("localhost:8000", "[::1]:8000", "127.0.0.1")]
        return rebound, preflight, simple, local

    rebound, preflight, simple, local = with_api(settings(), ask)
    assert [one.status_code for one in (rebound, preflight, simple)] == [421, 405, 415]
    assert [one.status_code for one in local] == [200] * 3
    for one in (rebound, preflight, simple, *local):
        assert not any(name.startswith("access-control") for name in one.headers)


def test_only_this_machine_may_ask_without_a_key(settings, tmp_path):
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        settings(host=host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(UserError, match="without a key only this machine"):
            settings(host=host)
        settings(host=host, keys=(KEY,))
    file = tmp_path / "keys"
    for text, words in (
        ("", "no key in it"),
        ("# only this\n", "no key in it"),
        ("short\n", "key 1 must have 16"),
        ("a b" * 9, "without spaces"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_keys(file)
        assert "short" not in str(caught.value)
    file.write_text(f"# clients\n{KEY}\n\n{KEY}2\n")
    assert read_keys(file) == (KEY, KEY + "2")
    assert KEY not in repr(settings(keys=(KEY,)))
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "absent")


def test_hosts_are_read(settings):
    assert read_places(["Pacs.example.org, 10.0.0.5:8443", "[fd00::1]:80", "::1"]) == (
        ("pacs.example.org", None), ("10.0.0.5", 8443), ("fd00::1", 80), ("::1", None),
    )  # fmt: skip
    for wrong in ("http://x", "*.example.org", "a:b", "a:0", "user@host"):
        with pytest.raises(UserError, match="write a host"):
            read_places([wrong])


ONE = [{"role": "user", "content": "x"}]
WRONG = [
    (b"", 400, "not valid JSON"),
    (b"[]", 400, "must be a JSON object"),
    (b"{" * 60_000, 400, "not valid JSON"),
    (b'{"messages":' + b"[" * 60_000, 400, "not valid JSON"),
    (b'{"messages": NaN}', 400, "not valid JSON"),
    (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON"),
    (b'{"messages": "\xff"}', 400, "not valid UTF-8"),
    ({"messages": []}, 400, "messages: List should have at least 1"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "not valid UTF-8"),
    ({"\ud800": 1, "messages": ONE}, 400, "unable to parse raw data as a unicode string"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last one must be of the role user"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages.0.content"),
    ({"messages": ONE, "n": 2}, 400, "n: Input should be 1"),
    ({"messages": ONE, "taks": "vqa"}, 400, "taks: Extra inputs"),
    ({"messages": ONE, "tools": []}, 400, "tools: Extra inputs"),
    ({"messages": ONE, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"messages": ONE, "max_tokens": 10**6}, 400, "max_tokens is 1000000, at most 512"),
    ({"messages": ONE, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": ONE, "window": [5, 5]}, 400, "the first number must be below"),
    ({"messages": ONE, "task": "speech"}, 400, "task 'speech': no such task; valid are vqa"),
    ({"messages": [{"role": "user", "content": "[refr] liver"}]}, 400, "task 'refr': no such task"),
    ({"messages": [{"role": "user", "content": "[refer] liver"}], "task": "vqa"}, 400, "the field says vqa"),
    ({"messages": [{"role": "user", "content": "x" * 20_001}]}, 400, "at most 20000"),
    ({"messages": ONE, "model": "gpt"}, 404, "this server has 'fake' only"),
    (body("x", "data:image/png,abc"), 400, "write it as data:image/png;base64"),
    (body("x", "data:text/html;base64,QUJD"), 400, "its media type must be"),
    (body("x", "data:image/png;base64,@@@"), 400, "not valid base64"),
    (body("x", "data:image/png;base64,"), 400, "it is empty"),
    (body("x", url(bytes(3000))), 413, "more than 2000 bytes"),
    (b'{"messages": "' + b"x" * 70_000 + b'"}', 413, "the body has more than"),
]


def test_a_wrong_body_says_what_is_wrong(settings):
    async def ask(client):
        while (await client.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)
        bodies = [change if isinstance(change, bytes) else json.dumps(change).encode() for change, _, _ in WRONG]
        given = {"Content-Type": "application/json"}
        return [await client.post("/v1/chat/completions", content=data, headers=given) for data in bodies]

    log = io.StringIO()
    for (change, status, words), found in zip(WRONG, with_api(settings(max_bytes=2000), ask, log), strict=True):
        assert found.status_code == status, str(change)[:100]
        assert words in found.json()["error"]["message"]
        assert len(found.content) < 1500
    assert log.getvalue().count("\n") == 1 + len(WRONG)
    assert '"error"' not in log.getvalue()


def test_what_is_asked_is_read_as_meant():
    from unimed.serve.chat import read

    limits = Settings(model=Path())

    def read_of(messages, **fields):
        return read(json.dumps({"messages": messages, **fields}).encode(), limits)

    image = {"type": "image_url", "image_url": {"url": url(png())}}
    user = lambda *parts: {"role": "user", "content": list(parts)}  # noqa: E731
    text = lambda text: {"type": "text", "text": text}  # noqa: E731
    for question, fields, task, words in (
        ("[refer] liver", {}, "refer", "liver"),
        (" [refer]  liver", {"task": "refer"}, "refer", "liver"),
        ("liver", {"task": "refer"}, "refer", "liver"),
        ("is [this] it?", {}, "vqa", "is [this] it?"),
        ("[3] is it?", {}, "vqa", "[3] is it?"),
        ("[note] is it?", {"task": "vqa"}, "vqa", "[note] is it?"),
    ):
        ask = read_of([user(text(question), image)], **fields)
        assert (ask.fields["task"], ask.fields["question"], ask.notes) == (task, words, ())
    assert read_of([user(text("where?"))]).fields["task"] == "qa"
    assert read_of([{"role": "user", "content": "where?"}]).url is None
    dialogue = [
        {"role": "system", "content": "be kind"},
        user(text("what?"), image),
        {"role": "assistant", "content": "a"},
        user(text("and?")),
    ]
    ask = read_of(dialogue)
    assert (ask.fields["task"], ask.fields["question"], ask.url) == ("vqa", "and?", image["image_url"]["url"])
    assert ask.notes == ("system message not used", "earlier messages not used: the model takes one question")
    assert read_of([*dialogue[:3], user(text("[qa] and?"))]).url is None
    ask = read_of([user(text("a"), image)], max_completion_tokens=7, temperature=0.5, window=[0, 5], slice=3, plane="coronal", stream=True)
    expected = {"question": "a", "task": "vqa", "plane": "coronal", "slice": 3, "window": (0, 5), "max_new_tokens": 7}
    assert (ask.fields, ask.stream) == (expected, True)
    with pytest.raises(Refused, match="2 images in one message"):
        read_of([user(text("a"), image, image)])


def test_nothing_heavy_is_imported_early():
    code = (
        "import sys, unimed.cli.app; heavy = {'torch', 'fastapi', 'uvicorn', 'starlette', 'prometheus_client', 'openai', 'pydantic'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import unimed.serve.run; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    from unimed.cli import app as cli
    from unimed.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else object())
    shown = CliRunner().invoke(cli.app, ["serve"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 2
    assert "fastapi not installed: pip install 'cmoe-kernels[unimed,serve]'" in shown.output
    assert shown.output.count("\n") == 1


class _Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        sizes = {"/image": 900, "/large": 3000, "/empty": 0}
        self.send_response(302 if self.path == "/moved" else 200 if self.path in sizes else 404)
        if self.path == "/moved":
            self.send_header("Location", "/image")
        self.end_headers()
        self.wfile.write(bytes(sizes.get(self.path, 0)))

    def log_message(self, *args):
        pass


def test_images_come_from_named_hosts_only(settings):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Host) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        place = f"http://127.0.0.1:{port}"
        trusting = settings(max_bytes=2000, image_hosts=(Place("127.0.0.1", port), Place("localhost", port), Place("example.org", None)))
        assert images.fetch(f"{place}/image", trusting) == bytes(900)
        for url, words in (
            (f"{place}/moved", "a redirect, which is not followed"),
            (f"{place}/absent", "status 404"),
            (f"{place}/empty", "it is empty"),
            (f"{place}/large", "more than 2000 bytes"),
            (f"http://localhost:{port}/image", "not public"),
            ("http://127.0.0.1:1/image", "not told to trust"),
            (f"http://127.1:{port}/image", "not told to trust"),
            (f"http://2130706433:{port}/image", "not told to trust"),
            (f"http://0x7f.1:{port}/image", "not told to trust"),
            (f"http://[::ffff:127.0.0.1]:{port}/image", "not told to trust"),
            (f"http://127.0.0.1:{port}@evil.example/image", "user or password"),
            (f"http://evil.example#@127.0.0.1:{port}/image", "not told to trust"),
            ("http://169.254.169.254/latest/meta-data", "not told to trust"),
            ("file:///etc/passwd", "only data:, http: and https:"),
            ("FILE:///etc/passwd", "only data:, http: and https:"),
            ("ftp://127.0.0.1/x", "only data:, http: and https:"),
            ("/etc/passwd", "only data:, http: and https:"),
            ("http://", "only data:, http: and https:"),
            ("http://[", "not a URL"),
            ("http://127.0.0.1:99999/", "not a URL"),
            (f"{place}/a b", "only data:"),
            (f"{place}/a\r\nX: y", "only data:"),
        ):
            with pytest.raises(Refused, match=words):
                images.fetch(url, trusting)
            with pytest.raises(Refused) as caught:
                images.fetch(url, settings())
            assert 400 <= caught.value.status < 500
        server.shutdown()


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "127.0.0.1", "0.0.0.0", "100.64.0.1", "::1", "fd00::1", "fe80::1%eth0",
     "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "224.0.0.1"],
)  # fmt: skip
def test_a_name_that_leads_inside_is_refused(settings, monkeypatch, address):
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 80)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("it was connected to"))
    with pytest.raises(Refused, match="not public"):
        images.fetch("http://example.org/x", settings(image_hosts=(Place("example.org", None),)))


def test_an_address_that_was_checked_is_the_one_that_is_used(settings, monkeypatch):
    connected = []

    def connect(address, timeout):
        connected.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(Refused, match="did not send it"):
        images.fetch("https://example.org/x", settings(image_hosts=(Place("example.org", None),)), lambda host, port: ["93.184.216.34"])
    assert connected == [("93.184.216.34", 443)]


def test_connections_do_not_wait_for_ever(settings, tmp_path):
    """A head that does not come, a body that does not come, a reader that does not read: each ends after body_timeout."""
    from unimed.serve import run as serving

    at = queue.SimpleQueue()
    limits = settings(port=0, body_timeout=0.5, timeout=1)
    server = threading.Thread(target=serving.run, args=(limits, lambda port, about: at.put(port), Telemetry(io.StringIO())), daemon=True)
    server.start()
    port = at.get(timeout=60)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    for sent, status in ((b"", b""), (head[:30], b""), (head, b"408"), (head + b"{", b"408"), (head + b"{}{}{}{}{", b"400")):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
            one.sendall(sent)
            assert one.recv(1000)[9:12] == status
