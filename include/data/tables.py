"""Arrow files that one stage writes and the next one maps into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_table(table: Any, path: Path) -> None:
    """Write a table as an Arrow file."""
    import pyarrow as pa

    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


def read_table(path: Path) -> Any:
    """Map a file of `write_table` into memory; bytes are read from disk when they are used."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
