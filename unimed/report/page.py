"""The page: report.html.j2 and its pieces, filled. Text is escaped; only `Markup` of our own plots passes as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "macro", "render"]


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("unimed.report", package_path=""), autoescape=True, undefined=StrictUndefined)


def render(**parts: Any) -> str:
    """The whole document; its policy forbids the browser any request."""
    return _environment().get_template("report.html.j2").render(**parts) + "\n"


def macro(name: str, *arguments: Any, **globals: Any) -> str:
    """One piece of the page."""
    return str(getattr(_environment().get_template("pieces.html.j2").make_module(globals), name)(*arguments))
