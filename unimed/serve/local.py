"""The page's server: one process that talks to its own host only, and the folder of its uploads."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware

from unimed.errors import UserError
from unimed.serve.desk import Desk
from unimed.serve.page import Page

MOST = "2gb"  # of one upload
# The browser holds the page to this; gradio's own script is inline and makes functions of text.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
# gradio's upload button has a name for screen readers that leaves out its visible words. Each of its radio buttons is a group of its own,
# in which the arrow keys do nothing.
NAMES = """() => {
  const mend = () => {
    for (const one of document.querySelectorAll("#upload button.upload-container[aria-label]")) one.removeAttribute("aria-label");
    for (const one of document.querySelectorAll("fieldset[id] input[type=radio]")) one.name = one.closest("fieldset").id;
  };
  mend();
  new MutationObserver(mend).observe(document.body, {childList: true, subtree: true});
}"""


class _Headers:
    """Adds to every response what the browser may do with it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["Referrer-Policy"] = "no-referrer"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self.app(scope, receive, answer)


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder of this process for the uploads of gradio, which looks for its name in the environment. It is removed with all in it."""
    names = {"GRADIO_TEMP_DIR": tempfile.mkdtemp(prefix="unimed-page-"), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield Path(names["GRADIO_TEMP_DIR"])
    finally:
        shutil.rmtree(names["GRADIO_TEMP_DIR"], ignore_errors=True)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def application(desk: Desk, host: str = "127.0.0.1") -> FastAPI:
    """The page as an ASGI application. On loopback it answers to names of loopback only, so that no other site's name can lead to it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Headers)
    if is_loopback(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    blocks = Page(desk).blocks
    # gradio looks for work 1,000 times a second, which takes 7 % of a core; 20 times are enough for a page.
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = 0.05, 0.1
    return gr.mount_gradio_app(
        app, blocks, "/", server_name=host, footer_links=[], run_history=False, max_file_size=MOST, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, theme=_theme(), css_paths=[Path(__file__).with_name("page.css")], js=NAMES,
    )  # fmt: skip


def _theme() -> gr.themes.Base:
    """Fonts of the system; text and controls with the contrast of WCAG's level AA, light and dark."""
    theme = gr.themes.Base(
        primary_hue="sky", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    strong = ("button_primary_background_fill", "slider_color", "checkbox_background_color_selected")
    quiet = ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
    colours = {
        **{name + form: "*primary_700" for name in strong for form in ("", "_dark")},
        **{"button_primary_background_fill_hover" + form: "*primary_800" for form in ("", "_dark")},
        **{"button_primary_text_color" + form: "white" for form in ("", "_dark")},
        **dict.fromkeys(quiet, "*neutral_600"),
        **{f"{name}_dark": "*neutral_300" for name in quiet},
        "block_label_text_color": "*neutral_700",
        "color_accent": "*primary_700",
    }
    return theme.set(**colours)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, or one line that says why there is none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise UserError(f"{host}:{port}: cannot listen there ({why}); name another --port") from error


def serve(desk: Desk, host: str, place: socket.socket) -> None:
    """Runs the page on a socket that listens, until Ctrl-C or SIGTERM."""
    # uvicorn raises the signal again once it has stopped: as an exception, so that the uploads go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with upload_folder():
        uvicorn.Server(uvicorn.Config(application(desk, host), log_level="warning", timeout_graceful_shutdown=3)).run(sockets=[place])
