"""A prepared dataset of three packed rows, as small as can be."""

import json
from pathlib import Path

import pyarrow as pa

from data.prepared.layout import MANIFEST, ROW_SCHEMA, SPLITS
from data.schema import PackedRow
from tests.support.manifests import manifest_of

SEQ_LEN = 6
ROWS = [
    PackedRow(ids=[1, 10, 11, 1, 12], spans=[1, 2, 1, 1], lengths=[3, 2], rows=[7, 3]),
    PackedRow(ids=[1, 20, 21, 22, 23, 2], spans=[2, 4], lengths=[6], rows=[5]),
    PackedRow(ids=[1, 30], spans=[1, 1], lengths=[2], rows=[0]),
]


def write(path: Path, rows: list[PackedRow]) -> None:
    """A file of packed rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(row, name) for row in rows] for name in ROW_SCHEMA.names}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, ROW_SCHEMA) as arrow:
        arrow.write_table(pa.table(columns, schema=ROW_SCHEMA))


def prepared(directory: Path, *, packing: bool = True) -> Path:
    """A prepared dataset of ROWS, as small as can be."""
    for split, rows in zip(SPLITS, (ROWS, []), strict=True):
        write(directory / split / "rows.arrow", rows)
    (directory / MANIFEST).write_text(json.dumps(manifest_of(directory, seq_len=SEQ_LEN, packing=packing)))
    return directory
