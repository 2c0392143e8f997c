"""Volumes, images and the on-disk layouts of data sets.

`load_examples` reads them all; `build_sample` writes them from the vendored volumes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimed.data.example import Example
    from unimed.data.images import load_image, open_image, read_image_file
    from unimed.data.load import load_examples
    from unimed.data.policy import Rules
    from unimed.data.sample import build_sample

__all__ = ["Example", "Rules", "build_sample", "load_examples", "load_image", "open_image", "read_image_file"]

_HOMES = {
    "example": ("Example",),
    "images": ("load_image", "open_image", "read_image_file"),
    "load": ("load_examples",),
    "policy": ("Rules",),
    "sample": ("build_sample",),
}


def __getattr__(name: str) -> Any:
    """Imported on first use: the readers of records import modules of this package and are imported by `load`."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"unimed.data.{home}"), name)
    raise AttributeError(f"module 'unimed.data' has no attribute {name!r}")
