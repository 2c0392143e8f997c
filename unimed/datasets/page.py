"""The HTML page of `unimed data validate --html` and `stats --html`: numbers, findings and samples with their boxes."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, ImageDraw

from unimed import NOTICE
from unimed.datasets.validate import Checked, table_rows
from unimed.records import jsonl
from unimed.records.image import Images
from unimed.records.pixels import load_image
from unimed.records.record import QA, BoxOf, Label, Labels, Number, Record, Report

TEMPLATE = Path(__file__).with_name("samples.html.j2")
SIDE = 224
SHOWN = 6  # annotations of a sample


def page(checked: Checked, folder: Path) -> str:
    """A whole document; every text in it is escaped."""
    images = Images(folder, jsonl.read_info(folder).roots)
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    samples = [_sample(record, images) for record in checked.samples]
    return template.render(checked=checked, folder=str(folder), notice=NOTICE, rows=table_rows(checked), samples=samples)


def _sample(record: Record, images: Images) -> dict[str, Any]:
    texts = [_text(one) for one in record.annotations[:SHOWN]]
    if len(record.annotations) > SHOWN:
        texts.append(f"and {len(record.annotations) - SHOWN:,} more")
    return {"id": record.id, "split": record.split, "texts": texts, "image": _picture(record, images)}


def _text(one: Any) -> str:
    if isinstance(one, QA):
        return f"{one.question} → {one.answer}"
    if isinstance(one, BoxOf):
        return f"box of {one.name}"
    if isinstance(one, Label):
        return f"{one.set}: {one.value}"
    if isinstance(one, Labels):
        return f"present: {', '.join(one.present) or 'nothing'}; absent: {', '.join(one.absent) or 'nothing'}"
    if isinstance(one, Number):
        return f"{one.name}: {one.value:g} {one.unit}"
    assert isinstance(one, Report)
    return one.text


def _picture(record: Record, images: Images) -> str:
    """The first image as a data URI, "" where there is none that can be shown."""
    if not record.images:
        return ""
    try:
        seen = images.look(record.images[0], record.id)
        shown = load_image(seen.image)
    except Exception:  # decoders raise nearly anything; the finding is in the list
        return ""
    scale = SIDE / max(shown.size)
    small = shown.resize((max(round(shown.width * scale), 1), max(round(shown.height * scale), 1)), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(small)
    for one in record.annotations:
        if isinstance(one, BoxOf) and one.image == 0:
            pen.rectangle([value * scale for value in seen.placement.inverse(one.xyxy)], outline="#00d1a0", width=2)
    packed = io.BytesIO()
    small.save(packed, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode()
