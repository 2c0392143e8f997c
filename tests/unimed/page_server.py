"""The page on a free port of loopback, for tests."""

import threading
from contextlib import contextmanager

import pytest


@contextmanager
def served(desk):
    """The page on a free port of loopback, in a thread; its address and its upload folder."""
    pytest.importorskip("gradio", reason="the extra page is not installed")
    import uvicorn

    from unimed.serve import local

    with local.listen("127.0.0.1", 0) as place, local.upload_folder() as folder:
        server = uvicorn.Server(uvicorn.Config(local.application(desk), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}", folder
        finally:
            server.should_exit = True
            thread.join(10)
