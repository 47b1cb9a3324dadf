"""Reading ShareGPT rows as they are found in the wild."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from include.expectations import RAW_ROWS, validate
from include.sharegpt import read

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
    ],
)
def test_good_rows_are_read_and_repairs_are_named(row: object, repairs: list[str]) -> None:
    reading = read(json.dumps(row).encode())
    assert reading.messages == MESSAGES
    assert reading.repairs == repairs
    assert reading.features["problem"] is None
    assert not any(reading.features[name] for name in ("malformed_turns", "unknown_roles", "order_errors"))


@pytest.mark.parametrize(
    ("raw", "feature"),
    [
        (b"{cut", "problem"),
        (b"42", "problem"),
        (b'{"instruction": "a", "output": "b"}', "problem"),
        (b'{"conversations": null}', "problem"),
        (b'{"conversations": "plain text"}', "problem"),
        (b'{"conversations": {"a": 1}}', "problem"),
        (b'{"conversations": [{"from": "human", "value": "\xff"}]}', "problem"),
        (rb'{"conversations": [{"from": "human", "value": "\ud800"}]}', "problem"),
        (b'{"conversations": ["hi", "ho"]}', "malformed_turns"),
        (b'{"conversations": [{"value": "hi"}]}', "malformed_turns"),
        (b'{"conversations": [{"from": "alien", "value": "hi"}]}', "unknown_roles"),
        (b'{"conversations": [{"from": "observation", "value": "hi"}]}', "tool_roles"),
        (b'{"conversations": [{"from": "human", "value": null}]}', "non_text_values"),
        (b'{"conversations": [{"from": "human", "value": 7}]}', "non_text_values"),
        (b'{"conversations": [{"from": "human", "value": " "}]}', "empty_values"),
        (b'{"conversations": [{"from": "gpt", "value": "hi"}]}', "order_errors"),
        (b'{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}', "order_errors"),
        (b'{"conversations": [{"from": "human", "value": "a\xef\xbf\xbd"}]}', "broken_characters"),
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


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(RAW, min_size=1, max_size=40), alpaca=st.booleans())
def test_any_row_is_accepted_or_refused_with_a_reason_and_none_raises(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], alpaca: bool
) -> None:
    readings = [read(raw, alpaca) for raw in rows]
    frame = pd.DataFrame([{"row": i, "copy_of": None, **r.features} for i, r in enumerate(readings)])
    findings = validate(frame, RAW_ROWS, "rows", lambda rule: 0.0, tmp_path_factory.mktemp("docs"))
    assert not findings.broken
    for row, reading in enumerate(readings):
        refused = [rule for rule in findings.failed.get(row, []) if rule.severity == "critical"]
        roles = [message["role"] for message in reading.messages]
        body = roles[1:] if roles[:1] == ["system"] else roles
        sound = (
            bool(body)
            and body == ["user", "assistant"] * (len(body) // 2)
            and all(isinstance(message["content"], str) and message["content"].strip() for message in reading.messages)
        )
        assert sound or refused, f"{rows[row]!r} was accepted"
