"""Rows of other projects to images and annotations, and records back to rows.

    llava      {"id", "image": "a.png" | ["a.png", ...], "conversations": [{"from": "human" | "gpt", "value": "<image>\\n..."}]}
    messages   {"messages": [{"role": "user" | "assistant", "content": "..." | [{"type": "image" | "text", ...}]}], "images": ["a.png"]}
    swift      the same, and "objects": {"ref": ["liver"], "bbox": [[x1, y1, x2, y2]], "bbox_type": "real" | "norm1", "image_id": [0]}

An image is a path, or an object with "path" and, of a volume or a multi-frame file, "plane", "slice", "window", "frame". Each turn of
a user with the assistant's becomes one question. `<image>` in a user's turn says which image is asked about from there on; it is not kept.
A turn with the slots `<ref-object>` and `<bbox>` is the wording of a box: the box is kept, the wording is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from unimed.records.files import short
from unimed.records.policy import BadRecord
from unimed.records.record import QA, Annotation, BoxOf, ImageRef, Record, Report, wrong

IMAGE, REF, BBOX = "<image>", "<ref-object>", "<bbox>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
DESCRIBE = "Describe the findings of this image."  # the question before a report, in formats that store reports as answers

Size = Callable[[ImageRef], tuple[int, int]]
Row = tuple[list[ImageRef], list[Annotation]]


class Turn(NamedTuple):
    """A question with its answer. image: the index of the image that it is about. place: of the question in the row."""

    question: str
    answer: str
    image: int
    place: str


def from_llava(row: Any, where: str, size: Size | None = None) -> Row:
    """Images and annotations of a row of LLaVA."""
    images = _images(row, "image", where)
    said = []
    for number, turn in enumerate(_list(row, "conversations", where)):
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise _no_row(f"{where}: conversations[{number}] is {short(turn)}, expected {{'from': 'human' or 'gpt', 'value': text}}")
        said.append((role, turn["value"], f"conversations[{number}]"))
    return images, [_question(turn, where) for turn in _turns(said, len(images), where)]


def from_messages(row: Any, where: str, size: Size | None = None) -> Row:
    """Images and annotations of a row of chat messages."""
    images, turns = _messages(row, where)
    return images, [_question(turn, where) for turn in turns]


def from_swift(row: Any, where: str, size: Size | None = None) -> Row:
    """Images and annotations of a row of ms-swift, boxes included. ``size`` gives (width, height) of an image, for bbox_type norm1."""
    images, turns = _messages(row, where)
    objects = row.get("objects")
    if objects is None or objects == {}:
        return images, [_question(turn, where) for turn in turns]
    names, boxes = _objects(objects, images, where, size)
    annotations: list[Annotation] = []
    for turn in turns:
        slots = [(text.count(REF), text.count(BBOX)) for text in (turn.question, turn.answer)]
        refs, found = sum(ref for ref, _ in slots), sum(box for _, box in slots)
        if not refs and not found:
            annotations.append(_question(turn, where))
            continue
        if refs > len(names) or found > len(boxes):
            what = f"{refs} {REF} and {found} {BBOX}, but objects has {len(names)} ref and {len(boxes)} bbox left"
            raise BadRecord("whose slots do not fit their objects", f"{where}: {turn.place} has {what}")
        called, placed = names[:refs], boxes[:found]
        names, boxes = names[refs:], boxes[found:]
        if not called and len(placed) == 1 and slots[0][1] == 1:
            called = [turn.answer]  # "What is at <bbox>?" and its answer
        if len(called) == 1:
            called = called * len(placed)
        if len(called) != len(placed):
            raise BadRecord("with a box without a name", f"{where}: {turn.place} names {len(called)} objects for {len(placed)} boxes")
        annotations += [_box(name, *box, where) for name, box in zip(called, placed, strict=True)]
    if boxes:  # without slots in the text
        if len(names) == 1:
            names = names * len(boxes)
        if len(names) != len(boxes):
            raise BadRecord("with a box without a name", f"{where}: objects has {len(names)} ref for {len(boxes)} bbox")
        annotations += [_box(name, *box, where) for name, box in zip(names, boxes, strict=True)]
    return images, annotations


FORMS: dict[str, Callable[..., Row]] = {"llava": from_llava, "swift": from_swift, "messages": from_messages}


def to_llava(record: Record) -> Iterator[dict[str, Any]]:
    """Its questions and reports: a conversation for each image, and one for questions without an image."""
    for key, images, turns in _asked(record):
        marks = [f"{IMAGE}\n" if images and number == 0 else "" for number in range(len(turns))]
        said = [
            {"from": role, "value": text}
            for mark, (question, answer) in zip(marks, turns, strict=True)
            for role, text in (("human", mark + question), ("gpt", answer))
        ]
        yield {"id": key, **({"image": images[0]} if images else {}), "conversations": said}


def to_messages(record: Record) -> Iterator[dict[str, Any]]:
    """The same as chat messages."""
    for key, images, turns in _asked(record):
        marks = [IMAGE if images and number == 0 else "" for number in range(len(turns))]
        said = [
            {"role": role, "content": text}
            for mark, (question, answer) in zip(marks, turns, strict=True)
            for role, text in (("user", mark + question), ("assistant", answer))
        ]
        yield {"id": key, "messages": said, "images": images}


def to_swift(record: Record) -> Iterator[dict[str, Any]]:
    """The same, and a row of `objects` for each box."""
    yield from to_messages(record)
    for number, box in enumerate(one for one in record.annotations if isinstance(one, BoxOf)):
        yield {
            "id": f"{record.id}/box{number}",
            "messages": [{"role": "user", "content": f"{IMAGE}Find {REF}"}, {"role": "assistant", "content": BBOX}],
            "images": [_image_of(record.images[box.image])],
            "objects": {"ref": [box.name], "bbox": [list(box.xyxy)], "bbox_type": "real"},
        }


def _asked(record: Record) -> Iterator[tuple[str, list[Any], list[tuple[str, str]]]]:
    """Key, images and turns by image."""
    found: dict[int, list[tuple[str, str]]] = {}
    for one in record.annotations:
        if isinstance(one, QA):
            found.setdefault(one.image, []).append((one.question, one.answer))
        elif isinstance(one, Report):
            found.setdefault(one.image, []).append((DESCRIBE, one.text))
    for place, turns in sorted(found.items()):
        yield (f"{record.id}/{place}" if place else record.id), [_image_of(ref) for ref in record.images[place : place + 1]], turns


def _image_of(ref: ImageRef) -> Any:
    value = ref.model_dump(mode="json", exclude_defaults=True)
    return value if len(value) > 1 else ref.path


def _no_row(message: str) -> BadRecord:
    return BadRecord("that are no rows of this form", message)


def _list(row: Any, key: str, where: str) -> list[Any]:
    if not isinstance(row, dict):
        raise _no_row(f"{where}: {short(row)}, expected an object with a list {key!r}")
    if not isinstance(row.get(key), list) or not row[key]:
        raise _no_row(f"{where}: {key} is {short(row.get(key))}, expected a list; the row has {short(list(row))}")
    return row[key]


def _images(row: Any, key: str, where: str) -> list[ImageRef]:
    named = row.get(key) if isinstance(row, dict) else None
    images = []
    for one in named if isinstance(named, list) else [] if named is None else [named]:
        value = {"path": one} if isinstance(one, str) else one
        if not isinstance(value, dict) or not isinstance(value.get("path"), str) or not value["path"].strip():
            raise _no_row(f"{where}: {key} is {short(one)}, expected a path or an object with 'path'")
        if value["path"].startswith(("http:", "https:", "data:", "file:")):
            raise BadRecord("whose image is not a file", f"{where}: {key} is {short(value['path'])}: save it as a file and name its path")
        if ":" in value["path"]:
            raise BadRecord("with a file name that is not allowed", f"{where}: {key} is {short(value['path'])}: no ':' in an image's path")
        known = {part: value[part] for part in ImageRef.model_fields if value.get(part) is not None}
        try:
            images.append(ImageRef.model_validate({**known, "path": value["path"].replace("\\", "/")}))
        except ValidationError as error:
            raise wrong(error, f"{where}: {key}") from None
    return images


def _messages(row: Any, where: str) -> tuple[list[ImageRef], list[Turn]]:
    said, named = [], []
    for number, turn in enumerate(_list(row, "messages", where)):
        place = f"messages[{number}]"
        if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant", "system"):
            raise _no_row(f"{where}: {place} is {short(turn)}, expected a role: user, assistant or system")
        content = turn.get("content")
        if isinstance(content, list):
            texts = []
            for part in content:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    texts.append(part["text"])
                elif kind == "image":
                    texts.append(IMAGE)
                    named += [part[key] for key in ("image", "path", "url") if part.get(key) is not None][:1]
                else:
                    raise _no_row(f"{where}: {place} has the part {short(part)}, expected {{'type': 'text', 'text': ...}} or an image")
            content = "\n".join(texts)
        if not isinstance(content, str):
            raise _no_row(f"{where}: {place}.content is {short(content)}, expected text or a list of parts")
        said.append((turn["role"], content, place))
    images = _images(row if row.get("images") is not None else {"images": named}, "images", where)
    return images, _turns(said, len(images), where)


def _turns(said: list[tuple[str, str, str]], images: int, where: str) -> list[Turn]:
    """Each user's turn with the assistant's that follows it."""
    said = [one for one in said if one[0] != "system"]
    if len(said) % 2 or any(role != ("user", "assistant")[i % 2] for i, (role, _, _) in enumerate(said)):
        raise BadRecord("whose turns do not alternate", f"{where}: the turns must alternate, a user's first and an assistant's last")
    marks = sum(text.count(IMAGE) for role, text, _ in said if role == "user")
    if marks > images or (images > 1 and marks != images):
        raise BadRecord("whose images and marks differ", f"{where}: {marks} {IMAGE} in the questions and {images} images")
    turns: list[Turn] = []
    shown = -1 if marks else 0
    for (_, asked, place), (_, answer, _) in zip(said[::2], said[1::2], strict=True):
        count = asked.count(IMAGE)
        if count > 1:
            raise BadRecord("with a question about several images", f"{where}: {place} has {count} {IMAGE}, the model sees one image")
        shown += count
        question = "\n".join(part for part in (part.strip() for part in asked.split(IMAGE)) if part)
        if not question or not answer.strip():
            raise BadRecord("without a question or an answer", f"{where}: {place} has no text besides its image, or an empty answer")
        if shown < 0:
            raise BadRecord("with a question before its image", f"{where}: {place} comes before the first {IMAGE}")
        turns.append(Turn(question, answer.strip(), shown, place))
    return turns


def _question(turn: Turn, where: str) -> QA:
    if any(slot in text for slot in (REF, BBOX) for text in turn[:2]):
        raise BadRecord("with slots but no objects", f"{where}: {turn.place} has {REF} or {BBOX}; import it as swift, with 'objects'")
    return QA(question=turn.question, answer=turn.answer, image=turn.image)


def _objects(objects: Any, images: list[ImageRef], where: str, size: Size | None) -> tuple[list[str], list[tuple[Any, int]]]:
    """Names, and boxes in pixels with the index of their image."""
    if not isinstance(objects, dict) or not isinstance(objects.get("bbox"), list):
        raise _no_row(f"{where}: objects is {short(objects)}, expected the lists 'ref' and 'bbox'")
    names, boxes, kind = objects.get("ref") or [], objects["bbox"], objects.get("bbox_type", "real")
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise _no_row(f"{where}: objects.ref is {short(names)}, expected a list of names")
    places = objects.get("image_id") or [0] * len(boxes)
    if not isinstance(places, list) or len(places) != len(boxes):
        raise _no_row(f"{where}: objects.image_id is {short(places)}, expected one index for each of {len(boxes)} bbox")
    if kind not in ("real", "norm1"):
        raise _no_row(f"{where}: objects.bbox_type is {short(kind)}, expected 'real' (pixels) or 'norm1' (0 to 1)")
    found = []
    for number, (box, place) in enumerate(zip(boxes, places, strict=True)):
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(images):
            what = f"objects.bbox[{number}] is on image {short(place)}, the row has {len(images)} images"
            raise BadRecord("with a box on an image that is missing", f"{where}: {what}")
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            raise BadRecord("with a wrong box", f"{where}: objects.bbox[{number}] is {short(box)}, expected [x1, y1, x2, y2]")
        corners = [float(value) for value in box]
        if kind == "norm1":
            if not all(0 <= value <= 1 for value in corners):
                raise BadRecord("with a wrong box", f"{where}: objects.bbox[{number}] is {short(box)}, expected 0 to 1 for bbox_type norm1")
            if size is None:
                raise BadRecord("with a box in shares of its image", f"{where}: bbox_type norm1 needs the image's size")
            sides = size(images[place]) * 2
            corners = [value * side for value, side in zip(corners, sides, strict=True)]
        found.append((corners, place))
    return names, found


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _box(name: str, corners: list[float], place: int, where: str) -> BoxOf:
    try:
        return BoxOf.model_validate({"name": name, "xyxy": corners, "image": place})
    except ValidationError as error:
        fault = wrong(error, f"{where}: the box of {name!r}")
        raise BadRecord("with a wrong box", str(fault)) from None
