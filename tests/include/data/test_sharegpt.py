"""Parsing of ShareGPT rows as public datasets have them."""

from __future__ import annotations

import json
from pathlib import Path

import great_expectations  # noqa: F401  # imported once here, so that the process of the suite inherits it
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from include.data.columns import CONVERSATION_COLUMNS, TOOL_COLUMNS
from include.data.conversation import Conversation, ParsedRow, conversations_in
from include.data.expectations import RAW_ROWS, Suite
from include.data.sharegpt import parse_row, parse_rows
from include.data.turns import ROLES
from tests.conftest import conversation

GOOD = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "repairs"),
    [
        ({"conversations": GOOD}, []),
        ({"messages": MESSAGES}, []),
        (GOOD, []),
        ({"conversations": json.dumps(GOOD)}, ["conversation was a JSON string"]),
        ({"conversations": [GOOD]}, ["conversation was nested in a list"]),
        ({"conversations": [{"from": "Human ", "value": "hi"}, {"from": "chatgpt", "value": "ho"}]}, ["role alias"]),
        ({"conversations": [GOOD[0], {"role": "assistant", "content": "ho", "weight": 1}]}, []),
        ({"conversations": [*GOOD, {"from": "human", "value": "bye"}]}, ["last user turn without an answer removed"]),
        ({"conversations": [{"from": "human", "value": "h\x00i"}, GOOD[1]]}, ["NUL characters removed"]),
        ({"conversations": GOOD, "tools": "[]", "id": 7}, []),
    ],
)
def test_good_rows_are_parsed_and_repairs_are_named(row: object, repairs: list[str]) -> None:
    parsed = parse_row(json.dumps(row).encode())
    assert parsed.conversation.messages == MESSAGES
    assert parsed.repairs == repairs
    assert not any(count for name, count in parsed.faults.items() if name != "unused_columns")


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"{cut", "unreadable"),
        (b"42", "unreadable"),
        (b'{"instruction": "a", "output": "b"}', "unreadable"),
        (b'{"conversations": null}', "unreadable"),
        (b'{"conversations": "plain text"}', "unreadable"),
        (b'{"conversations": {"a": 1}}', "unreadable"),
        (b'{"conversations": [{"from": "human", "value": "\xff"}]}', "unreadable"),
        (rb'{"conversations": [{"from": "human", "value": "\ud800"}]}', "unreadable"),
        (b'{"conversations": ["hi", "ho"]}', "malformed_turns"),
        (b'{"conversations": [{"value": "hi"}]}', "malformed_turns"),
        (b'{"conversations": [{"from": "alien", "value": "hi"}]}', "unknown_roles"),
        (b'{"conversations": [{"from": "observation", "value": "hi"}]}', "tool_turns"),
        (b'{"conversations": [{"from": "human", "value": null}]}', "non_text_values"),
        (b'{"conversations": [{"from": "human", "value": 7}]}', "non_text_values"),
        (b'{"conversations": [{"from": "human", "value": " "}]}', "empty_values"),
        (b'{"conversations": [{"from": "gpt", "value": "hi"}]}', "order_errors"),
        (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}', "order_errors"),
        (b'{"conversations": [{"from": "human", "value": "a\xef\xbf\xbd"}]}', "broken_characters"),
        (rb'{"conversations": [{"from": "human", "value": "a\ufffd"}]}', "broken_characters"),
        (rb'{"conversations": [{"from": "human", "value": "a\u0007"}]}', "control_characters"),
        (b'{"conversations": [{"from": "human", "value": "a\x7f"}]}', "control_characters"),
        (b'{"conversations": [{"from": "human", "value": "<|eot_id|>"}]}', "special_token_text"),
        (rb'{"conversations": [{"from": "human", "value": "\u003c/s>"}]}', "special_token_text"),
        (
            b'{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "[INST]"}]}',
            "special_token_text",
        ),
        (b'{"conversations": [{"from": "human", "value": "a", "name": "b"}]}', "unknown_keys"),
        (b'{"conversations": [{"from": "human", "value": "a"}], "id": 1}', "unused_columns"),
        (b'{"conversations": [{"from": "human", "value": "a"}]}', "no_assistant"),
        (b'{"conversations": [{"from": "human", "value": "a"}]}', "last_speaker"),
        (b'{"conversations": [{"from": "gpt", "value": "a"}]}', "first_speaker"),
        (b'{"conversations": []}', "no_turns"),
        (b'{"conversations": [{"role": "assistant", "content": null, "tool_calls": [{"a": 1}]}]}', "bad_tool_calls"),
        (b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]}]}', "tool_calls"),
        (b'{"conversations": [{"from": "human", "value": "a"}], "tools": [{"name": "f"}]}', "tool_lists"),
        (b'{"conversations": [{"from": "human", "value": "a"}], "tools": "no JSON"}', "bad_tool_lists"),
        (b'{"conversations": [{"from": "human", "value": "' + b"a" * 100_001 + b'"}]}', "long_turns"),
    ],
)
def test_each_fault_is_counted(raw: bytes, fault: str) -> None:
    assert parse_row(raw).faults[fault]


TEXTS = st.text(max_size=12)
VALUES = st.one_of(TEXTS, st.none(), st.integers(), st.lists(TEXTS, max_size=2), st.booleans())
SPEAKERS = st.one_of(
    st.sampled_from(["human", "gpt", "system", "user", "assistant", "Human ", "tool", "alien"]), VALUES
)
GOOD_TURNS = st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(
    lambda exchanges: [
        {"from": speaker, "value": text}
        for exchange in exchanges
        for speaker, text in zip(("human", "gpt"), exchange, strict=True)
    ]
)
TURNS = st.one_of(
    st.fixed_dictionaries({"from": SPEAKERS, "value": VALUES}),
    st.fixed_dictionaries({"role": SPEAKERS, "content": VALUES}, optional={"weight": st.integers(0, 2)}),
    VALUES,
    st.dictionaries(st.text(max_size=5), VALUES, max_size=2),
)
DOCUMENTS = st.one_of(
    st.fixed_dictionaries({"conversations": GOOD_TURNS}),
    st.fixed_dictionaries({"conversations": st.lists(TURNS, max_size=5)}),
    st.fixed_dictionaries({"messages": st.one_of(st.lists(TURNS, max_size=4), VALUES)}),
    st.dictionaries(st.sampled_from(["conversations", "instruction", "output", "id", "tools"]), VALUES, max_size=3),
    st.lists(TURNS, max_size=3),
    VALUES,
)
RAW = st.one_of(DOCUMENTS.map(lambda document: json.dumps(document).encode()), st.binary(max_size=60))


def test_suspicious_text_is_counted_in_its_row() -> None:
    raw_rows = [
        conversation("a", "b"),
        conversation("a\ufffd\ufffd", "<|x|>"),
        conversation("c", "d\x07"),
        {"conversations": []},
    ]
    rows, columns = parse_rows([json.dumps(row).encode() for row in raw_rows], False, False)
    counts = [[r.faults[n] for n in ("broken_characters", "special_token_text", "control_characters")] for r in rows]
    assert counts == [[0, 0, 0], [2, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert list(conversations_in(pa.table(columns))) == [row.conversation for row in rows]


def test_turns_of_one_role_are_merged_when_asked() -> None:
    row = {"conversations": [GOOD[0], {"from": "human", "value": "there"}, GOOD[1]]}
    parsed = parse_row(json.dumps(row).encode(), merge_turns=True)
    assert parsed.conversation.contents == ["hi\n\nthere", "ho"]
    assert parsed.repairs == ["turns of one role merged"]
    assert not any(parsed.faults.values())


def test_any_row_is_accepted_or_refused_with_a_reason_and_none_raises(tmp_path: Path) -> None:
    critical = [rule.column for rule in RAW_ROWS if rule.severity == "critical"]
    parsed: list[ParsedRow] = []

    @settings(max_examples=600, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(raw_rows=st.lists(RAW, min_size=1, max_size=4), alpaca=st.booleans(), merge_turns=st.booleans())
    @example(raw_rows=[json.dumps({"conversations": GOOD}).encode()], alpaca=False, merge_turns=False)
    def parse(raw_rows: list[bytes], alpaca: bool, merge_turns: bool) -> None:
        rows, columns = parse_rows(raw_rows, alpaca, merge_turns)
        assert list(conversations_in(pa.table(columns))) == [row.conversation for row in rows]
        for raw, row in zip(raw_rows, rows, strict=True):
            assert is_sound(row.conversation) or any(row.faults[name] for name in critical), f"{raw!r} was accepted"
        parsed.extend(rows)

    parse()
    accepted = {i for i, row in enumerate(parsed) if not any(row.faults[name] for name in critical)}
    # how many more there are depends on hypothesis, which also draws constants of the imported modules
    assert len(accepted) >= 5, "good rows are among them"
    # the suite refuses these rows and no other, whatever the counts are
    frame = pd.DataFrame([{"row": i, "copy": 0, **row.faults} for i, row in enumerate(parsed)])
    with Suite("rows", RAW_ROWS, {}, tmp_path / "docs") as suite:
        result = suite.validate(frame)
    assert not result.errors
    refused = {row for name in critical for row in result.failed_rows[name].tolist()}
    assert refused == set(range(len(parsed))) - accepted
    for rule in RAW_ROWS:
        assert result.failed_rows[rule.column].tolist() == frame.index[frame[rule.column] > 0].tolist(), rule.column


COLUMNS = [
    "conversations", "messages", "conversation", "system", "system_prompt", "tools", "functions", "images", "image",
    "audio", "videos", "label", "kto_tag", "weight", "sample_weight", "train", "thinking", "reasoning_content",
    "history", "input", "instruction", "prompt", "chosen", "rejected", "response", "id", "source", "category", "Label",
]  # fmt: skip
KEYS = [
    "from", "value", "role", "content", "name", "id", "train", "weight", "loss", "loss_scale", "tool_calls",
    "function_call", "tool_call_id", "images", "image_url", "audio", "reasoning_content", "thinking", "tools",
]  # fmt: skip
CALLS = [{"name": "f", "arguments": "{}"}, [{"function": {"name": "f", "arguments": {"x": 1}}}], [{}]]
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url", "input_audio", "thinking", "tool_use", None])},
        optional={"text": TEXTS, "image_url": VALUES, "cache_control": VALUES, "thinking": TEXTS},
    ),
    max_size=2,
)
EXTRAS = st.one_of(VALUES, st.floats(allow_nan=False), st.sampled_from(CALLS), st.sampled_from(["x", "1", "[]"]), PARTS)
FORMS = {  # a plain row of each form, and the options that read it
    "sharegpt": ({"conversations": GOOD}, {}),
    "alpaca": ({"instruction": "hi", "output": "ho"}, {"alpaca": True}),
    "pair": ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, {"pairs": True}),
}


def says_nothing(value: object) -> bool:
    """Tell whether a value is empty, or a list of empty texts."""
    if isinstance(value, list):
        return all(
            isinstance(part, dict) and part.get("type") in ("text", None) and part.get("text") == "" for part in value
        )
    return value in (None, {}) or (isinstance(value, str) and not value.strip())


def is_reported(before: ParsedRow, after: ParsedRow, name: str, value: object) -> bool:
    """Return whether a value was honoured, or refused the row for a reason that names it, or was named as unused."""
    honoured = before.conversation != after.conversation
    new = [fault for fault in CRITICAL if after.faults[fault] > before.faults[fault]]
    refused = bool(new) and name.split()[-1] in after.detail
    return honoured or refused or name in after.unused


CRITICAL = [rule.column for rule in RAW_ROWS if rule.severity == "critical"]
SAYS_NOTHING = {  # values that ask for what is done anyway
    **dict.fromkeys(("weight", "sample_weight"), (1, "1")),
    "train": (True, 1),
    "loss": (True, 1),
}


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(form=st.sampled_from([*FORMS]), name=st.one_of(st.sampled_from(COLUMNS), st.text(max_size=5)), value=EXTRAS)
def test_every_column_is_honoured_refused_or_named(form: str, name: str, value: object) -> None:
    row, options = FORMS[form]
    if name in row:
        return
    before = parse_row(json.dumps(row).encode(), **options)
    after = parse_row(json.dumps({**row, name: value}).encode(), **options)
    is_list = name in (*CONVERSATION_COLUMNS, *TOOL_COLUMNS)
    if says_nothing(value) or (is_list and value == "[]"):
        assert before.conversation.contents == after.conversation.contents, "nothing is made of nothing"
    elif value not in SAYS_NOTHING.get(name, ()):
        assert is_reported(before, after, f"column {name}", value), (after.faults, after.detail, after.unused)


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(turn=st.integers(0, 1), name=st.one_of(st.sampled_from(KEYS), st.text(max_size=5)), value=EXTRAS)
def test_every_key_of_a_turn_is_honoured_refused_or_named(turn: int, name: str, value: object) -> None:
    before = parse_row(json.dumps({"conversations": GOOD}).encode())
    changed = [{**said, name: value} if i == turn else said for i, said in enumerate(GOOD)]
    after = parse_row(json.dumps({"conversations": changed}).encode())
    if value is None and name in ("from", "value"):
        assert any(after.faults[fault] for fault in CRITICAL)
    elif says_nothing(value) or (name == "tool_calls" and value == "[]"):
        assert before.conversation.contents == after.conversation.contents or name in ("from", "value")
    elif turn == 0 and name in ("train", "weight", "loss") and value in (0, False):
        assert after.conversation == before.conversation and not any(after.faults.values()), "no question is trained on"
    elif value not in SAYS_NOTHING.get(name, ()) and changed[turn] != GOOD[turn]:
        same = {"role": value, "content": value}  # of the same meaning as the key that is there
        same_role = name in ("role", "from") and ROLES.get(str(value).strip().lower()) == ("user", "assistant")[turn]
        if not same_role and same.get(name) != GOOD[turn]["value"]:
            assert is_reported(before, after, f"turn key {name}", value) or (
                name in ("from", "value", "role", "content") and any(after.faults[fault] for fault in CRITICAL)
            ), (after.faults, after.detail, after.unused)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(parts=PARTS)
def test_every_part_is_honoured_refused_or_named(parts: list[dict[str, object]]) -> None:
    parsed = parse_row(json.dumps({"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}).encode())
    if any(parsed.faults[fault] for fault in CRITICAL):
        assert parsed.detail.startswith("turn 1: ")
        return
    assert parsed.conversation.contents[0] == "".join(str(part["text"]) for part in parts).replace("\x00", "")
    keys = [key for part in parts for key, value in part.items() if key not in ("type", "text") and value is not None]
    assert sorted(parsed.unused) == sorted(f"part key {key}" for key in keys)
    assert "image_url" not in keys and "thinking" not in keys


def is_sound(conversation: Conversation) -> bool:
    """Tell independently of the rules whether a conversation can be trained on."""
    roles = list(conversation.roles)
    body = roles[1:] if roles[:1] == ["system"] else roles
    return (
        bool(body)
        and body == ["user", "assistant"] * (len(body) // 2)
        and all(isinstance(text, str) and text.strip() for text in conversation.contents)
    )
