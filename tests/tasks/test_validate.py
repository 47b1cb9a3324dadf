"""Rows are refused, repaired or used, each with its reason; formats of rows, limits, the profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.chat.tokenized import load_rows
from include.errors import BadData
from include.pipeline.contracts import CONTRACTS, CopiedRow
from include.reporting.pages import report_page
from tests.conftest import conversation
from tests.include.reporting.test_pages import summary
from tests.rows import ROWS, lines, listed, messages


def row(*turns: tuple[Any, Any], **more: Any) -> bytes:
    """Return a ShareGPT row of (speaker, text) turns."""
    return json.dumps({"conversations": [{"from": speaker, "value": text} for speaker, text in turns], **more}).encode()


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ASKED, TOLD = ("human", "a?"), ("gpt", "b.")
CALL, RESULT = ("function_call", '{"name": "f"}'), ("observation", '{"x": "y"}')
# rows that are refused, with a part of the reason
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
    "alien": (row(("alien", "a"), TOLD), "unknown role 'alien'"),
    "tool": (row(ASKED, CALL, RESULT, TOLD), "a tool role, which the chat template does not render"),
    "tools": (row(ASKED, TOLD, tools=[{"name": "f"}]), "lists tools, which the chat template does not render"),
    "no tool list": (row(ASKED, TOLD, tools="none"), "not a list of objects"),
    "tool_calls": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]}',
        "turn 2: tool_calls: a tool call has no function with a name",
    ),
    "None as value": (row(ASKED, ("gpt", None)), "turn 2: the value is not a text (null)"),
    "a number as value": (row(ASKED, ("gpt", 7)), "turn 2: the value is not a text (a number)"),
    "a list as value": (row(("human", ["a"]), TOLD), "turn 1: the value is a list with a text in it"),
    "no value": (
        b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}',
        "turn 1: the value is not a text (null)",
    ),
    "a picture": (row(ASKED, TOLD, images=["0.jpg"]), "an image, audio or video"),
    "a label": (row(ASKED, TOLD, label=False), "label says whether the answer was liked; set a method that takes it"),
    "a weight": (row(ASKED, TOLD, sample_weight=0.5), "a weight of its own"),
    "two system texts": (row(("system", "x"), ASKED, TOLD, system="y"), "two different system texts"),
    "functions": (row(ASKED, TOLD, functions=[{"name": "f"}]), "lists tools, which the chat template does not render"),
    "a call": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "function_call": '
        b'{"name": "f", "arguments": "{}"}}]}',
        "a turn calls tools, which the chat template does not render",
    ),
    "reasoning": (
        b'{"messages": [{"role": "user", "content": "a", "reasoning_content": "c"}, '
        b'{"role": "assistant", "content": "b"}]}',
        "the row has reasoning that cannot be used",
    ),
    "an empty value": (row(ASKED, ("gpt", "")), "text is empty"),
    "white space": (row(ASKED, ("gpt", " \n")), "text is empty"),
    "no assistant": (row(ASKED), "no assistant turn"),
    "same role twice": (row(ASKED, ASKED, TOLD), "do not alternate"),
    "system not first": (row(ASKED, TOLD, ("system", "x"), TOLD), "do not alternate"),
    "assistant first": (row(TOLD, ASKED, TOLD), "neither the system's nor the user's"),
    "ends with the system": (row(ASKED, TOLD, ("system", "x")), "the last turn is not the assistant's"),
    "a copy": (lines(ROWS[3:4]).strip(), "an exact copy of another row, which is used"),
}
# rows that are repaired (with the name of the repair) or used as they are (None), with the texts of their turns
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
    "a system column": (row(("human", "a1"), TOLD, system_prompt="s1"), None, "s1 a1 b."),
    "an empty system turn": (row(("system", ""), ("human", "a2"), TOLD), "empty system turn left out", "a2 b."),
    "a developer": (row(("developer", "s3"), ("human", "a3"), TOLD), "role alias", "s3 a3 b."),
    "text parts": (row(("human", [{"type": "text", "text": "a4"}]), TOLD), None, "a4 b."),
    "two columns": (
        b'{"conversations": [], "messages": [{"role": "user", "content": "a5"}, {"from": "gpt", "value": "d"}]}',
        None, "a5 d",
    ),
    "Python's text": (
        json.dumps({"conversations": "[{'from': 'human', 'value': 'a6'}, {'from': 'gpt', 'value': 'd'}]"}).encode(),
        "conversation was Python's text of a list", "a6 d",
    ),
    "null keys": (
        b'{"messages": [{"from": "human", "value": "a7", "role": null, "content": null}, '
        b'{"from": null, "value": null, "role": "assistant", "content": "d"}]}', None, "a7 d",
    ),
    "special tokens": (row(("human", "<|eot_id|>"), ("gpt", "s</s>")), None, "<|eot_id|> s</s>"),
    "NUL": (row(("human", "t\x00"), ("gpt", "u")), "NUL characters removed", "t u"),
    "U+FFFD": (row(("human", "v\ufffd"), ("gpt", "w")), None, "v\ufffd w"),
    "control characters": (row(("human", "x\x07"), ("gpt", "y")), None, "x\x07 y"),
}  # fmt: skip


def test_every_kind_of_row_is_refused_repaired_or_used_and_listed(
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
        assert any(reason in given for given in entry["reasons"]), (form, entry)
        assert entry["content"] == raw.decode("utf-8", "backslashreplace")
        assert entry.get("copy_of") == (3 if form == "a copy" else None), number
    assert (found.metadata.good, found.metadata.refused, found.metadata.copies) == (
        40 + len(USED), len(REFUSED) - 1, 1
    )  # fmt: skip
    kept, repaired = messages(artifact(lineage)), listed(found, "repaired.jsonl")
    assert sorted(kept) == [*range(40), *range(40 + len(REFUSED), 40 + len(REFUSED) + len(USED))]
    for number, (form, (raw, repair, text)) in enumerate(USED.items(), 40 + len(REFUSED)):
        assert " ".join(kept[number].contents) == text, form
        assert repaired.get(number, {}).get("repairs") == (repair and [repair]), form
        assert number not in repaired or repaired[number]["content"] == raw.decode()
    assert found.metadata.unused == {"turn key id": 1}
    counts = {check.check: check.rows for check in found.metadata.checks}
    assert [counts[n] for n in ("special_token_text", "broken_characters", "control_characters")] == [1, 1, 1]
    assert "sharegpt_rows" in (found.local() / "data_docs" / "index.html").read_text()


def test_tool_turns_and_tool_lists_are_kept_where_the_template_renders_them(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path, llama_base: Path
) -> None:
    path = tmp_path / "a.jsonl"
    rows = json.loads((material / "datasets" / "glaive_toolcall_en_demo.json").read_text())
    path.write_bytes(lines(rows))
    lineage = pipeline(small_recipe(dataset=str(path), base_model=str(llama_base), max_seq_length=20_000), "template")
    kept = messages(artifact(lineage, "standardize"))
    assert artifact(lineage, "validate").metadata.refused == 0
    assert sum("tool" in said.roles for said in kept.values()) > 100
    assert sum(said.tools is not None for said in kept.values()) > 100
    prepared = load_rows(artifact(lineage).files("train"))
    assert len(prepared) + len(load_rows(artifact(lineage).files("holdout"))) == len(kept)
    assert "Given the following functions" in (artifact(lineage).local() / "samples.txt").read_text()
    with pytest.raises(BadData, match="which the chat template does not render"):
        pipeline(small_recipe(dataset=str(path), chat_template="vicuna"), "validate")


def test_rows_whose_tool_calls_the_template_cannot_write_are_refused(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    called = [
        {"content": None, "tool_calls": [call]},
        {"content": None, "function_call": call["function"]},
        {"content": "Wait.", "tool_calls": [call]},  # Llama's template leaves the text out
        {"content": None, "tool_calls": [call, call]},  # Llama's template takes one call
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|eot_id|>"}}}]},
    ]
    rows = [
        {"messages": [user(f"Q{i}"), {"role": "assistant", **turn}, {"role": "tool", "content": "7"}, assistant("b")],
         "functions": [{"name": "f"}]}
        for i, turn in enumerate(called)
    ]  # fmt: skip
    # never written by the template itself, and still a special token of Llama
    rows += [{"messages": [user("Q9"), assistant("b")], "functions": [{"name": "f", "description": "<|python_tag|>"}]}]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(ROWS) + lines(rows))
    lineage = pipeline(small_recipe(dataset=str(path), max_refused_share=0.1), "standardize")
    refused = listed(artifact(lineage, "validate"), "quarantine.jsonl")
    reasons = {row: entry["reasons"] for row, entry in refused.items()}
    assert reasons.pop(45)[1] == "the list of tools contains <|python_tag|>, which would become a special token"
    assert list(reasons) == [42, 43, 44]
    assert {found[0] for found in reasons.values()} == {"the chat template cannot render the tool calls of a turn"}
    parts = ("does not write the turns user, assistant, tool, assistant once", "single tool-calls", "<|eot_id|>")
    assert all(part in found[1] for part, found in zip(parts, reasons.values(), strict=True))
    kept = messages(artifact(lineage))
    made = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert kept[40].messages[1] == kept[41].messages[1] == {"role": "assistant", "content": "", "tool_calls": [made]}
    assert kept[40].tools == '[{"name":"f"}]'


def test_what_is_not_used_is_named_in_log_metadata_and_report(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "id": i, **({"note": "x"} if i % 2 else {"source": None})} for i, row in enumerate(ROWS)]
    rows[3]["conversations"] = [{**turn, "name": "Anna"} for turn in rows[3]["conversations"]]
    rows[4] |= {f"extra{i}": 1 for i in range(10)}
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    caplog.set_level("INFO", "airflow.task.retune")
    found = artifact(pipeline(small_recipe(dataset=str(path)), "validate")).metadata
    assert [*found.unused.items()][:4] == [
        ("column id", 40), ("column note", 20), ("turn key name", 2), ("column extra0", 1)
    ]  # fmt: skip
    assert found.unused["turn key name"] == 2 and "column source" not in found.unused
    (line,) = [message for message in caplog.messages if "not used:" in message]
    assert "not used: column id (40), column note (20), turn key name (2), column extra0 (1)" in line and line.endswith(
        ", and 3 more"
    )
    reached = {"validate": {"state": "done", "seconds": 1.0, "reused": False, "folder": "here", "summary": "read"}}
    page = report_page(summary("failed", stages=reached), {**dict.fromkeys(CONTRACTS), "validate": found})
    assert "Not used: column id (40), column note (20), turn key name (2), column extra0 (1)" in page
    counts = {check.check: check.rows for check in found.checks}
    assert (counts["unused_columns"], counts["unknown_keys"]) == (40, 1)
    assert found.good == 40
    strict = small_recipe(dataset=str(path), check_limits={"unknown_keys": 0})
    with pytest.raises(BadData, match="a turn has keys that are not used"):
        pipeline(strict, "validate")


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
