"""What the rows of a table say, to compare them."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from include.data.row_texts import RowTexts
from include.data.sharegpt import parse_rows


def texts_of(*rows: dict[str, Any], pairs: bool = False) -> RowTexts:
    _, columns = parse_rows(list(map(orjson.dumps, rows)), alpaca=False, merge_turns=False, pairs=pairs)
    return RowTexts(pa.table(columns))


def pair(rejected: str) -> dict[str, Any]:
    return {"prompt": "What is two plus three?", "chosen": "It is five.", "rejected": rejected}


def call(city: str) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
    turns = [{"role": "user", "content": "How is it there?"}, {"role": "assistant", "tool_calls": calls}]
    return {"messages": turns}


def plain(system: str) -> dict[str, Any]:
    turns = [("system", system), ("user", "What is two plus three?"), ("assistant", "It is five.")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (pair("It is six."), pair("Who knows?"), True),
        (pair("It is six."), pair("It is six."), False),
        (call("Paris"), call("Oslo"), True),
        (call("Paris"), call("Paris"), False),
        (plain("Be short."), plain("Answer at length."), False),
    ],
)
def test_rows_are_compared_by_all_that_is_learned(one: dict[str, Any], other: dict[str, Any], differ: bool) -> None:
    texts = texts_of(one, other, pairs="chosen" in one)
    first, second = texts.digests_of_rows()
    assert (first != second) == differ
    words, counts = texts.words_of_rows()
    assert (not np.array_equal(*np.split(words, [counts[0]]))) == differ
