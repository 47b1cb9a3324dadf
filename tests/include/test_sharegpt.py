"""Reading ShareGPT rows as they are found in the wild."""

from __future__ import annotations

import json

import pytest

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
