"""`unimed serve`; `app.py` registers it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from unimed.cli.shared import Device, Verify, errors, model_folder
from unimed.errors import UserError
from unimed.notice import NOTICE

EXTRA = "pip install 'cmoe-kernels[unimed,serve]'"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str | None, typer.Option(help="a run or a saved model; by default the newest run")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; without a key only one of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
    api_key_file: Annotated[Path | None, typer.Option(help="file with the keys that clients must send, one a line")] = None,
    max_batch: Annotated[int, typer.Option(help="questions that the model answers together")] = 16,
    max_queue: Annotated[int, typer.Option(help="questions that may wait; more get status 429")] = 64,
    max_mib: Annotated[int, typer.Option(min=1, help="MiB of one image file")] = 32,
    max_pixels: Annotated[int, typer.Option(help="pixels of one image or frame")] = 64_000_000,
    max_tokens: Annotated[int, typer.Option(help="tokens of one answer")] = 512,
    timeout: Annotated[float, typer.Option(help="seconds until an answer must be whole")] = 120,
    allow_image_hosts: Annotated[list[str] | None, typer.Option(help="hosts that images may be fetched from")] = None,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Answer over HTTP as OpenAI's chat completions do: one question about one image, many clients at once.

    Examples:

      [cyan]unimed serve --model tiny[/]                                  then, in another terminal:

      [cyan]curl http://127.0.0.1:8000/v1/models[/]

      [cyan]unimed serve --host 0.0.0.0 --api-key-file keys.txt[/]        clients send Authorization: Bearer KEY

      [cyan]unimed serve --allow-image-hosts pacs.example.org[/]          images by URL from that host

    The task is a leading tag of the question ("\\[refer] liver") or the field task. Images are data: URLs: PNG, JPEG, TIFF, DICOM, NIfTI.
    Logs are JSON lines without anything that was asked. SIGTERM and Ctrl-C end it once every accepted question is answered.
    More: docs/unimed/serve.md.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"unimed serve: {', '.join(missing)} not installed: {EXTRA}")
    from unimed.serve.run import run
    from unimed.serve.settings import MIB, Settings, read_keys, read_places

    size = max_mib * MIB
    settings = Settings(
        model=model_folder(model), host=host, port=port, keys=read_keys(api_key_file), max_batch=max_batch, max_queue=max_queue,
        max_open=2 * (max_batch + max_queue), max_bytes=size, max_held=max(1024 * MIB, 2 * size), max_pixels=max_pixels,
        unpacked=16 * size, max_tokens=max_tokens, timeout=timeout, stall=max(60.0, timeout),
        image_hosts=read_places(allow_image_hosts or []), device=device, verify=verify,
    )  # fmt: skip

    def ready(port: int, about: dict[str, Any]) -> None:
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        errors.print(f"{about['name']} answers at {where} on {about['device']} · {NOTICE}", highlight=False, soft_wrap=True)

    errors.print(f"loading {settings.model} ...", highlight=False, soft_wrap=True)
    run(settings, ready)


COMMANDS: dict[str, Callable[..., None]] = {"serve": serve}
