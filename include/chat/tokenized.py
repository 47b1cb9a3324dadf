"""Rows between the stages: Arrow files, which a reader maps into memory; prepared rows with token ids and labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from include.chat.chat_format import Encoded

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


def batch(encoded: Encoded, rows: Any, chosen: Any) -> Any:
    """An Arrow record batch of the chosen conversations: `row`, `input_ids`, `labels`."""
    import numpy as np
    import pyarrow as pa

    lengths = encoded.ends - encoded.starts
    ids, labels = encoded.ids, encoded.labels
    if len(chosen) < len(rows):
        keep = np.zeros(len(rows), bool)
        keep[chosen] = True
        flat = np.repeat(keep, lengths)
        ids, labels = ids[flat], labels[flat]
    offsets = pa.array(np.concatenate([[0], lengths[chosen].cumsum()]).astype(np.int32))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]
    return pa.RecordBatch.from_arrays([pa.array(rows[chosen]), *lists], ["row", "input_ids", "labels"])


def pair_batch(chosen: Encoded, rejected: Encoded, rows: Any, used: Any) -> Any:
    """An Arrow record batch of the used preference rows: `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Args:
        chosen, rejected: the conversations with the one and with the other answer, which is their last trained stretch.
    """
    import numpy as np
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for i in used:
        for name, encoded in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            ids = encoded.ids[encoded.starts[i] : encoded.ends[i]]
            begin, end = answer_span(encoded, i)
            columns[name].append(ids[begin:end])
            if name == "chosen_ids":
                columns["prompt_ids"].append(ids[:begin])
    lists = {name: pa.array(values, pa.list_(pa.int32())) for name, values in columns.items()}
    return pa.RecordBatch.from_pydict({"row": pa.array(rows[np.asarray(used, int)]), **lists})


def answer_span(encoded: Encoded, i: int) -> tuple[int, int]:
    """Where the last trained stretch of a conversation begins and ends, in tokens from the conversation's start."""
    import numpy as np

    trained = encoded.trained[encoded.starts[i] : encoded.ends[i]]
    if not trained.any():
        return len(trained), len(trained)
    end = int(np.flatnonzero(trained)[-1]) + 1
    before = np.flatnonzero(~trained[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end


def write_rows(path: Path, batches: list[Any]) -> dict[str, Any]:
    """Write an Arrow stream, if there is something to write; returns its rows, tokens, trained tokens and sha256."""
    import pyarrow as pa

    facts: dict[str, Any] = {"rows": 0, "tokens": 0, "trained": 0, "sha256": ""}
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        return facts
    digest = hashlib.sha256()
    with pa.ipc.new_stream(str(path), batches[0].schema) as writer:
        for batch in batches:
            lists = {name: batch[name].flatten().to_numpy() for name in batch.schema.names[1:]}
            for values in lists.values():
                digest.update(values.tobytes())
            facts["rows"] += len(batch)
            facts["tokens"] += sum(len(values) for name, values in lists.items() if name != "labels")
            facts["trained"] += (
                int((lists["labels"] != IGNORED).sum())
                if "labels" in lists
                else sum(len(lists[name]) for name in ("chosen_ids", "rejected_ids"))
            )
            writer.write_batch(batch)
    return {**facts, "sha256": digest.hexdigest()}


def sum_up(sides: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of all files of a side; `ids_sha256` is the digest of the files' digests."""
    found: dict[str, Any] = {name: sum(side[name] for side in sides) for name in ("rows", "tokens", "trained")}
    digests = "".join(side["sha256"] for side in sides)
    return {**found, "ids_sha256": hashlib.sha256(digests.encode()).hexdigest()}


def load_rows(folder: Path | str) -> Any:
    """All streams of a folder, in the order of their names, as one `datasets.Dataset`."""
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(str(file)) for file in sorted(Path(folder).iterdir())])
