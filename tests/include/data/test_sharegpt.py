"""Reading ShareGPT rows as they are found in the wild."""

from __future__ import annotations

import json

import great_expectations  # noqa: F401  # once here, and not in the process of every suite
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from include.data.expectations import RAW_ROWS, Suite
from include.data.sharegpt import conversations_in, read, read_all
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
def test_good_rows_are_read_and_repairs_are_named(row: object, repairs: list[str]) -> None:
    reading = read(json.dumps(row).encode())
    assert reading.conversation.messages == MESSAGES
    assert reading.repairs == repairs
    assert not any(count for name, count in reading.features.items() if name != "unknown_keys")


@pytest.mark.parametrize(
    ("raw", "feature"),
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
        (b'{"conversations": [{"from": "human", "value": "a", "weight": 1}]}', "unknown_keys"),
        (b'{"conversations": [{"from": "human", "value": "a"}]}', "no_assistant"),
        (b'{"conversations": [{"from": "human", "value": "a"}]}', "last_speaker"),
        (b'{"conversations": [{"from": "gpt", "value": "a"}]}', "first_speaker"),
        (b'{"conversations": []}', "no_turns"),
        (b'{"conversations": [{"role": "assistant", "content": null, "tool_calls": [{"a": 1}]}]}', "tool_calls"),
        (b'{"conversations": [{"from": "human", "value": "a"}], "tools": [{"name": "f"}]}', "tool_lists"),
        (b'{"conversations": [{"from": "human", "value": "a"}], "tools": "no JSON"}', "bad_tool_lists"),
        (b'{"conversations": [{"from": "human", "value": "' + b"a" * 100_001 + b'"}]}', "long_turns"),
    ],
)
def test_what_is_wrong_with_a_row_shows_in_its_features(raw: bytes, feature: str) -> None:
    assert read(raw).features[feature]


TEXTS = st.one_of(
    st.text(max_size=30), st.none(), st.integers(), st.lists(st.text(max_size=5), max_size=2), st.booleans()
)
SPEAKERS = st.one_of(st.sampled_from(["human", "gpt", "system", "user", "assistant", "Human ", "tool", "alien"]), TEXTS)
TURNS = st.one_of(
    st.fixed_dictionaries({"from": SPEAKERS, "value": TEXTS}),
    st.fixed_dictionaries({"role": SPEAKERS, "content": TEXTS}, optional={"weight": st.integers()}),
    TEXTS,
    st.dictionaries(st.text(max_size=5), TEXTS, max_size=2),
)
DOCUMENTS = st.one_of(
    st.fixed_dictionaries({"conversations": st.lists(TURNS, max_size=6)}),
    st.fixed_dictionaries({"messages": st.one_of(st.lists(TURNS, max_size=4), TEXTS)}),
    st.dictionaries(st.sampled_from(["conversations", "instruction", "output", "id"]), TEXTS, max_size=3),
    st.lists(TURNS, max_size=3),
    TEXTS,
)
RAW = st.one_of(DOCUMENTS.map(lambda document: json.dumps(document).encode()), st.binary(max_size=60))


def test_signs_are_counted_in_the_row_where_they_stand() -> None:
    rows = [
        conversation("a", "b"),
        conversation("a\ufffd\ufffd", "<|x|>"),
        conversation("c", "d\x07"),
        {"conversations": []},
    ]
    readings, columns = read_all([json.dumps(row).encode() for row in rows], False, False)
    found = [
        [r.features[n] for n in ("broken_characters", "special_token_text", "control_characters")] for r in readings
    ]
    assert found == [[0, 0, 0], [2, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert list(conversations_in(pa.table(columns))) == [reading.conversation for reading in readings]


def test_turns_of_one_role_are_merged_when_asked() -> None:
    row = {"conversations": [GOOD[0], {"from": "human", "value": "there"}, GOOD[1]]}
    reading = read(json.dumps(row).encode(), merge=True)
    assert reading.conversation.contents == ["hi\n\nthere", "ho"]
    assert reading.repairs == ["turns of one role merged"]
    assert not any(reading.features.values())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(RAW, min_size=1, max_size=40), alpaca=st.booleans(), merge=st.booleans())
def test_any_row_is_accepted_or_refused_with_a_reason_and_none_raises(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], alpaca: bool, merge: bool
) -> None:
    readings, _ = read_all(rows, alpaca, merge)
    frame = pd.DataFrame([{"row": i, "copy": 0, **r.features} for i, r in enumerate(readings)])
    with Suite("rows", RAW_ROWS, {}, tmp_path_factory.mktemp("docs")) as suite:
        findings = suite.validate(frame)
    assert not findings.broken
    refused = {row for rule in RAW_ROWS if rule.severity == "critical" for row in findings.failed[rule.column].tolist()}
    for row, reading in enumerate(readings):
        roles = list(reading.conversation.roles)
        body = roles[1:] if roles[:1] == ["system"] else roles
        sound = (
            bool(body)
            and body == ["user", "assistant"] * (len(body) // 2)
            and all(isinstance(said, str) and said.strip() for said in reading.conversation.contents)
        )
        assert sound or row in refused, f"{rows[row]!r} was accepted"
