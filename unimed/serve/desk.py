"""What one visitor of the page does: open a file, look at its slices, ask, and keep the answers. Without the browser's part."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unimed.errors import UserError
from unimed.inference.follow import Generated
from unimed.inference.gates import gate_map, token_gates
from unimed.inference.request import Answer, Asked, Request, check, prepare
from unimed.inference.rows import Row, as_line
from unimed.inference.session import Session
from unimed.records.pixels import Opened, View, open_view
from unimed.records.views import Views, views
from unimed.tasks import TASKS


@dataclass(frozen=True)
class File:
    """An open file: its name for people, its planes, slices and grey values."""

    path: Path
    name: str
    views: Views

    @property
    def view(self) -> View:
        """As it is shown at first."""
        return View(self.path, next(iter(self.views.counts)))


@dataclass(frozen=True)
class Told:
    """A whole answer. line: as it is kept and exported. maps: gates by patch [rows, columns, experts], None without an image or a grid."""

    asked: Asked
    answer: Answer
    line: dict[str, Any]
    maps: np.ndarray | None


class Desk:
    """The model and the files that visitors open. Files are read one at a time, since the volume read last is kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.model = Path(session.name).name  # not where it lies
        self._reading = threading.Lock()

    def open(self, path: Path, name: str) -> File:
        with self._reading:
            return File(path, name, _named(path, name, views, path))

    def look(self, file: File, view: View) -> Opened:
        if not file.path.exists():
            raise UserError(f"{file.name}: the upload is no longer there; upload it again")
        count = file.views.counts.get(view.plane)
        if count == 1:
            view = replace(view, index=None)
        with self._reading:
            return _named(file.path, file.name, open_view, view)

    def ask(self, file: File | None, view: View | None, task: str, question: str) -> Iterator[str | Told]:
        """The answer in pieces, then all of it."""
        if task in TASKS and not TASKS[task].needs_image:
            file = view = None
        if file is None and task in TASKS and TASKS[task].needs_image:
            raise UserError(f"task {task}: it needs an image; upload one, or take an example")
        request = Request(file.path if file else None, question or "", task)
        if view is not None:
            request = replace(request, plane=view.plane, slice=view.index, window=view.grey)
        check(request)  # before a large file is read
        opened = self.look(file, view) if file and view else None
        asked = prepare(replace(request, image=opened), self.session.class_questions)
        made: list[Generated] = []
        with token_gates(self.session.connector) as seen:
            yield from self.session.stream(replace(request, image=opened), made.append)
        answer = self.session.read(asked, *made[0][:3])
        line = as_line(Row("", file.name if file else "", request), answer, self.model)
        shown = {"plane": request.plane, "slice": request.slice, "window": request.window} if file else {}
        yield Told(asked, answer, line | shown, gate_map(self._connector, seen[0][0]) if seen else None)

    @property
    def _connector(self) -> Any:
        from cmoe_kernels import CMoEConfig

        return CMoEConfig.from_dict(self.session.model.config.connector)


def _named(path: Path, name: str, read: Any, *arguments: Any) -> Any:
    """Errors name the file as the visitor knows it, not where it lies."""
    try:
        return read(*arguments)
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from error
    except (OSError, MemoryError) as error:
        raise UserError(f"{name}: not readable ({type(error).__name__})") from error
