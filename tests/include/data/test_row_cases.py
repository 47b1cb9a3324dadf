"""Small files of the wild, from the file to the conversation: what each was once misread, dropped or refused for."""

from __future__ import annotations

from pathlib import Path

import pytest

from include.data.conversation import Conversation, ParsedRow
from include.data.sharegpt import parse_rows
from include.data.sources import DatasetRef, read_rows

ANNA = ["What does Anna of house 0 make on day 0?", "Anna of house 0 makes bread on day 0, number 0."]
NEXT_DAY = ["What does Anna of house 0 make on day 1?", "Anna of house 0 makes bread on day 1, number 1."]
WRONG = "Wrong answer that must not be learned."
EXCHANGE = ("user", "assistant")


def parsed_file(path: Path, alpaca: bool = False) -> list[ParsedRow]:
    return parse_rows([*read_rows(DatasetRef(str(path)), print)], alpaca, False)[0]


@pytest.mark.parametrize(
    ("file", "rows", "first", "names"),
    [
        ("01-weight-per-turn/01_weight0.jsonl", 24,
         Conversation(EXCHANGE * 2, [ANNA[0], WRONG + ANNA[1], *NEXT_DAY], masked=(1,)), []),
        ("01-weight-per-turn/02_trainfalse.jsonl", 24,
         Conversation(EXCHANGE * 2, [ANNA[0], "BAD " + ANNA[1], *NEXT_DAY], masked=(1,)), []),
        ("01-weight-per-turn/02b_loss.jsonl", 24, Conversation(EXCHANGE * 2, [*ANNA, *NEXT_DAY], masked=(1,)), []),
        ("01-weight-per-turn/14b_weight.parquet", 24, Conversation(EXCHANGE * 2, [*ANNA, *NEXT_DAY], masked=(1,)), []),
        ("02-system-column/09_systemcol.jsonl", 24,
         Conversation(("system", *EXCHANGE), ["You speak only in the style of house 0.", *ANNA]), []),
        ("03-alpaca-history/20_history.jsonl", 24, Conversation(EXCHANGE * 2, [*ANNA, *NEXT_DAY]), []),
        ("05-functions-column/38_functions.jsonl", 24,
         Conversation(EXCHANGE, ANNA, tools='[{"name":"look","parameters":{}}]'), []),
        ("16-empty-system-turn/35_emptysystem.jsonl", 24, Conversation(EXCHANGE, ANNA), ["empty system turn left out"]),
        ("17-developer-role/17_developer.jsonl", 24,
         Conversation(("system", *EXCHANGE), ["You answer shortly.", *ANNA]), ["role alias"]),
        ("21-both-columns/46b_bothempty.jsonl", 24, Conversation(EXCHANGE, ANNA), []),
        ("32-python-repr-in-csv/13_repr.csv", 24, Conversation(EXCHANGE, ANNA),
         ["conversation was Python's text of a list", "column id"]),
        ("36-alpaca-forms/alpaca_empty_instruction.jsonl", 60,
         Conversation(EXCHANGE, ["What is 0 and 1?", "It is 0."]), []),
        ("36-alpaca-forms/alpaca_number_input.jsonl", 60,
         Conversation(EXCHANGE, ["Square this number.\n\n0", "0"]), []),
        ("37-mixed-keys-in-parquet/mixed_keys.jsonl", 60, Conversation(EXCHANGE, ["q0", "a0"]), []),
        ("37-mixed-keys-in-parquet/mixed_keys.parquet", 60, Conversation(EXCHANGE, ["q0", "a0"]), []),
        ("38-content-parts/content_parts_one.jsonl", 1, Conversation(EXCHANGE, ["hi", "Hello"]), []),
    ],
)  # fmt: skip
def test_each_row_is_read_as_its_author_meant_it(
    material: Path, file: str, rows: int, first: Conversation, names: list[str]
) -> None:
    found = parsed_file(material / "cases" / file, alpaca="alpaca" in file)
    assert len(found) == rows
    assert found[0].conversation == first
    for row in found:
        assert (row.conversation.roles, row.conversation.masked) == (first.roles, first.masked)
        assert not {name for name, count in row.faults.items() if count} - {
            "masked_turns", "tool_lists", "unused_columns", "special_token_text",
        }  # fmt: skip
        assert [*row.repairs, *row.unused] == names


@pytest.mark.parametrize(
    ("file", "fault", "detail"),
    [
        ("22-kto-label-false/kto.jsonl", "labels", "the column label"),
        ("23-image-column/mm.jsonl", "media", "the column images"),
    ],
)
def test_each_row_is_refused_for_what_training_cannot_follow(
    material: Path, file: str, fault: str, detail: str
) -> None:
    found = parsed_file(material / "cases" / file)
    assert len(found) == 24
    for row in found:
        assert {name for name, count in row.faults.items() if count} == {fault}
        assert row.detail == detail


def test_keys_that_parquet_fills_with_null_change_no_row(material: Path) -> None:
    folder = material / "cases" / "37-mixed-keys-in-parquet"
    lines, table = (parsed_file(folder / f"mixed_keys.{ending}") for ending in ("jsonl", "parquet"))
    assert [row.conversation for row in lines] == [row.conversation for row in table]


def test_reasoning_beside_the_answers_is_kept(material: Path) -> None:
    found = parsed_file(material / "cases" / "04-reasoning-content" / "07_reasoning.jsonl")
    assert len(found) == 24
    for row in found:
        assert row.conversation.thoughts
        assert {name for name, count in row.faults.items() if count} == {"reasoning_turns"}
