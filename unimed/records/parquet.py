"""Records as a parquet file: what is filtered by in columns of its own, beside the whole record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unimed import io
from unimed.records.record import Record


def columns(record: Record, text: str) -> dict[str, Any]:
    """A row of the parquet file: what is filtered by, and the whole record as in the JSON lines."""
    return {
        "id": record.id,
        "dataset": record.dataset,
        "split": record.split,
        "patient": record.patient,
        "images": [ref.path for ref in record.images],
        "kinds": sorted({one.kind for one in record.annotations}),
        "record": text.rstrip("\n"),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The file whole or not at all. pyarrow is imported here: it takes time, and few commands need it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    names = {"images": pa.list_(text), "kinds": pa.list_(text)}
    fields = [(name, names.get(name, text)) for name in ("id", "dataset", "split", "patient", "images", "kinds", "record")]
    with io.beside(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), partial, compression="zstd")
