"""Packed rows as the tables that the `pack` stage writes."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from ditty.dataset.tables import write

SCHEMA = pa.schema([(n, pa.list_(pa.int32())) for n in ("input_ids", "labels", "lengths")])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write packed rows as an Arrow table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, [pa.Table.from_pylist(rows, schema=SCHEMA)], SCHEMA)
