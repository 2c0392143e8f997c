"""`unimed page`; `app.py` registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from unimed.cli.predict import Model
from unimed.cli.shared import Device, Verify, console, errors, model_folder
from unimed.errors import UserError
from unimed.notice import NOTICE, install

INSTALL = install("page")

HOST = "address to listen on; another than loopback shows the page to the network, without a password"


def page(
    model: Model = None,
    host: Annotated[str, typer.Option(help=HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: a free one", min=0, max=65535)] = 7860,
    device: Device = "auto",
    verify: Verify = False,
) -> None:
    """Ask a model in the browser: upload an image, see the answer, its box and the gates.

    Example: [cyan]unimed page --model demo[/]
    """
    folder = model_folder(model)
    try:
        from unimed.serve import local
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("unimed", "cmoe_kernels"):
            raise
        raise UserError(f"the package {error.name} is not installed; get all that the page needs with: {INSTALL}") from error
    from unimed.inference.session import load
    from unimed.serve.desk import Desk

    if not local.is_loopback(host):
        errors.print(f"warning: {host} is not loopback: whoever reaches this machine can use the page", style="yellow", soft_wrap=True)
    with local.listen(host, port) as place:  # before the model is loaded, which can take long
        desk = Desk(load(folder, device=device, verify=verify))
        address = f"http://{f'[{host}]' if ':' in host else host}:{place.getsockname()[1]}"
        console.print(f"{address} · model {folder} · Ctrl-C stops it · {NOTICE}", highlight=False, soft_wrap=True)
        local.serve(desk, host, place)


COMMANDS: dict[str, Callable[..., None]] = {"page": page}
