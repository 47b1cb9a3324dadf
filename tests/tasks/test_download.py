"""Files and addresses of every format, fetched and pinned; damaged and missing ones are named."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from include.data.sources import absolute_dataset, pin_dataset
from include.errors import BadData, Conflict, NoSpace, NotFound
from include.pipeline.outcomes import completed_revisions, record_outcome
from include.pipeline.records import recorded
from include.pipeline.stage import pinned_recipe
from include.recipe import dataset_ref, load_recipe
from include.storage.artifacts import Store
from plugins.dag_doc import dag_doc
from tasks.download import download
from tasks.report import report
from tests.rows import ROWS, csv, lines, listed, messages, parquet


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", lines(ROWS)),
        ("a.json", json.dumps({"licenses": [], "data": ROWS}).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
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
    [("a.jsonl", lines(ROWS)), ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)), ("a.parquet", parquet(ROWS))],
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
        "a.jsonl.gz": gzip.compress(lines(ROWS[:30]), mtime=0),
        "a.parquet": parquet(ROWS[:30]),
    }
    (tmp_path / "web" / name).write_bytes(fewer[name])
    second = pipeline(recipe, "download")
    assert artifact(second).metadata.rows == 30
    (tmp_path / "web" / name).unlink()
    with pytest.raises(NotFound, match="field 'dataset': there is no file http.* 404"):
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
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-20], "cannot be read"),
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


def test_a_folder_is_one_dataset_and_what_is_read_is_logged_recorded_and_reported(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "b.json").write_bytes(json.dumps({"test": ROWS[:3], "train": ROWS[20:]}).encode())
    (folder / "a.csv").write_bytes(csv(ROWS[:20]))
    (folder / "notes.txt").write_text("x")
    caplog.set_level(logging.INFO)
    recipe = small_recipe(dataset=f"{folder}/")
    lineage = pipeline(recipe, "validate")
    notes = [
        "files read, in this order: a.csv, b.json",
        "not read: notes.txt",
        "b.json: the rows are the list 'train' of the file; not read: test (3 rows)",
    ]
    assert artifact(lineage, "download").metadata.notes == notes
    assert artifact(lineage, "download").metadata.rows == artifact(lineage).metadata.good == 40
    logged = [record.getMessage() for record in caplog.records]
    assert all(any(note in line for line in logged) for note in notes)
    assert any("dataset data@" in line for line in logged), "the summary of resolve"
    report("small", "test")
    page = next((tmp_path / "var" / "store").rglob("report.html")).read_text()
    assert '<p class="note">Not read: notes.txt.</p>' in page

    assert pipeline(recipe, "validate") == lineage
    (folder / "d.jsonl").write_bytes(b"\n")
    pinned = pipeline(recipe, "resolve")
    (folder / "c.jsonl").write_bytes(lines(ROWS[:1]))
    with pytest.raises(Conflict, match=f"{folder} has changed: its revision was"):
        download(pinned)
    more = pipeline(recipe, "download")
    assert artifact(more).metadata.rows == 41, "a new file is a new revision"


def test_a_list_of_files_is_pinned_with_absolute_paths_and_its_outcome_is_found(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    for name, rows in (("a.jsonl", ROWS[:20]), ("b.parquet", ROWS[20:])):
        (tmp_path / name).write_bytes(lines(rows) if name == "a.jsonl" else parquet(rows))
    names = [f"{tmp_path}/below/../b.parquet", str(tmp_path / "a.jsonl")]
    recipe = small_recipe(dataset=names, max_rows=30)
    lineage = pipeline(recipe, "download")
    assert artifact(lineage).metadata.rows == 30
    store = Store()
    pinned = pinned_recipe(store, lineage)
    assert pinned.dataset == [str(tmp_path / "b.parquet"), str(tmp_path / "a.jsonl")]
    record_outcome(store, pinned, "published", run="test", version="v1", from_recipe_file=True)
    (found,) = completed_revisions(store, "small", absolute_dataset(names))
    assert found["revision"] == pin_dataset(dataset_ref(load_recipe(recipe)))
    assert f"`{names[0]}, {names[1]}`" in dag_doc(load_recipe(recipe))


def test_nan_beside_the_conversation_is_read_and_nan_in_it_refuses_the_row(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    rows = [json.dumps({**row, "score": float("nan")}) for row in ROWS[:30]]
    rows[3] = rows[3].replace('"Answer 3."', "NaN")
    rows[5] = rows[5].replace("Answer 5.", "\\ud83d")
    (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
    lineage = pipeline(small_recipe(dataset=str(tmp_path / "a.json"), max_refused_share=0.1), "validate")
    assert set(listed(artifact(lineage), "quarantine.jsonl")) == {3, 5}
    # row 5 has NaN too, but is no JSON without it either
    assert artifact(lineage, "download").metadata.notes == ["NaN or Infinity was read as null in 29 rows"]
    assert artifact(lineage).metadata.good == 28


def test_the_notes_of_a_dataset_are_at_most_fifty(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, row in enumerate(ROWS * 2):
        (folder / f"{number:03}.json").write_bytes(json.dumps({"tags": [], "data": [row]}).encode())
    notes = artifact(pipeline(small_recipe(dataset=str(folder)), "download")).metadata.notes
    assert len(notes) == 51 and notes[-1] == "31 more notes are in the log of download"


def test_a_full_disk_is_said_and_is_retried(small_recipe: Callable, pipeline: Callable) -> None:
    pipeline(small_recipe(), "resolve")
    with (
        pytest.raises(NoSpace, match="no space is left on a disk"),
        recorded(Store(), "small", "test", "download"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert Store().read_records("small", "test")["download"]["error"]["kind"] == "NoSpace"
