"""`unimed merge`: an adapter folder as a plain model."""

from pathlib import Path

from unimed import io
from unimed.errors import UserError
from unimed.models.adapter import WEIGHTS, merge
from unimed.models.load import load


def merge_folder(adapter: Path, out: Path) -> None:
    """The plain model of an adapter folder, written to a new folder `out`."""
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: no {WEIGHTS} there, so there is no LoRA to merge")
    if out.exists():
        raise UserError(f"{out}: exists; choose a new folder")
    model, processor = load(adapter, quantize=False)  # LoRA is worked into whole weights
    whole = merge(model)

    def fill(folder: Path) -> None:
        whole.save_pretrained(folder)
        processor.save_pretrained(folder)

    io.write_folder(out, fill)
