"""Datasets as people name them: files, folders, patterns, lists, addresses; each pinned, and each fault by its name."""

from __future__ import annotations

import gzip
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import include.storage.web
from include.data.decontamination import read_prompts
from include.data.listing import MAX_NAMES
from include.data.sources import DatasetRef, is_hub_id, pin_dataset, read_rows, short_name
from include.errors import BadData, BadRecipe, NoPermission, NotFound, PermanentError, Unreachable
from include.storage.locations import open_path
from tests.rows import ROWS, csv, lines, parquet
from tests.services.s3 import S3


def read(*names: str, **fields: Any) -> tuple[list[Any], list[str]]:
    """Return the rows and the notes."""
    notes: list[str] = []
    dataset = DatasetRef(names[0] if len(names) == 1 else list(names), **fields)
    return [orjson.loads(row) for row in read_rows(dataset, notes.append)], notes


def pin(*names: str) -> str:
    return pin_dataset(DatasetRef(names[0] if len(names) == 1 else list(names)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with rows in three types, and with files and folders that are no rows."""
    made = tmp_path / "data"
    (made / "below").mkdir(parents=True)
    (made / "b.jsonl").write_bytes(lines(ROWS[10:20]))
    (made / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[:10]), mtime=0))
    (made / "c.PARQUET").write_bytes(parquet(ROWS[20:30]))
    (made / "below" / "d.jsonl").write_bytes(lines(ROWS[30:]))
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl"):
        (made / name).write_text("{}")
    return made


def test_a_folder_a_pattern_and_a_list_are_one_dataset_in_the_order_of_names(folder: Path) -> None:
    rows, notes = read(f"{folder}/")
    assert rows == ROWS[:30]
    assert notes == [
        "files read, in this order: a.jsonl.gz, b.jsonl, c.PARQUET",
        "not read: README.md, below, dataset_infos.json",
    ]
    assert read(f"{folder}/*.jsonl*")[0] == ROWS[:20]
    assert read(f"{folder}/**/*.jsonl")[0] == ROWS[10:20] + ROWS[30:]
    rows, notes = read(f"{folder}/b.jsonl", f"{folder}/*.gz", f"{folder}/b.*")
    assert rows == ROWS[10:20] + ROWS[:10], "in the list's order, and each file once"
    assert notes == ["files read, in this order: b.jsonl, a.jsonl.gz"]
    assert read(f"{folder}/b.jsonl") == (ROWS[10:20], []), "of one file there is nothing to say"
    (folder / "[1].jsonl").write_bytes(lines(ROWS[:1]))
    assert read(f"{folder}/[1].jsonl")[0] == ROWS[:1], "a file of that name, not a pattern"


def test_the_notes_of_several_files_name_the_file_and_do_not_grow_without_end(folder: Path) -> None:
    (folder / "b.jsonl").write_bytes(orjson.dumps({"tags": [], "test": ROWS[:3], "train": ROWS[3:5]}))
    rows, notes = read(str(folder), split="test")
    assert rows[10:13] == ROWS[:3]
    assert notes[2] == "b.jsonl: the rows are the list 'test' of the file; not read: tags, train (2 rows)"
    for number in range(30):
        (folder / f"x{number}.txt").write_text("x")
    assert read(str(folder))[1][1].endswith(f" and {33 - MAX_NAMES} more")


def test_the_revision_of_several_files_covers_names_and_content(folder: Path) -> None:
    revisions = [pin(str(folder))]
    assert pin(f"{folder}/") == revisions[0]
    (folder / "README.md").write_text("another text")
    assert pin(str(folder)) == revisions[0], "it is not read"
    (folder / "b.jsonl").write_bytes(lines(ROWS[10:19]))
    revisions.append(pin(str(folder)))
    (folder / "e.jsonl").write_bytes(b"")
    revisions.append(pin(str(folder)))
    (folder / "e.jsonl").rename(folder / "f.jsonl")
    revisions.append(pin(str(folder)))
    (folder / "f.jsonl").unlink()
    assert pin(str(folder)) == revisions[1]
    assert len(set(revisions)) == 4
    one, two = f"{folder}/b.jsonl", f"{folder}/c.PARQUET"
    assert pin(one, two) != pin(two, one)
    (folder / "alone").mkdir()
    (folder / "alone" / "b.jsonl").write_bytes(lines(ROWS[10:19]))
    assert pin(f"{folder}/alone/b.jsonl") == pin(one), "one file is pinned by its content alone"


@pytest.mark.parametrize(
    ("names", "message", "remedy"),
    [
        (["nothing-*.jsonl"], r"field 'dataset': .*nothing-\*\.jsonl matches no file of a known type\. Name", ""),
        (["*.md"], r"matches no file of a known type; it has: README\.md", "Name files that end in .parquet"),
        (["empty/"], "empty has no file of a known type", ""),
        (["above"], "above has no file of a known type; it has: below", r"above/\*\*/\* are the files of the folders"),
        (["nowhere.jsonl"], "there is no file .*nowhere.jsonl", "Check the path"),
        (["b.jsonl", "nowhere.jsonl"], "there is no file .*nowhere.jsonl", "Check the path"),
        (["README.md"], "neither a Hub id .* nor a file of a known type", "a folder of such files, or a pattern"),
        (["x" * 300 + ".jsonl"], "cannot be opened: File name too long", "Check the path"),
    ],
)
def test_a_name_without_rows_is_one_sentence(names: list[str], message: str, remedy: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "above" / "below").mkdir(parents=True)
    names = [f"{folder}/{name}" for name in names]
    for work in (lambda: pin(*names), lambda: read(*names)):
        with pytest.raises(NotFound, match=message) as caught:
            work()
        assert re.search(remedy, caught.value.do)


def test_a_list_has_no_hub_dataset(folder: Path) -> None:
    with pytest.raises(BadRecipe, match="the list has 'owner/name', which is neither a file nor a folder"):
        pin(f"{folder}/b.jsonl", "owner/name")
    assert DatasetRef(["owner/name"]).hub_id == "owner/name"


def test_names_are_short_where_people_read_them(folder: Path) -> None:
    assert short_name(f"{folder}/") == "data"
    assert short_name([f"{folder}/*.jsonl", "owner/name", "s3://bucket/a.csv"]) == "data/*.jsonl, owner/name, a.csv"
    assert not is_hub_id(f"{folder}/*.jsonl") and not is_hub_id("data/*.jsonl") and not is_hub_id("./data")


def test_folders_and_patterns_of_an_object_store_are_listed(s3: S3, folder: Path) -> None:
    target = open_path("s3://retune/data")
    target.fs.put(f"{folder}/", target.path, recursive=True)
    rows, notes = read("s3://retune/data/")
    assert rows == ROWS[:30]
    assert notes[1] == "not read: README.md, below, dataset_infos.json"
    assert read("s3://retune/data/**/*.jsonl")[0] == ROWS[10:20] + ROWS[30:]
    assert read("s3://retune/data/b.jsonl") == (ROWS[10:20], [])
    before = pin("s3://retune/data")
    assert pin("s3://retune/data/") == before
    target.fs.pipe_file(f"{target.path}/e.jsonl", b"")
    assert pin("s3://retune/data") != before
    for name, message in [
        ("s3://retune/data/*.txt", "matches no file of a known type"), ("s3://retune/nowhere/", "there is no file s3"),
        ("s3://retune/nowhere/*.jsonl", "there is no file s3"), ("s3://retune/data/x.jsonl", "there is no file s3"),
        ("s3://nowhere/data/*.jsonl", "the bucket of .* does not exist"), ("s3://retune/data/README.md", "neither a"),
    ]:  # fmt: skip
        with pytest.raises(NotFound, match=message):
            pin(name)


class Answers(BaseHTTPRequestHandler):
    """Answers as the first part of the path says: a status, `cut`, `hang`, `loop`, `page`; never a part of a file."""

    files: dict[str, bytes]
    etag: str | None = None

    def do_GET(self) -> None:
        _, kind, name = self.path.partition("?")[0].split("/", 2)
        if kind == "hang":
            self.server.closing.wait()  # type: ignore[attr-defined]
            return
        content = b"<!DOCTYPE html><html></html>" if kind == "page" else self.files.get(name, b"x")
        self.send_response(302 if kind == "loop" else int(kind) if kind.isdigit() else 200)
        if kind == "loop":
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(content) + 1000 * (kind == "cut")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a server of `Answers`; return its address."""
    monkeypatch.setattr(include.storage.web, "SECONDS", 0.5)
    Answers.files = {"a.jsonl": lines(ROWS), "a.parquet": parquet(ROWS), "zipped.jsonl.gz": lines(ROWS)}
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.closing = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.closing.set()  # type: ignore[attr-defined]
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        *((f"/{status}", Unreachable, f"cannot be fetched now: the server answered {status}")
          for status in (408, 425, 429, 500, 502, 503, 504)),
        *((f"/{status}", NoPermission, f"may not be read: the server answered {status}") for status in (401, 403)),
        *((f"/{status}", NotFound, f"there is no file http.*: the server answered {status}") for status in (404, 410)),
        ("/400", PermanentError, "cannot be fetched: the server answered 400"),
        ("/loop", PermanentError, "leads from one address to the next"),
        ("/cut", Unreachable, "cannot be reached: .*[Nn]ot enough data"),
        ("/hang", Unreachable, "cannot be reached: .*[Tt]imeout"),
        ("http://127.0.0.1:{closed}", Unreachable, "cannot be reached: .*Connect call failed"),
        ("http://nowhere.invalid", Unreachable, "cannot be reached: Cannot connect to host nowhere.invalid"),
        ("https://{host}/200", PermanentError, "the connection is not secure"),
        ("http://[bad", NotFound, "is not a valid address"),
        ("unknown://x", NotFound, "has an unknown kind of address"),
    ],
)  # fmt: skip
def test_each_fault_of_an_address_has_its_name_and_is_retried_or_not(
    place: str, error: type[Exception], message: str, web: str
) -> None:
    place = place.format(closed=closed_port(), host=web.removeprefix("http://"))
    address = f"{place if '://' in place else web + place}/a.jsonl?signature=secret"
    address = address.partition("?")[0] if address.startswith("unknown") else address
    works: list[tuple[str, Callable[[], Any]]] = [
        ("dataset", lambda: pin(address)), ("dataset", lambda: read(address)),
        ("decontaminate_against", lambda: read_prompts(address)),
    ]  # fmt: skip
    for field, work in works:
        with pytest.raises(error, match=message) as caught:
            work()
        assert type(caught.value) is error
        assert f"field '{field}'" in str(caught.value)
        assert place == "http://[bad" or "secret" not in caught.value.what
        assert caught.value.do, "it says what to do"


def test_files_are_read_from_servers_that_send_no_parts_of_files(web: str) -> None:
    for name in ("a.jsonl", "a.parquet", "zipped.jsonl.gz", "a.jsonl?signature=1"):
        assert read(f"{web}/200/{name}")[0] == ROWS, name
    Answers.files["a.jsonl"] = lines(ROWS * 2000)  # more than one block of fsspec's
    rows, notes = read(f"{web}/200/a.jsonl", f"{web}/200/a.parquet")
    assert len(rows) == 80_040
    assert notes == ["files read, in this order: a.jsonl, a.parquet"]
    with pytest.raises(BadData, match="it is a web page. Name the address of the file itself"):
        read(f"{web}/page/a.jsonl")
    with pytest.raises(NotFound, match="does not end like a file of a known type.*cannot be listed"):
        pin(f"{web}/200/data/")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "rows".encode("utf-16"), "it is UTF-16 text. Save it as UTF-8"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS. .*git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        ("a.json", b"PK\x03\x04abc", "it is a zip archive"),
        ("a.jsonl.gz", lines(ROWS), "not a gzipped file"),
        ("a.jsonl", gzip.compress(lines(ROWS), mtime=0)[:-30], "cannot be read: Compressed file ended"),
        ("a.csv", b"a,b\n1,2\n" + b'"x,3\ny,4\n' * 1, "quoted field that begins in line 3 has no end"),
        ("a.csv", b"a,b,a\n1,2,3\n", "the header has the column 'a' twice"),
        ("a.csv", lines(ROWS), "it has JSON and no header of columns. Give it a name that ends in .jsonl"),
        ("a.jsonl", b"PAR1\x15\x04", "it is a parquet file. Give it a name that ends in .parquet"),
        ("a.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "several lists of rows, a, b, .*Set dataset_split"),
    ],
)
def test_a_file_that_holds_no_rows_is_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=message) as caught:
        read(str(tmp_path / name))
    assert f"field 'dataset': {tmp_path / name} cannot be read" in str(caught.value)


def test_what_a_file_holds_decides_about_compression(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(lines(ROWS), mtime=0))
    assert read(str(tmp_path / "a.jsonl")) == (ROWS, [])


def test_csv_rows_with_faults_stay_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv(ROWS[:2]) + b'"\xff"\n"[]",more,and more\n\n"two\nlines"\n')
    found = list(read_rows(DatasetRef(str(tmp_path / "a.csv")), print))
    assert len(found) == 5
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(found[2])
    assert orjson.loads(found[3]) == {"conversations": "[]", "(beyond the header)": ["more", "and more"]}
    assert orjson.loads(found[4]) == {"conversations": "two\nlines"}


def test_parquet_texts_in_binary_columns_are_texts_and_bad_bytes_are_one_row(tmp_path: Path) -> None:
    binary = pa.table({"text": pa.array([b"a", b"\xff\xfe", None]), "n": [1.5, float("nan"), 2.0]})
    pq.write_table(binary, tmp_path / "binary.parquet")
    assert read(str(tmp_path / "binary.parquet"))[0] == [
        {"text": "a", "n": 1.5}, {"text": "(2 bytes)", "n": None}, {"text": None, "n": 2.0},
    ]  # fmt: skip
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "texts.parquet")
    first, bad, last = read(str(tmp_path / "texts.parquet"))[0]
    assert (first, last) == ({"text": "a"}, {"text": "c"})
    assert bad.startswith("a text of this row is not UTF-8")
