"""Prompts of a benchmark: read from the right column, found in the rows that contain them and in no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from include.data.decontamination import Benchmark, describe_prompts, read_prompts
from include.data.words import hash_words
from include.errors import BadData, NotFound
from tests.rows import lines, parquet

STORY = "The ship sailed at noon with a cargo of salt, and nobody on the quay saw the captain that day"
CHINESE = "请把下面这段关于城市公共汽车时刻表的说明改写成一封简短的信"


def found(prompts: list[str], *texts: str) -> list[int]:
    return Benchmark(prompts).find(*hash_words(pa.array(texts, pa.large_string()))).tolist()


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Name the capital of France!", 0),  # a short prompt is the whole text
        ("Please name the capital of France.", -1),  # and no part of a longer one
        ("The capital of France", -1),
        ("It SAILED at noon with a cargo of wheat", -1),  # seven words of the long prompt
        ("It SAILED at noon with a cargo of salt", 1),  # eight words of it
        ("Before that: " + STORY.upper(), 1),
        ("France of capital the name", -1),
        ("", -1),
        (f"以下：{CHINESE[5:21]}。", 3),  # sixteen characters in a row
        (f"以下：{CHINESE[5:20]}。", -1),
    ],
)
def test_a_text_contains_a_prompt_or_eight_words_of_one(text: str, prompt: int) -> None:
    prompts = ["Name the capital of France", STORY, "", CHINESE]
    assert found(prompts, "Hello.", text, "Bye.") == [-1, prompt, -1]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"category": "a label", "prompt": "P?", "question": "no"}, "P?"),
        ({"id": "x", "question": "Q?", "answer": "A"}, "Q?"),
        ({"instruction": "I", "input": "more", "output": "A"}, "I\n\nmore"),
        ({"instruction": "I", "input": "", "output": "A"}, "I"),
        ({"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]}, "First?"),
        ({"id": 1, "turns": [{"role": "system", "content": "S"}, {"role": "user", "content": "U?"}]}, "U?"),
        ({"source": "s", "messages": [{"role": "user", "content": "U?"}, {"role": "assistant", "content": "A"}]}, "U?"),
        ({"conversations": [{"from": "human", "value": "U?"}, {"from": "gpt", "value": "A"}]}, "U?"),
        ({"id": 1, "prompt": [{"role": "user", "content": "U?"}]}, "U?"),
    ],
)
def test_the_prompts_are_in_the_column_of_that_name(row: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    column = next(
        name for name in ("prompt", "question", "instruction", "turns", "messages", "conversations") if name in row
    )
    for name, content in (
        ("b.jsonl", lines([row])),
        ("b.json", json.dumps([row]).encode()),
        ("b.parquet", parquet([row])),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_prompts(str(tmp_path / name)) == (f"column {column}", [prompt])


def test_another_column_must_be_named_and_what_was_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(lines([{"label": "physics", "problem": "How far?"}, {"label": "x", "problem": None}]))
    with pytest.raises(
        BadData, match=r"no column of prompts .its columns: label, problem.. Name .* decontaminate_column"
    ):
        read_prompts(str(path))
    with pytest.raises(BadData, match=r"no column text .its columns: label, problem"):
        read_prompts(str(path), "text")
    place, prompts = read_prompts(str(path), "problem")
    assert prompts == ["How far?", ""], "the index of a prompt is its row"
    assert describe_prompts(str(path), place, prompts) == (
        'decontaminate_against: 1 prompt from the column problem of b.jsonl (rows without one: 1), first "How far?"'
    )
    (tmp_path / "b.csv").write_text("turns,id\n\"['How far?', 'And back?']\",1\n[now] Go!,2\n")
    assert read_prompts(str(tmp_path / "b.csv")) == ("column turns", ["How far?", "[now] Go!"])
    path.write_bytes(lines([{"prompt": 5}]))
    with pytest.raises(BadData, match="has no prompt in its column prompt"):
        read_prompts(str(path))
    (tmp_path / "b.txt").write_text("\ufeffOne?\n\n Two? \n")
    assert read_prompts(str(tmp_path / "b.txt")) == ("lines", ["One?", "Two?"])
    for missing in (str(tmp_path / "none.jsonl"), str(tmp_path / "none.txt"), "owner/name"):
        with pytest.raises(NotFound, match="field 'decontaminate_against': there is no file"):
            read_prompts(missing)
    path.write_bytes(lines([[{"role": "user", "content": "U?"}], [{"from": "human", "value": "V?"}]]))
    assert read_prompts(str(path)) == ("column conversations", ["U?", "V?"]), "rows that are lists of turns"
    path.write_bytes(json.dumps({"train": [{"prompt": "A?"}], "test": [{"prompt": "B?"}]}).encode())
    notes: list[str] = []
    assert read_prompts(str(path), note=notes.append) == ("column prompt", ["B?"])
    assert notes == ["the rows are the list 'test' of the file; not read: train (1 rows)"]
    path.write_bytes(json.dumps({"easy": [{"prompt": "A?"}], "hard": [{"prompt": "B?"}]}).encode())
    with pytest.raises(
        BadData, match="several lists of rows, easy, hard, .* Save the list of rows as a file of its own"
    ):
        read_prompts(str(path))
    path.write_bytes(b"not JSON\n")
    with pytest.raises(BadData, match="field 'decontaminate_against': .* cannot be read"):
        read_prompts(str(path))
