"""Volumes, boxes and the on-disk layouts of the released datasets.

`load_examples` reads them all; `build_sample` writes them from the vendored volumes.
"""

from unimed.data.example import IMAGE_TASKS, TASKS, Example
from unimed.data.images import load_image, open_image, read_image_file
from unimed.data.load import load_examples
from unimed.data.policy import Rules
from unimed.data.sample import build_sample

__all__ = ["IMAGE_TASKS", "TASKS", "Example", "Rules", "build_sample", "load_examples", "load_image", "open_image", "read_image_file"]
