"""Uni-Med on fused kernels: data, model, training, evaluation and analysis. Research use, not for diagnosis."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimed.records.box import Box
    from unimed.records.record import Record
    from unimed.tasks import TASKS

__all__ = ["INSTALL", "NOTICE", "TASKS", "Box", "Record"]

NOTICE = "Research use, not for diagnosis"
INSTALL = 'pip install "cmoe-kernels[unimed]"'


def __getattr__(name: str) -> Any:
    """Imported on first use, so that the command line starts quickly."""
    if name == "Record":
        from unimed.records.record import Record

        return Record
    if name == "Box":
        from unimed.records.box import Box

        return Box
    if name == "TASKS":
        from unimed.tasks import TASKS

        return TASKS
    raise AttributeError(f"module 'unimed' has no attribute {name!r}")
