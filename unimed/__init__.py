"""Uni-Med on fused kernels: data, model, training, evaluation and analysis. Research use, not for diagnosis."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from unimed.notice import INSTALL, NOTICE

if TYPE_CHECKING:
    from unimed.datasets import DATASETS
    from unimed.inference.request import Answer, Request
    from unimed.inference.session import Session, load
    from unimed.records.box import Box
    from unimed.records.record import Record
    from unimed.tasks import TASKS

__all__ = ["DATASETS", "INSTALL", "NOTICE", "TASKS", "Answer", "Box", "Record", "Request", "Session", "load"]

_PLACES = {
    "Answer": "unimed.inference.request",
    "Box": "unimed.records.box",
    "DATASETS": "unimed.datasets",
    "Record": "unimed.records.record",
    "Request": "unimed.inference.request",
    "Session": "unimed.inference.session",
    "TASKS": "unimed.tasks",
    "load": "unimed.inference.session",
}


def __getattr__(name: str) -> Any:
    """Imported on first use, so that the command line starts quickly."""
    if name not in _PLACES:
        raise AttributeError(f"module 'unimed' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
