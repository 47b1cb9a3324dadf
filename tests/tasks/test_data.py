"""From a file to token ids: what is refused, what is kept, what is said when nothing can be used."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from include.errors import BadData, Missing
from tests.conftest import conversation

ROWS = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def csv(rows: list[Any]) -> bytes:
    quoted = ['"' + json.dumps(row["conversations"]).replace('"', '""') + '"' for row in rows]
    return ("conversations\n" + "\n".join(quoted) + "\n").encode()


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
    trail = pipeline(small_recipe(dataset=str(tmp_path / name)), "standardize")
    messages = pq.read_table(artifact(trail).local() / "messages.parquet")["messages"].to_pylist()
    assert [[m["content"] for m in json.loads(row)] for row in messages] == [
        [turn["value"] for turn in row["conversations"]] for row in ROWS
    ]


BAD_ROWS = [
    (b"{cut", "cannot be read as a conversation"),
    (b'{"conversations": []}', "the conversation is empty"),
    (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": null}]}', "not a text"),
    (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}', "text is empty"),
    (b'{"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]}', "unknown role"),
    (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}', "no assistant turn"),
    (json.dumps(ROWS[3]).encode(), "an exact copy of an earlier row"),
]


def test_bad_rows_are_in_the_quarantine_with_their_number_reason_and_content(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + b"\n".join(raw for raw, _ in BAD_ROWS))
    trail = pipeline(small_recipe(dataset=str(path), max_refused_share=0.2), "standardize")
    found = artifact(trail, "validate")
    entries = [json.loads(line) for line in (found.local() / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in entries] == list(range(40, 47))
    for entry, (raw, reason) in zip(entries, BAD_ROWS, strict=True):
        assert any(reason in said for said in entry["reasons"]), entry
        assert entry["content"] == raw.decode()
    assert (found.facts["good"], found.facts["refused"], found.facts["copies"]) == (40, 6, 1)
    assert "sharegpt_rows" in (found.local() / "data_docs" / "index.html").read_text()
    kept = pq.read_table(artifact(trail).local() / "messages.parquet")["row"].to_pylist()
    assert kept == list(range(40))


def test_too_many_bad_rows_end_the_run_and_the_quarantine_stays(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + b"{cut\n" * 10)
    with pytest.raises(BadData, match=r"10 of 50 rows are refused \(20.0%, allowed 5.0%\)") as caught:
        pipeline(small_recipe(dataset=str(path), max_refused_share=0.05), "validate")
    quarantine = Path(str(caught.value).rsplit(": ", 1)[1].rstrip("."))
    assert len(quarantine.read_text().splitlines()) == 10


def test_alpaca_rows_are_recognized(tmp_path: Path, small_recipe: Callable, pipeline: Callable) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 3))
    with pytest.raises(BadData, match="none of the 3 rows is usable.*look like Alpaca's: set dataset_format: alpaca"):
        pipeline(small_recipe(dataset=str(path)), "validate")


def test_alpaca_rows_become_conversations_when_the_recipe_says_so(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    rows: list[Any] = [{"instruction": f"Add {i}.", "input": "", "output": f"{i + 1}"} for i in range(30)]
    rows.append({"instruction": "Add them.", "input": "1, 2", "response": "3", "system": "Be brief."})
    rows.append(ROWS[0])
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    trail = pipeline(small_recipe(dataset=str(path), dataset_format="alpaca"), "standardize")
    messages = [
        json.loads(m) for m in pq.read_table(artifact(trail).local() / "messages.parquet")["messages"].to_pylist()
    ]
    assert messages[0] == [{"role": "user", "content": "Add 0."}, {"role": "assistant", "content": "1"}]
    assert [m["content"] for m in messages[30]] == ["Be brief.", "Add them.\n\n1, 2", "3"]
    assert artifact(trail, "validate").facts["refused"] == 1, "a ShareGPT row among them"


def test_real_alpaca_rows(material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable) -> None:
    recipe = small_recipe(dataset=str(material / "datasets" / "gpteacher_roleplay.json"), dataset_format="alpaca")
    facts = artifact(pipeline(recipe, "validate")).facts
    assert facts["rows"] == 1923
    assert facts["good"] + facts["refused"] + facts["copies"] == 1923
    assert facts["good"] > 1800


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1, 2", "cannot be read: not JSON"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], "cannot be read"),
        ("a.parquet", parquet(ROWS)[:-20], "no whole parquet file"),
        ("a.parquet", b"PAR1", "no whole parquet file"),
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
    with pytest.raises(Missing, match="field 'dataset': there is no file .*nowhere.jsonl"):
        pipeline(small_recipe(dataset=str(tmp_path / "nowhere.jsonl")), "download")
    with pytest.raises(Missing, match="field 'dataset': '.*' is neither a Hub id"):
        pipeline(small_recipe(dataset=str(tmp_path / "rows.xyz")), "download")
    with pytest.raises(Missing, match="field 'base_model': there is no model in"):
        pipeline(small_recipe(base_model=str(tmp_path / "nowhere")), "download")


def test_a_row_keeps_its_side_when_rows_are_added_or_moved(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def sides(rows: list[Any]) -> dict[str, bool]:
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(rows))
        table = pq.read_table(
            artifact(pipeline(small_recipe(dataset=str(path)), "standardize")).local() / "messages.parquet"
        )
        return {json.loads(row["messages"])[0]["content"]: row["holdout"] for row in table.to_pylist()}

    before = sides(ROWS)
    more = [conversation(f"Other {i}?", "Yes.") for i in range(40)]
    after = sides([*more, *reversed(ROWS)])
    assert {question: after[question] for question in before} == before
    assert set(before.values()) == {True, False}


def test_what_is_prepared_is_what_the_trainer_gets(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    rows = [*ROWS, conversation("A long one?", "word " * 400)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    found = artifact(pipeline(small_recipe(dataset=str(path)), "template"))
    assert found.facts["too_long"] == 1, "the long row is counted, not cut"
    train, holdout = (Dataset.from_file(str(found.local() / f"{side}.arrow")) for side in ("train", "holdout"))
    assert len(train) + len(holdout) == 40
    assert sum(map(len, train["input_ids"])) == found.facts["train"]["tokens"]
    assert max(map(len, train["input_ids"])) <= 256
    for row in train:
        assert len(row["input_ids"]) == len(row["labels"])
        assert row["input_ids"].count(0) == 1, "one beginning of text"
        assert [label for label in row["labels"] if label != -100][-1] == 4, "the end of the turn is trained"
    assert "»Answer" in (found.local() / "samples.txt").read_text()


def test_no_row_short_enough_says_how_long_they_are(small_recipe: Callable, pipeline: Callable) -> None:
    with pytest.raises(BadData, match="none has at most 16 tokens .the shortest row has"):
        pipeline(small_recipe(max_seq_length=16), "template")


def test_many_rows_are_encoded_by_several_processes_in_their_order(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, tiny_base: Path
) -> None:
    from include.chat import ChatFormat
    from include.recipe import check

    rows = [conversation(f"Q{i}?", f"A{i}.") for i in range(11_000)]  # three row groups
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    found = artifact(pipeline(small_recipe(dataset=str(path)), "template"))
    train, holdout = (Dataset.from_file(str(found.local() / f"{side}.arrow")) for side in ("train", "holdout"))
    assert sorted([*train["row"], *holdout["row"]]) == list(range(11_000))
    assert train["row"] == sorted(train["row"])
    chat = ChatFormat(tiny_base, check({"name": "x"}, "x"))
    chosen = train.select(range(0, len(train), 500))
    expected = chat.encode(
        [[{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": f"A{i}."}] for i in chosen["row"]]
    )
    assert list(zip(chosen["input_ids"], chosen["labels"], strict=True)) == list(expected.rows())


def test_too_long_conversations_are_dropped_split_or_truncated_and_counted(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    turns = [{"from": "system", "value": "Be brief."}]
    for i in range(12):
        turns += [
            {"from": "human", "value": f"Question {i}?"},
            {"from": "gpt", "value": f"Answer {i}. " + "word " * 20},
        ]
    lonely = conversation("Q?", "word " * 400)  # one exchange that no split makes short enough
    deaf = conversation("word " * 400, "A.")  # cut, it has no trained token left
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*ROWS, {"conversations": turns}, lonely, deaf]))
    found = {}
    for policy in ("drop", "split", "truncate"):
        recipe = small_recipe(dataset=str(path), on_too_long=policy, holdout_share=0.2)
        made = artifact(pipeline(recipe, "template"))
        rows = [
            *Dataset.from_file(str(made.local() / "train.arrow")),
            *Dataset.from_file(str(made.local() / "holdout.arrow")),
        ]
        assert made.facts["too_long"] == 3
        assert all(len(row["input_ids"]) <= 256 for row in rows)
        found[policy] = (made.facts["left_out"], [row for row in rows if row["row"] >= 40])
    assert found["drop"] == (3, [])

    left_out, pieces = found["split"]
    assert left_out == 2
    assert {row["row"] for row in pieces} == {40}
    assert len(pieces) > 1
    assert all([label for label in row["labels"] if label != -100][-1] == 4 for row in pieces), "whole turns"
    assert sum(label == 4 for row in pieces for label in row["labels"]) == 12, "every answer once"

    left_out, cut = found["truncate"]
    assert left_out == 1
    assert sorted((row["row"], len(row["input_ids"])) for row in cut) == [(40, 256), (41, 256)]
