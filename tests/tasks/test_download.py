"""Files and addresses of every format, fetched and pinned; damaged and missing ones are named."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from include.errors import BadData, NotFound
from tests.rows import ROWS, csv, lines, messages, parquet


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps({"data": ROWS}).encode()),
        ("a.csv", csv(ROWS)),
        ("a.parquet", parquet(ROWS)),
    ],
)
def test_every_format_gives_the_same_messages(
    name: str, content: bytes, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    (tmp_path / name).write_bytes(content)
    lineage = pipeline(small_recipe(dataset=str(tmp_path / name)), "standardize")
    assert [said.contents for said in messages(artifact(lineage)).values()] == [
        [turn["value"] for turn in row["conversations"]] for row in ROWS
    ]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """Start a web server for the files of `tmp_path/web`; return its address."""
    (tmp_path / "web").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", lines(ROWS)), ("a.jsonl.gz", gzip.compress(lines(ROWS))), ("a.parquet", parquet(ROWS))],
)
def test_a_dataset_is_fetched_by_its_address_and_pinned_by_its_content(
    name: str, content: bytes, web: str, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    (tmp_path / "web" / name).write_bytes(content)
    recipe = small_recipe(dataset=f"{web}/{name}")
    first = pipeline(recipe, "download")
    assert artifact(first).metadata.rows == 40
    assert pipeline(recipe, "download") == first
    fewer = {
        "a.jsonl": lines(ROWS[:30]),
        "a.jsonl.gz": gzip.compress(lines(ROWS[:30])),
        "a.parquet": parquet(ROWS[:30]),
    }
    (tmp_path / "web" / name).write_bytes(fewer[name])
    second = pipeline(recipe, "download")
    assert artifact(second).metadata.rows == 30
    (tmp_path / "web" / name).unlink()
    with pytest.raises(NotFound, match="field 'dataset': there is no file http"):
        pipeline(recipe, "download")


def test_a_dataset_in_an_object_store_is_fetched(
    small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    import fsspec

    with fsspec.open("memory://bucket/rows.jsonl", "wb") as file:
        file.write(lines(ROWS))
    found = artifact(pipeline(small_recipe(dataset="memory://bucket/rows.jsonl"), "download"))
    assert found.metadata.rows == 40


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1, 2", "cannot be read: not JSON"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], "cannot be read"),
        ("a.parquet", parquet(ROWS)[:-20], "not a complete parquet file"),
        ("a.parquet", b"PAR1", "not a complete parquet file"),
        ("a.parquet", b"PAR1" + b"\xff" * 400 + parquet(ROWS)[404:], "not a complete parquet file"),
    ],
)
def test_a_damaged_file_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=message) as caught:
        pipeline(small_recipe(dataset=str(tmp_path / name)), "download")
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_dataset_or_base_names_the_field(small_recipe: Callable, pipeline: Callable, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="field 'dataset': there is no file .*nowhere.jsonl"):
        pipeline(small_recipe(dataset=str(tmp_path / "nowhere.jsonl")), "download")
    with pytest.raises(NotFound, match="field 'dataset': '.*' is neither a Hub id"):
        pipeline(small_recipe(dataset=str(tmp_path / "rows.xyz")), "download")
    with pytest.raises(NotFound, match="field 'base_model': there is no model in"):
        pipeline(small_recipe(base_model=str(tmp_path / "nowhere")), "download")
