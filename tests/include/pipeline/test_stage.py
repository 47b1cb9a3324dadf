"""The frame of the stages: an input that was damaged is named, and made again by the next run."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from include.errors import Conflict, Damaged
from include.storage.files import DAMAGED
from tasks.validate import validate
from tests.conftest import unlock


def test_a_damaged_input_ends_the_stage_in_one_sentence_and_the_next_run_makes_it_again(
    small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    recipe = small_recipe()
    lineage = pipeline(recipe, "download")
    folder = artifact(lineage, "download").local()
    rows, content = folder / "rows.parquet", (folder / "rows.parquet").read_bytes()
    unlock(folder)
    rows.write_bytes(content[:-1] + b"?")
    with pytest.raises(
        Damaged, match="output of download in .* is damaged: rows.parquet has changed .* Clear the task"
    ):
        validate(lineage)
    assert issubclass(Damaged, Conflict), "a retry of the reader cannot help"
    again = pipeline(recipe, "validate")
    assert again["download"] == lineage["download"]
    assert (artifact(again, "download").local() / "rows.parquet").read_bytes() == content
    assert artifact(again).metadata.good == 60
    (kept,) = folder.parent.glob(f".*{DAMAGED}*")
    assert (kept / "rows.parquet").read_bytes() != content
