"""The page: a picture, a question, the answer as it is made, its box and its gates. `Desk` does what it shows, `local` serves it.

An upload is removed when another file takes its place, and when its page is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from jinja2 import Environment, PackageLoader, StrictUndefined

from unimed.errors import UserError
from unimed.inference.gates import heat
from unimed.inference.request import remark
from unimed.notice import NOTICE
from unimed.records.pixels import Opened, View
from unimed.report.gallery import data_uri
from unimed.sample.slices import ASSETS
from unimed.serve.desk import Desk, File, Told
from unimed.tasks import TASKS

LONGEST = 1024  # pixels of the picture that the browser gets
MODEL = "model"  # questions wait for one another
OFF = "off"
HEAT = (0, 200, 255)

SAVE = """(session) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(session, null, 1)], {type: "application/json"}));
  link.download = "unimed-answers.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


class Sample(NamedTuple):
    """A question about the built-in sample: its label, file, slice, task and text."""

    label: str
    file: str
    slice: int
    task: str
    question: str


SAMPLES = (
    Sample("CT: where is the liver?", "ct.nii.gz", 15, "refer", "liver"),
    Sample("MR: which plane is this?", "mr.nii.gz", 10, "vqa", "Which plane is this image?"),
    Sample("CT: what is in the box?", "ct.nii.gz", 15, "identify", "30,30,62,88"),
    Sample("DICOM series: describe it", "ct_dicom.zip", 10, "caption", ""),
    Sample("Text: where is the spleen?", "", 0, "qa", "Which region does the spleen belong to?"),
)
_HINTS = {
    "text": ("Question", "Is the liver in the image?"),
    "answer": ("Name of the object", "liver"),
    "question": ("Box: x1,y1,x2,y2 in pixels of the file (in a volume: voxels)", "12,30,80,96"),
    "classes": ("List of classes, or a word of one that the model learned", "organ"),
}


@cache
def _pieces() -> Any:
    found = Environment(loader=PackageLoader("unimed.serve", package_path=""), autoescape=True, undefined=StrictUndefined)
    return found.get_template("page.html.j2").module


def piece(name: str, *arguments: Any) -> str:
    """One piece of the page as HTML, its text escaped."""
    return str(getattr(_pieces(), name)(*arguments))


def picture(opened: Opened | None, told: Told | None = None, expert: int | None = None) -> str:
    """The image with the box and one expert's gates of its answer."""
    if opened is None:
        return piece("nothing")
    says, box, layer = list(opened.notes) or ["the image as stored"], None, None
    if told is not None and told.answer.box is not None:
        box = opened.to_original.inverse(told.answer.box)
        says.append("box " + ", ".join(f"{value:.0f}" for value in told.answer.box) + " in pixels of the file")
    if told is not None and told.maps is not None and expert is not None:
        values = told.maps[..., expert]
        layer = data_uri(heat(values, (values.shape[1], values.shape[0]), HEAT), optimize=False)
        says.append(f"gate of expert {expert + 1}: {values.min():.2f} (clear) to {values.max():.2f} (strongest)")
    shown = {"size": opened.rgb.size, "uri": data_uri(opened.rgb, LONGEST, optimize=False), "box": box, "heat": layer}
    return piece("picture", {**shown, "says": " · ".join(says)})


def details(told: Told) -> str:
    """Everything beside the text of an answer."""
    answer = told.answer
    box = ", ".join(f"{value:.1f}" for value in answer.box) if answer.box else ""
    return piece("details", {"remark": remark(answer), "box": box, "confidence": answer.confidence, "gates": answer.gates})


class Page:
    """The components of one page, and what each event changes. A handler returns the changes by component."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.opened_by: dict[str, Path] = {}  # the upload of each visitor
        experts = desk.session.model.config.connector["num_experts"]
        with gr.Blocks(title=f"Uni-Med: {desk.model}", analytics_enabled=False, delete_cache=(3600, 86400)) as self.blocks:
            self.file, self.view, self.told, self.lines = gr.State(), gr.State(), gr.State(), gr.State([])
            gr.HTML(piece("head", desk.model, NOTICE), elem_id="head")
            self.message = gr.HTML(piece("message", ""), elem_id="message")
            with gr.Row():
                with gr.Column(scale=6, min_width=280):
                    self.upload = gr.File(label="Image file", height=150, elem_id="upload")
                    self.picture = gr.HTML(picture(None), elem_id="picture")
                    choices = [("off", OFF), *((f"expert {number + 1}", str(number)) for number in range(experts))]
                    about = "where in the picture the router gives this expert weight"
                    self.expert = gr.Radio(
                        choices, value=OFF, label="Gate map over the picture", info=about, visible=False, elem_id="expert"
                    )
                    self.plane = gr.Radio(["axial"], value="axial", label="Plane", visible=False, elem_id="plane")
                    self.slice = gr.Slider(0, 1, 0, step=1, label="Slice", visible=False, elem_id="slice")
                    self.auto = gr.Checkbox(True, label="Grey window as the file says", visible=False, elem_id="auto")
                    with gr.Row():
                        self.low = gr.Slider(0, 1, 0, label="Black at", visible=False, elem_id="low")
                        self.high = gr.Slider(0, 1, 1, label="White at", visible=False, elem_id="high")
                with gr.Column(scale=5, min_width=280):
                    choices = [(f"{tag}: {TASKS[tag].about}", tag) for tag in desk.session.tasks]
                    self.task = gr.Radio(choices, value=desk.session.tasks[0], label="Task", elem_id="task")
                    self.question = gr.Textbox(**self._hint(desk.session.tasks[0]), max_length=2000, elem_id="question")
                    with gr.Row():
                        self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
                        self.stop = gr.Button("Stop", elem_id="stop")
                    self.answer = gr.HTML(piece("answer", "", False), elem_id="answer")
                    self.details = gr.HTML("", elem_id="details")
            gr.HTML(piece("heading", "Examples from the built-in sample"))
            with gr.Row():
                samples = [(gr.Button(one.label, size="sm", elem_id=f"sample-{n}"), one) for n, one in enumerate(self._samples())]
            gr.HTML(piece("heading", "Answers of this session"))
            self.history = gr.HTML(piece("history", []), elem_id="history")
            with gr.Row():
                save = gr.Button("Save as JSON", size="sm", scale=0, min_width=160, elem_id="save")
            with gr.Accordion("The same as JSON", open=False, elem_id="json"):
                self.session = gr.JSON(self._export([]), show_label=False, elem_id="session")
            self._wire(samples, save)

    def _samples(self) -> list[Sample]:
        return [one for one in SAMPLES if one.task in self.desk.session.tasks]

    def _hint(self, task: str) -> dict[str, Any]:
        asks, box = TASKS[task].asks, TASKS[task].box
        label, example = _HINTS[box or asks] if asks != "nothing" else ("", "")
        return {"label": label, "placeholder": f"for example: {example}", "visible": asks != "nothing"}

    def _wire(self, samples: list[tuple[Any, Sample]], save: Any) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        quiet: dict[str, Any] = {**private, "show_progress": "hidden", "trigger_mode": "always_last"}
        shown = [
            self.file, self.view, self.told, self.message, self.picture, self.expert, self.plane, self.slice, self.auto, self.low,
            self.high, self.answer, self.details,
        ]  # fmt: skip
        look: set[Any] = {self.file, self.plane, self.slice, self.auto, self.low, self.high}
        asked = [self.told, self.message, self.picture, self.expert, self.answer, self.details, self.lines, self.history, self.session]
        given: set[Any] = {self.file, self.view, self.task, self.question, self.lines, self.expert}

        self.upload.upload(self.on_upload, self.upload, shown, **private)
        self.upload.clear(self.on_clear, None, shown, **private)
        self.plane.input(self.on_plane, look, shown, **quiet)
        for control in (self.slice, self.auto, self.low, self.high):
            control.input(self.on_look, look, shown, **quiet)
        self.expert.input(self.on_expert, {self.told, self.expert}, [self.picture], **quiet)
        self.task.change(lambda task: gr.update(**self._hint(task)), self.task, self.question, **quiet)
        running = [
            gr.on([self.ask.click, self.question.submit], self.on_ask, given, asked, show_progress="hidden", concurrency_id=MODEL,
                       concurrency_limit=1, trigger_mode="once", **private)
        ]  # fmt: skip
        for button, sample in samples:
            fill = button.click(self._fill(sample), None, [self.task, self.question, self.upload, *shown], **private)
            running.append(fill.success(self.on_ask, given, asked, show_progress="hidden", concurrency_id=MODEL, **private))
        self.stop.click(self.on_stop, None, [self.answer], cancels=running, **private)
        save.click(None, self.session, None, js=SAVE, **private)
        self.blocks.unload(self.on_leave)

    # Files

    def on_upload(self, path: str | None, request: gr.Request) -> dict[Any, Any]:
        self._forget(request.session_hash)
        if path is None:
            return self._close("")
        self.opened_by[request.session_hash or ""] = Path(path)
        return self._open(Path(path), Path(path).name)

    def on_clear(self, request: gr.Request) -> dict[Any, Any]:
        self._forget(request.session_hash)
        return self._close("")

    def on_leave(self, request: gr.Request) -> None:
        self._forget(request.session_hash)

    def _forget(self, visitor: str | None) -> None:
        path = self.opened_by.pop(visitor or "", None)
        if path is not None:
            path.unlink(missing_ok=True)

    def _open(self, path: Path, name: str, at: int | None = None) -> dict[Any, Any]:
        try:
            file = self.desk.open(path, name)
            view = replace(file.view, index=at)
            opened = self.desk.look(file, view)
        except UserError as error:
            return self._close(str(error))
        update, counts = gr.update, file.views.counts
        low, high = file.views.values or (0.0, 1.0)
        black, white = file.views.window or (low, high)
        span: dict[str, Any] = {
            "minimum": low,
            "maximum": high,
            "step": 1 if high - low > 20 else (high - low) / 100 or 1,
            "visible": False,
        }
        return {
            **self._shows(file, view, opened),
            self.plane: update(choices=list(counts), value=view.plane, visible=len(counts) > 1),
            self.slice: self._slices(file, view),
            self.auto: update(value=True, visible=file.views.values is not None),
            self.low: update(value=max(black, low), **span),
            self.high: update(value=min(white, high), **span),
        }

    def _slices(self, file: File, view: View) -> Any:
        count = file.views.counts[view.plane]
        return gr.update(maximum=max(count - 1, 1), value=count // 2 if view.index is None else view.index, visible=count > 1)

    def _shows(self, file: File, view: View, opened: Opened) -> dict[Any, Any]:
        """A picture without an answer."""
        return {
            self.file: file,
            self.view: view,
            self.told: None,
            self.message: piece("message", ""),
            self.picture: picture(opened),
            self.expert: gr.update(value=OFF, visible=False),
            **self._unanswered(),
        }

    def _unanswered(self) -> dict[Any, Any]:
        """An answer goes with the picture that it is about; it stays among those of the session."""
        return {self.answer: piece("answer", "", False), self.details: ""}

    def _close(self, message: str) -> dict[Any, Any]:
        hidden = (self.expert, self.plane, self.slice, self.auto, self.low, self.high)
        shown = {self.message: piece("message", message), self.picture: picture(None)}
        shown |= self._unanswered()
        return {self.file: None, self.view: None, self.told: None, **shown, **{one: gr.update(visible=False) for one in hidden}}

    def on_plane(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """Another plane begins at its middle slice."""
        changed = self.on_look({**values, self.slice: None})
        if self.view in changed:
            changed[self.slice] = self._slices(values[self.file], changed[self.view])
        return changed

    def on_look(self, values: dict[Any, Any]) -> dict[Any, Any]:
        file, auto, low, high = (values[one] for one in (self.file, self.auto, self.low, self.high))
        if file is None:
            return {self.message: piece("message", "")}
        sliders = {one: gr.update(visible=not auto) for one in (self.low, self.high)} if file.views.values else {}
        try:
            if not auto and not low < high:
                raise UserError(f"window: black at {low:g} must be below white at {high:g}")
            at = values[self.slice] if file.views.counts.get(values[self.plane]) != 1 else None
            view = View(file.path, values[self.plane], at, None if auto else (low, high))
            return {**self._shows(file, view, self.desk.look(file, view)), **sliders}
        except UserError as error:
            return {self.message: piece("message", str(error)), **sliders}

    def _fill(self, sample: Sample) -> Callable[..., dict[Any, Any]]:
        def fill(request: gr.Request) -> dict[Any, Any]:
            self._forget(request.session_hash)
            opened = self._open(ASSETS / sample.file, sample.file, sample.slice) if sample.file else self._close("")
            words = gr.update(value=sample.question, **self._hint(sample.task))
            return {self.task: sample.task, self.question: words, self.upload: None, **opened}

        return fill

    # Questions

    def on_ask(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        text, lines = "", values[self.lines]
        try:
            yield {self.message: piece("message", ""), self.answer: piece("answer", "", True), self.details: ""}
            for part in self.desk.ask(values[self.file], values[self.view], values[self.task], values[self.question]):
                if isinstance(part, str):
                    text += part
                    yield {self.answer: piece("answer", text, True)}
                    continue
                lines = [*lines, {**part.line, "id": str(len(lines) + 1)}]
                opened, expert = part.asked.opened, values[self.expert] if part.maps is not None else OFF
                yield {
                    self.told: part,
                    self.answer: piece("answer", part.answer.text or "(an empty answer)", False),
                    self.details: details(part),
                    self.picture: self._pictured(part, expert) if opened else gr.skip(),
                    self.expert: gr.update(value=expert, visible=part.maps is not None),
                    self.lines: lines,
                    self.history: piece("history", lines[::-1]),
                    self.session: self._export(lines),
                }
        except UserError as error:
            yield {self.message: piece("message", str(error)), self.answer: piece("answer", text, False)}

    def on_stop(self) -> str:
        return piece("answer", "(stopped)", False)

    def on_expert(self, values: dict[Any, Any]) -> dict[Any, Any]:
        told = values[self.told]
        return {self.picture: self._pictured(told, values[self.expert]) if told and told.asked.opened else gr.skip()}

    @staticmethod
    def _pictured(told: Told, expert: str) -> str:
        return picture(told.asked.opened, told, None if expert == OFF else int(expert))

    def _export(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        return {"notice": NOTICE, "model": self.desk.model, "answers": lines}
