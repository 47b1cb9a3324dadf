"""From a file to token ids: what is refused, what is kept, what is said when nothing can be used."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from include.chat.tokenized import load_rows
from include.data.sharegpt import Conversation, conversations_in
from include.data.tables import read_table
from include.errors import BadData, NotFound
from include.pipeline.contracts import CopiedRow
from tests.conftest import conversation

ROWS = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def messages(standardized: Any) -> dict[int, Conversation]:
    """The conversations that `standardize` left, by row."""
    found = {}
    for file in sorted((standardized.local() / "messages").iterdir()):
        table = read_table(file)
        found.update(zip(table["row"].to_pylist(), conversations_in(table), strict=True))
    return found


def listed(validated: Any, name: str) -> dict[int, dict[str, Any]]:
    """The entries of the quarantine, or of the list of repaired rows, by row."""
    entries = [json.loads(line) for line in (validated.local() / name).read_text().splitlines()]
    return {entry["row"]: entry for entry in entries}


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
    lineage = pipeline(small_recipe(dataset=str(tmp_path / name)), "standardize")
    assert [said.contents for said in messages(artifact(lineage)).values()] == [
        [turn["value"] for turn in row["conversations"]] for row in ROWS
    ]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server for the files of `tmp_path/web`."""
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


def row(*turns: tuple[Any, Any], **more: Any) -> bytes:
    """A ShareGPT row of (speaker, text) turns."""
    return json.dumps({"conversations": [{"from": who, "value": said} for who, said in turns], **more}).encode()


ASKED, TOLD = ("human", "a?"), ("gpt", "b.")
CALL, RESULT = ("function_call", '{"name": "f"}'), ("observation", '{"x": "y"}')
# every form of the table of bad inputs: what is said of it when it is refused
REFUSED = {
    "alpaca among ShareGPT": (b'{"instruction": "a", "input": "", "output": "b"}', "no conversations column"),
    "no JSON": (b"{cut", "not JSON"),
    "a number": (b"42", "not an object but int"),
    "Latin-1 bytes": (row(("human", "a"), TOLD).replace(b'"a"', b'"\xe9t\xe9"'), "not JSON"),
    "a lone surrogate": (rb'{"conversations": [{"from": "human", "value": "\ud800"}]}', "not JSON"),
    "null": (b'{"conversations": null}', "no conversations column"),
    "a text": (b'{"conversations": "plain"}', "is a text, not a list"),
    "another wrapper": (b'{"data": [{"from": "human", "value": "a"}]}', "no conversations column (it has: data)"),
    "empty": (row(), "the conversation is empty"),
    "texts as turns": (b'{"conversations": ["a", "b"]}', "not an object with a speaker"),
    "no speaker": (
        b'{"conversations": [{"value": "a"}, {"from": "gpt", "value": "b"}]}',
        "not an object with a speaker",
    ),
    "alien": (row(("alien", "a"), TOLD), "a role is 'alien'"),
    "tool": (row(ASKED, CALL, RESULT, TOLD), "a tool role, which the chat template does not render"),
    "tools": (row(ASKED, TOLD, tools=[{"name": "f"}]), "lists tools, which the chat template does not render"),
    "no tool list": (row(ASKED, TOLD, tools="none"), "not a list of objects"),
    "tool_calls": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        "under tool_calls",
    ),
    "None as value": (row(ASKED, ("gpt", None)), "turn 1 says null"),
    "a number as value": (row(ASKED, ("gpt", 7)), "turn 1 says 7"),
    "a list as value": (row(("human", ["a"]), TOLD), 'turn 0 says ["a"]'),
    "no value": (b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}', "turn 0 says null"),
    "an empty value": (row(ASKED, ("gpt", "")), "text is empty"),
    "white space": (row(ASKED, ("gpt", " \n")), "text is empty"),
    "no assistant": (row(ASKED), "no assistant turn"),
    "same role twice": (row(ASKED, ASKED, TOLD), "do not alternate"),
    "system not first": (row(ASKED, TOLD, ("system", "x"), TOLD), "do not alternate"),
    "assistant first": (row(TOLD, ASKED, TOLD), "neither the system's nor the user's"),
    "ends with the system": (row(ASKED, TOLD, ("system", "x")), "the last turn is not the assistant's"),
    "a copy": (lines(ROWS[3:4]).strip(), "an exact copy of an earlier row"),
}
# and of it when it is repaired (the repair's name), or used as it stands (None); with what is then said in the turns
USED = {
    "role/content": (
        b'{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}', None, "c d"
    ),
    "mixed keys": (
        b'{"conversations": [{"from": "human", "value": "e"}, {"role": "gpt", "content": "f"}]}', None, "e f"
    ),
    "aliases": (row(("Human ", "g"), ("chatgpt", "h"), ("USER", "i"), ("bing", "j")), "role alias", "g h i j"),
    "model": (row(ASKED, ("model", "k")), "role alias", "a? k"),
    "a trailing question": (row(("human", "l"), TOLD, ASKED), "last user turn without an answer removed", "l b."),
    "a JSON string": (
        json.dumps({"conversations": '[{"from": "human", "value": "m"}, {"from": "gpt", "value": "n"}]'}).encode(),
        "conversation was a JSON string", "m n",
    ),
    "a nested list": (
        b'{"conversations": [[{"from": "human", "value": "o"}, {"from": "gpt", "value": "p"}]]}',
        "conversation was nested in a list", "o p",
    ),
    "more keys": (
        b'{"conversations": [{"from": "human", "value": "q", "id": 1}, {"from": "gpt", "value": "r"}]}', None, "q r"
    ),
    "special tokens": (row(("human", "<|eot_id|>"), ("gpt", "s</s>")), None, "<|eot_id|> s</s>"),
    "NUL": (row(("human", "t\x00"), ("gpt", "u")), "NUL characters removed", "t u"),
    "U+FFFD": (row(("human", "v\ufffd"), ("gpt", "w")), None, "v\ufffd w"),
    "control characters": (row(("human", "x\x07"), ("gpt", "y")), None, "x\x07 y"),
}  # fmt: skip


def test_every_form_of_the_table_of_bad_inputs_is_refused_repaired_or_used_and_listed(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    raw = [*(raw for raw, _ in REFUSED.values()), *(raw for raw, _, _ in USED.values())]
    path.write_bytes(lines(ROWS) + b"\n".join(raw))
    lineage = pipeline(small_recipe(dataset=str(path), chat_template="vicuna", max_refused_share=0.6), "standardize")
    found = artifact(lineage, "validate")

    quarantine = listed(found, "quarantine.jsonl")
    assert list(quarantine) == list(range(40, 40 + len(REFUSED)))
    for (number, entry), (form, (raw, reason)) in zip(quarantine.items(), REFUSED.items(), strict=True):
        assert any(reason in said for said in entry["reasons"]), (form, entry)
        assert entry["content"] == raw.decode("utf-8", "backslashreplace")
        assert entry.get("copy_of") == (3 if form == "a copy" else None), number
    assert (found.metadata.good, found.metadata.refused, found.metadata.copies) == (
        40 + len(USED), len(REFUSED) - 1, 1
    )  # fmt: skip
    kept, repaired = messages(artifact(lineage)), listed(found, "repaired.jsonl")
    assert sorted(kept) == [*range(40), *range(40 + len(REFUSED), 40 + len(REFUSED) + len(USED))]
    for number, (form, (raw, repair, said)) in enumerate(USED.items(), 40 + len(REFUSED)):
        assert " ".join(kept[number].contents) == said, form
        assert repaired.get(number, {}).get("repairs") == (repair and [repair]), form
        assert number not in repaired or repaired[number]["content"] == raw.decode()
    counts = {check.check: check.rows for check in found.metadata.checks}
    assert [counts[n] for n in ("special_token_text", "broken_characters", "control_characters")] == [1, 1, 1]
    assert "sharegpt_rows" in (found.local() / "data_docs" / "index.html").read_text()


def test_tool_turns_and_tool_lists_are_kept_where_the_template_renders_them(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = json.loads((material / "datasets" / "glaive_toolcall_en_demo.json").read_text())
    path.write_bytes(lines(rows))
    lineage = pipeline(small_recipe(dataset=str(path), max_seq_length=20_000), "template")
    kept = messages(artifact(lineage, "standardize"))
    assert artifact(lineage, "validate").metadata.refused == 0
    assert sum("tool" in said.roles for said in kept.values()) > 100
    assert sum(said.tools is not None for said in kept.values()) > 100
    prepared = load_rows(artifact(lineage).local() / "train")
    assert len(prepared) + len(load_rows(artifact(lineage).local() / "holdout")) == len(kept)
    assert "Given the following functions" in (artifact(lineage).local() / "samples.txt").read_text()
    with pytest.raises(BadData, match="which the chat template does not render"):
        pipeline(small_recipe(dataset=str(path), chat_template="vicuna"), "validate")


def test_merged_turns_and_the_limit_of_a_single_check(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + row(ASKED, ("human", "and?"), TOLD) + b"\n" + row(("human", "<|x|>"), TOLD))
    found = artifact(pipeline(small_recipe(dataset=str(path), merge_turns=True), "validate"))
    assert (found.metadata.good, found.metadata.repairs) == (42, {"turns of one role merged": 1})
    strict = small_recipe(dataset=str(path), merge_turns=True, check_limits={"special_token_text": 0})
    with pytest.raises(BadData, match=r"looks like a special token .* row 41; check_limits allows .* 0.0%"):
        pipeline(strict, "validate")


def test_near_duplicates_are_listed_dropped_when_asked_and_never_train_beside_a_held_out_one(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def story(i: int, last: str) -> dict[str, Any]:
        words = random.Random(i).choices([f"word{k}" for k in range(200)], k=60)
        return conversation(f"Tell me story {i}: {' '.join(words)}", f"{' '.join(reversed(words))} {last}.")

    path = tmp_path / "a.jsonl"
    system = {"from": "system", "value": "You are the same long message in front of all of them. " * 20}
    rows = [story(i, last) for last in ("once", "twice") for i in range(60)]
    path.write_bytes(lines([{"conversations": [system, *row["conversations"]]} for row in rows]))
    made = {}
    for policy in ("report", "drop"):
        recipe = small_recipe(dataset=str(path), near_duplicates=policy, holdout_share=0.2)
        made[policy] = artifact(pipeline(recipe, "standardize"))
    kept = {policy: messages(artifact) for policy, artifact in made.items()}
    sides: dict[int, bool] = {}
    for file in (made["report"].local() / "messages").iterdir():
        sides.update(zip(read_table(file)["row"].to_pylist(), read_table(file)["holdout"].to_pylist(), strict=True))
    twins = [(i, i + 60) for i in range(60)]
    leaking = [pair for pair in twins if not all(number in sides for number in pair)]
    assert leaking, "some pair has one row on each side"
    for one, other in leaking:
        assert sides.get(one, sides.get(other)), "the held-out one of the two stays"
    assert made["report"].metadata.leaking == len(leaking)
    assert made["report"].metadata.near_duplicates == 60 - len(leaking)
    assert sorted(kept["drop"]) == sorted(set(sides) - {b for a, b in twins if a in sides and b in sides})
    pairs = [json.loads(line) for line in (made["report"].local() / "near_duplicates.jsonl").read_text().splitlines()]
    assert {(pair["nearly_equals"], pair["row"]) for pair in pairs if "nearly_equals" in pair} == set(twins) - set(
        leaking
    )


def test_rows_that_hold_a_benchmarks_prompt_do_not_train(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    (tmp_path / "benchmark.txt").write_text("Question 7?\nA prompt of which a row holds only eight words and no more\n")
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([*ROWS, conversation("X?", "Of which a ROW holds only eight words, yes.")]))
    recipe = small_recipe(dataset=str(path), decontaminate_against=str(tmp_path / "benchmark.txt"))
    made = artifact(pipeline(recipe, "standardize"))
    assert set(range(41)) - set(messages(made)) == {7, 40}
    assert made.metadata.contaminated == 2


def test_the_profile_tells_what_the_data_is_like(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    russian = conversation("Как дела?", "Всё хорошо, спасибо.")
    chinese = {
        "conversations": [{"from": "system", "value": "你好"}, *conversation("你是谁？", "我是模型。")["conversations"]]
    }
    path.write_bytes(lines([*ROWS, russian, chinese, ROWS[0], ROWS[0]]) + b"{cut")
    profile = artifact(pipeline(small_recipe(dataset=str(path)), "validate")).metadata.profile
    assert profile.turns == {"2": 41, "3": 1}
    assert profile.roles == {"user": 42, "assistant": 42, "system": 1}
    assert profile.scripts == {"Latin": 40, "Cyrillic": 1, "Han": 1}
    assert profile.top_duplicates == [CopiedRow(row=0, copies=2, begins="Question 0?")]
    assert sum(bar.rows for bar in profile.characters) == 42


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
    lineage = pipeline(small_recipe(dataset=str(path), dataset_format="alpaca"), "standardize")
    found = messages(artifact(lineage))
    assert found[0].messages == [{"role": "user", "content": "Add 0."}, {"role": "assistant", "content": "1"}]
    assert found[30].contents == ["Be brief.", "Add them.\n\n1, 2", "3"]
    assert artifact(lineage, "validate").metadata.refused == 1, "a ShareGPT row among them"


def test_real_alpaca_rows(material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable) -> None:
    recipe = small_recipe(dataset=str(material / "datasets" / "gpteacher_roleplay.json"), dataset_format="alpaca")
    facts = artifact(pipeline(recipe, "validate")).metadata
    assert facts.rows == 1923
    assert facts.good + facts.refused + facts.copies == 1923
    assert facts.good > 1800


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1, 2", "cannot be read: not JSON"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS))[:-20], "cannot be read"),
        ("a.parquet", parquet(ROWS)[:-20], "no whole parquet file"),
        ("a.parquet", b"PAR1", "no whole parquet file"),
        ("a.parquet", b"PAR1" + b"\xff" * 400 + parquet(ROWS)[404:], "no whole parquet file"),
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


def test_a_row_keeps_its_side_when_rows_are_added_or_moved(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def sides(rows: list[Any]) -> dict[str, bool]:
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(rows))
        made = artifact(pipeline(small_recipe(dataset=str(path)), "standardize"))
        held: list[bool] = []
        for file in sorted((made.local() / "messages").iterdir()):
            held += read_table(file)["holdout"].to_pylist()
        return {said.contents[0]: side for said, side in zip(messages(made).values(), held, strict=True)}

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
    assert found.metadata.too_long == 1, "the long row is counted, not cut"
    train, holdout = (load_rows(found.local() / side) for side in ("train", "holdout"))
    assert len(train) + len(holdout) == 40
    assert sum(map(len, train["input_ids"])) == found.metadata.train.tokens
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
    from include.chat.chat_format import ChatFormat
    from include.recipe import validate_recipe

    rows = [conversation(f"Q{i}?", f"A{i}.") for i in range(11_000)]  # three row groups
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    found = artifact(pipeline(small_recipe(dataset=str(path)), "template"))
    train, holdout = (load_rows(found.local() / side) for side in ("train", "holdout"))
    assert sorted([*train["row"], *holdout["row"]]) == list(range(11_000))
    assert train["row"] == sorted(train["row"])
    chat = ChatFormat.from_recipe(tiny_base, validate_recipe({"name": "x"}, "x"))
    chosen = train.select(range(0, len(train), 500))
    expected = chat.encode([Conversation(("user", "assistant"), [f"Q{i}?", f"A{i}."]) for i in chosen["row"]])
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
            *load_rows(made.local() / "train"),
            *load_rows(made.local() / "holdout"),
        ]
        assert made.metadata.too_long == 3
        assert all(len(row["input_ids"]) <= 256 for row in rows)
        found[policy] = (made.metadata.left_out, [row for row in rows if row["row"] >= 40])
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
