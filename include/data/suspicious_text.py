"""Texts that look like special tokens or wrong decoding, counted in one pass over the texts of many rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from include.data.conversation import ParsedRow

_PATTERNS = [  # fault and pattern
    ("special_token_text", b"<|"),
    ("special_token_text", b"</s>"),
    ("special_token_text", b"[INST]"),
    ("broken_characters", "\ufffd".encode()),
    *(("control_characters", bytes([b])) for b in (*range(32), 0x7F) if chr(b) not in "\t\n\r"),
]
_STARTS_PATTERN = bytes(any(pattern[0] == byte for _, pattern in _PATTERNS) for byte in range(256))


def count_suspicious_text(contents: Any, rows: list[ParsedRow]) -> None:
    """Count the patterns of `_PATTERNS` in one pass over the texts.

    Args:
        contents: an Arrow array with one list of texts per row.
        rows: the rows whose faults are counted.
    """
    texts = contents.values
    raw = texts.buffers()[2].to_pybytes() if texts.buffers()[2] else b""
    data, starts = np.frombuffer(raw, np.uint8), np.frombuffer(texts.buffers()[1], np.int64)
    candidates = np.flatnonzero(np.frombuffer(raw.translate(_STARTS_PATTERN), bool))
    first_bytes = data[candidates]
    for fault, pattern in _PATTERNS:
        found = candidates[first_bytes == pattern[0]]
        for i, byte in enumerate(pattern[1:], 1):
            found = found[found < len(data) - i]
            found = found[data[found + i] == byte]
        text_index = np.searchsorted(starts, found, "right") - 1
        row_index = np.searchsorted(contents.offsets.to_numpy(), text_index, "right") - 1
        for row, count in zip(*(array.tolist() for array in np.unique(row_index, return_counts=True)), strict=True):
            rows[row].faults[fault] += count


def as_lists(texts: Any) -> Any:
    """Convert an Arrow array of texts and nulls to lists of one text and of none."""
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(texts.is_valid().to_numpy(zero_copy_only=False))])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), texts.drop_null())
