"""Flags of turns that say whether the loss counts a turn: read, refused by name, and kept beside the conversation."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from include.data.conversation import ParsedRow, conversations_in
from include.data.sharegpt import parse_row, parse_rows


def turns(*flags: dict[str, Any], first: dict[str, Any] | None = None) -> bytes:
    """A row of exchanges whose answers have these keys besides, and whose first question has those."""
    row = []
    for i, flag in enumerate(flags):
        row += [{"role": "user", "content": f"Q{i}", **((first or {}) if i == 0 else {})}]
        row += [{"role": "assistant", "content": f"A{i}", **flag}]
    return json.dumps({"messages": row}).encode()


def faults(parsed: ParsedRow) -> dict[str, int]:
    return {name: count for name, count in parsed.faults.items() if count}


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"training": False}, {"loss": False}, {"loss": 0}, {"weight": 0}, {"weight": 0.0},
             {"weight": False}, {"train": False, "weight": 0}],
)  # fmt: skip
def test_a_flag_masks_its_answer_alone(flag: dict[str, Any]) -> None:
    parsed = parse_row(turns(flag, {}, {next(iter(flag)): None}, first=flag))
    assert parsed.conversation.masked == (1,)
    assert faults(parsed) == {"masked_turns": 1}, "the flag of a question changes nothing, and no key is unknown"


@pytest.mark.parametrize("flag", [{"train": True}, {"weight": 1}, {"weight": 1.0}, {"loss": None}, {}])
def test_a_conversation_without_masks_keeps_the_digest_that_decides_its_side(flag: dict[str, Any]) -> None:
    plain, flagged = parse_row(turns({}, {})).conversation, parse_row(turns(flag, flag)).conversation
    assert flagged.masked == ()
    assert flagged.digest == plain.digest
    assert plain.digest.hex() == "a57638a4321d9334c9e55d4f4c551910", "as before there were masks"
    masked = [parse_row(row).conversation for row in (turns({"weight": 0}, {}), turns({}, {"weight": 0}))]
    assert len({plain.digest, *(conversation.digest for conversation in masked)}) == 3


@pytest.mark.parametrize(
    ("row", "fault", "detail"),
    [
        (turns({}, {"weight": 0.5}), "bad_train_flags", "turn 4: weight is 0.5; it can be true, false, 1 or 0"),
        (turns({"weight": 2}), "bad_train_flags", "turn 2: weight is 2;"),
        (turns({"train": "no"}), "bad_train_flags", 'turn 2: train is "no";'),
        (turns({"train": True, "weight": 0}), "bad_train_flags", "turn 2: train and weight contradict each other"),
        (turns({"train_detail": [{"train": False}]}), "bad_train_flags", "turn 2: train_detail is not supported"),
        (turns({}, first={"weight": 1}), "bad_train_flags", "turn 1: a turn of the role user cannot be trained on"),
        (turns({"loss": False}, {"weight": 0}), "all_masked", ""),
    ],
)
def test_what_cannot_be_followed_is_refused_by_the_turn(row: bytes, fault: str, detail: str) -> None:
    parsed = parse_row(row)
    assert parsed.faults[fault] == 1
    assert parsed.detail.startswith(detail)


def test_merged_turns_must_agree() -> None:
    def merged(*flags: dict[str, Any]) -> ParsedRow:
        answers = [{"from": "gpt", "value": f"A{i}", **flag} for i, flag in enumerate(flags)]
        row = [
            {"from": "human", "value": "Q"},
            *answers,
            {"from": "human", "value": "Q"},
            {"from": "gpt", "value": "A"},
        ]
        return parse_row(json.dumps(row).encode(), merge_turns=True)

    assert merged({"train": False}, {"weight": 0}).conversation.masked == (1,)
    assert not faults(merged({"train": True}, {}))
    for flags in ({"train": False}, {}), ({}, {"train": False}):
        parsed = merged(*flags)
        assert faults(parsed)["bad_train_flags"] == 1
        assert parsed.detail == "turn 3: merged with a turn that has another train flag"


def test_of_a_pair_the_last_answers_are_trained_on_or_the_row_is_refused() -> None:
    def pair(earlier: dict[str, Any], last: dict[str, Any]) -> ParsedRow:
        prompt = [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", **earlier},
            {"role": "user", "content": "R"},
        ]  # fmt: skip
        chosen, rejected = ({"role": "assistant", "content": text, **last} for text in ("yes", "no"))
        return parse_row(
            json.dumps({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}).encode(), pairs=True
        )

    plain = pair({}, {})
    for earlier in ({"weight": 0}, {"train": True}):
        assert not faults(pair(earlier, {"weight": 1}))
        assert pair(earlier, {}).conversation.digest == plain.conversation.digest
    assert faults(pair({}, {"train": False})) == {"all_masked": 1}


def test_masks_pass_through_the_columns() -> None:
    rows = [turns({"weight": 0}, {}, {"weight": 0}), turns({}), turns({}, {"train": False})]
    parsed, columns = parse_rows(rows, alpaca=False, merge_turns=False)
    found = list(conversations_in(pa.table(columns)))
    assert [conversation.masked for conversation in found] == [(1, 5), (), (3,)]
    assert found == [row.conversation for row in parsed]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": 3}], "turn 2: the value is not a text (a number)"),
        ([{"from": "human", "value": None}], "turn 1: the value is not a text (null)"),
        ([{"from": "human", "value": "Q"}, "A"], "turn 2: not an object but a text"),
        ([{"from": "human", "value": "Q"}, {"value": "A"}], "turn 2: no speaker"),
        ([{"from": "human", "value": "Q"}, {"from": "elf", "value": "A"}], "turn 2: unknown role 'elf'"),
        ([{"from": "human", "value": "Q"}, {"from": "gpt", "value": " "}], "turn 2: the text is empty"),
        ([{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}], "turn 1: assistant at the start"),
        ([{"from": "human", "value": "Q"}] * 2, "turn 2: user after user"),
        ([{"from": "gpt", "value": "A"}], "turn 1: assistant at the start"),
    ],
)
def test_reasons_name_the_turn(row: list[Any], detail: str) -> None:
    assert parse_row(json.dumps(row).encode()).detail == detail
