"""Rows and bases that once ended a run or trained wrongly: left out and listed, or refused before any training."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from include.engine.jobs import TrainJob
from include.errors import BadRecipe, NotFound, TooCostly
from include.paths import PROJECT
from include.pipeline.stage import pinned_recipe
from include.storage.artifacts import Store
from tests.conftest import conversation
from tests.rows import ROWS, lines, messages, prepared_rows
from tests.services.engine import log_of

BROKEN = "special tokens in the text of a turn break the form of the template (special_tokens_in_text: parse)"
IN_PART = "in part: an exchange that alone is longer than max_seq_length"


@pytest.mark.parametrize("base", ["llama", "stories"])
def test_prompt_and_answer_are_the_templates_ids_on_both_sides_of_every_pair(
    base: str,
    llama_base: Path,
    material: Path,
    small_recipe: Callable,
    pipeline: Callable,
    artifact: Callable,
    left_out: Callable,
) -> None:
    from transformers import AutoTokenizer

    file = next((material / "cases").glob("34-*")) / "dpo_leading_newline.jsonl"
    own = {"base_model": str(llama_base)}
    if base == "stories":
        own = {"base_model": str(material / "models" / "stories260K"), "chat_template": "vicuna"}
    made = artifact(pipeline(small_recipe(method="dpo", dataset=str(file), **own), "template"))
    tokenizer = AutoTokenizer.from_pretrained(made.local() / "tokenizer")
    pairs, rows = [json.loads(line) for line in file.open()], prepared_rows(made)
    assert len(rows) == len(pairs) == 81
    for row in rows:
        pair = pairs[row["row"]]
        for answer in ("chosen", "rejected"):
            turns = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]
            assert row["prompt_ids"] == tokenizer.apply_chat_template(
                turns[:1], add_generation_prompt=True, return_dict=False
            )
            whole = tokenizer.apply_chat_template(turns, return_dict=False)
            joined = row["prompt_ids"] + row[f"{answer}_ids"]
            assert joined == whole or (row["row"] == 80 and tokenizer.decode(joined) == tokenizer.decode(whole))
    assert left_out(made) == []


def test_an_exchange_that_alone_is_too_long_is_counted_and_listed(
    material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable
) -> None:
    file = next((material / "cases").glob("35-*")) / "split_middle.jsonl"
    recipe = small_recipe(dataset=str(file), on_too_long="split", near_duplicate_similarity=1.0)
    lineage = pipeline(recipe, "template")
    made, kept = artifact(lineage), messages(artifact(lineage, "standardize"))
    long = sorted(row for row, said in kept.items() if len(said.roles) == 6)
    assert len(long) > 20 and len(kept) - len(long) == 60
    assert left_out(made) == [{"row": row, "reasons": [IN_PART], "turn": 4} for row in long]
    found = made.metadata
    assert (found.too_long, found.left_out, found.left_out_reasons) == (len(long), 0, {IN_PART: len(long)})
    assert found.train.conversations + found.holdout.conversations == len(kept), "each long one counts once"
    assert found.train.rows + found.holdout.rows == len(kept) + len(long), "and is two pieces"


def test_every_row_that_does_not_train_is_listed_with_its_reason(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    long, deaf = conversation("Q?", "word " * 400), conversation("word " * 400, "A.")
    path.write_bytes(lines([*ROWS, long, deaf]))
    found = {}
    for policy in ("drop", "split", "truncate"):
        made = artifact(pipeline(small_recipe(dataset=str(path), on_too_long=policy), "template"))
        found[policy] = {entry["row"]: entry["reasons"] for entry in left_out(made)}
        assert all(entry["tokens"] > 256 for entry in left_out(made))
        assert sum(made.metadata.left_out_reasons.values()) == 2
        assert made.metadata.left_out == (1 if policy == "truncate" else 2)
    assert found["drop"] == found["split"] == {row: ["longer than max_seq_length"] for row in (40, 41)}
    assert found["truncate"] == {
        40: ["in part: truncated to max_seq_length"],
        41: ["truncated to max_seq_length, before the first trained token"],
    }


def test_parsed_special_tokens_that_break_the_template_refuse_their_rows_alone(
    llama_base: Path, material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable
) -> None:
    file = next((material / "cases").glob("41-*")) / "special.jsonl"
    recipe = small_recipe(dataset=str(file), base_model=str(llama_base), special_tokens_in_text="parse")
    made = artifact(pipeline(recipe, "template"))
    wrong = [i for i, line in enumerate(file.open()) if "<|begin_of_text|>" in line]
    assert len(wrong) == 3
    assert left_out(made) == [{"row": row, "reasons": [BROKEN], "turn": 1} for row in wrong]
    assert len(prepared_rows(made)) == 84
    assert all(not check.rows for check in made.metadata.checks), "the other rows keep the form"


def test_ids_beyond_the_embeddings_are_refused_with_both_numbers(
    material: Path, tmp_path: Path, small_recipe: Callable, pipeline: Callable
) -> None:
    base = next((material / "cases").glob("19-*")) / "s_vocab"
    recipe = small_recipe(base_model=str(base), chat_template="chatml")
    with pytest.raises(BadRecipe, match="gives the id 513, and the model has only 512 embeddings .ids 0 to 511."):
        pipeline(recipe, "template")
    pipeline(small_recipe(base_model=str(base), chat_template="vicuna"), "template")  # which writes none of them
    # an id of a row's text, which the template does not write
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    with pytest.raises(BadRecipe, match="and the model has only 400 embeddings"):
        pipeline(small_recipe(base_model=str(copy), chat_template="vicuna"), "template")


def test_special_tokens_that_were_never_trained_are_a_warning(
    material: Path,
    tiny_base: Path,
    small_recipe: Callable,
    pipeline: Callable,
    artifact: Callable,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    base = next((material / "cases").glob("20-*")) / "s_untrained"
    made = artifact(pipeline(small_recipe(base_model=str(base), chat_template="chatml"), "template"))
    assert made.metadata.untrained_special_tokens == ["<|im_start|>", "<|im_end|>"]
    assert "was never trained on <|im_start|>, <|im_end|>" in caplog.text
    assert artifact(pipeline(small_recipe(), "template")).metadata.untrained_special_tokens == []


@pytest.mark.parametrize(("case", "name"), [("19", "s_vocab"), ("20", "s_untrained")])
def test_tokens_without_an_embedding_or_without_training_can_be_trained(
    case: str, name: str, material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    base = next((material / "cases").glob(f"{case}-*")) / name
    fields = {"base_model": str(base), "chat_template": "chatml", "missing_special_tokens": "add"}
    made = artifact(pipeline(small_recipe(**fields), "template")).metadata
    assert made.new_special_tokens == {"<|im_start|>": 512, "<|im_end|>": 513}
    assert (made.base_embeddings, made.untrained_special_tokens) == (514, [])


def test_rows_longer_than_the_base_are_refused_and_a_longer_limit_is_a_warning(
    material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    long = next((material / "cases").glob("25-*")) / "long.jsonl"
    own = {"base_model": str(material / "models" / "stories260K"), "chat_template": "vicuna", "max_seq_length": 4096}
    own["holdout_share"] = 0.3
    with pytest.raises(
        BadRecipe, match="it is 4,096, and .* has only 512 positions .*; the longest row has [0-9,]+ tok"
    ):
        pipeline(small_recipe(dataset=str(long), **own), "template")
    caplog.clear()
    made = artifact(pipeline(small_recipe(**own), "template"))
    assert made.metadata.base_positions == 512
    assert "max_seq_length is 4,096" in caplog.text and "Set max_seq_length to 512 or less" in caplog.text
    caplog.clear()
    pipeline(small_recipe(dataset=str(long), **{**own, "max_seq_length": 512, "on_too_long": "truncate"}), "template")
    assert "positions" not in caplog.text


FAMILIES = {
    "10": ("qwen3", "plain"), "11": ("gemma3", "plain"), "12": ("mistral_v3", "plain"), "28": ("smollm2", "multi"),
    "29": ("gptoss", "multi"), "30": ("llama2", "plain"),
}  # fmt: skip


# trains in one process what would need one process for each
TRAIN_ALL = """
import sys
from pathlib import Path
from include.engine.jobs import TrainJob
from include.engine.train import train
for path in sys.argv[1:]:
    train(TrainJob.from_json(Path(path).read_bytes()), lambda *_, **__: None)
"""


@pytest.mark.engine
def test_the_families_own_templates_are_used_and_their_bases_train(
    material: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable, tmp_path: Path
) -> None:
    jobs = []
    for case, (base, data) in FAMILIES.items():
        folder = next((material / "cases").glob(f"{case}-*"))
        own = {"dataset": str(folder / f"{data}.jsonl"), "base_model": str(folder / base), "chat_template": "tokenizer"}
        recipe = small_recipe(**own, max_seq_length=512, holdout_share=0.4, max_steps=3)
        lineage = pipeline(recipe, "template")
        made = artifact(lineage)
        assert made.metadata.verified_rows == 24, case
        assert made.metadata.train.conversations + made.metadata.holdout.conversations == 24, case
        assert left_out(made) == [], case
        job = TrainJob(
            recipe=pinned_recipe(Store(), lineage), base=folder / base, base_name=base, base_revision=None,
            tokenizer=made.local() / "tokenizer", rows=made.files("train"), holdout=made.files("holdout"),
            out=tmp_path / case, run_name=case,
        )  # fmt: skip
        (tmp_path / f"{case}.json").write_bytes(job.to_json())
        jobs.append(str(tmp_path / f"{case}.json"))
    done = subprocess.run([sys.executable, "-c", TRAIN_ALL, *jobs], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for case in FAMILIES:
        losses = [entry["loss"] for entry in log_of(tmp_path / case)]
        assert len(losses) == 3, case
        assert losses[-1] < losses[0], case


def test_reasoning_is_trained_as_the_template_writes_it(
    material: Path, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    base = next((material / "cases").glob("10-*")) / "qwen3"
    turns = [
        {"role": "user", "content": "One {}?"}, {"role": "assistant", "content": "First.", "reasoning_content": "T1."},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "<think>T2.</think>Second."},
    ]  # fmt: skip
    file = tmp_path / "thoughts.jsonl"
    file.write_text("".join(json.dumps({"messages": turns}).replace("{}", str(i)) + "\n" for i in range(40)))
    own = {
        "dataset": str(file),
        "base_model": str(base),
        "chat_template": "tokenizer",
        "near_duplicate_similarity": 1.0,
        "holdout_share": 0.4,
    }

    def answers(**fields: Any) -> tuple[set[str], int]:
        made = artifact(pipeline(small_recipe(**own, **fields), "template"))
        texts = {part.split("«")[0] for sample in made.metadata.samples for part in sample.split("»")[1:]}
        return texts, made.metadata.train.rows // made.metadata.train.conversations

    thinking = "<think>\nT{0}.\n</think>\n\n"
    ends = {"First.<|im_end|>", "Second.<|im_end|>"}
    first, second = sorted(ends)
    # each answer in a sequence of its own, since the template removes the reasoning of earlier turns
    assert answers() == ({thinking.format(1) + first, thinking.format(2) + second}, 2)
    empty = "<think>\n\n</think>\n\n"
    assert answers(reasoning="drop") == ({empty + first, empty + second}, 2)
    # the prompt holds the empty thought already
    assert answers(reasoning="drop", chat_template_kwargs={"enable_thinking": False})[0] == ends


def test_a_row_with_markup_that_the_template_would_change_is_left_out(
    material: Path, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, left_out: Callable
) -> None:
    base = next((material / "cases").glob("10-*")) / "qwen3"
    rows = [conversation(f"Question {i}?", f"Answer {i}.") for i in range(40)]
    rows += [conversation("What does </think> mean?", "The end."), conversation("And now?", "A </think> B")]
    file = tmp_path / "markup.jsonl"
    file.write_bytes(lines(rows))
    own = {"dataset": str(file), "base_model": str(base), "holdout_share": 0.4, "near_duplicate_similarity": 1.0}
    made = artifact(pipeline(small_recipe(chat_template="tokenizer", **own), "template"))
    reason = "the text of a turn has markup of the chat template, which the template would change"
    assert left_out(made) == [{"row": 40, "reasons": [reason], "turn": 1}, {"row": 41, "reasons": [reason], "turn": 2}]
    # a template that does not look for it writes it as text
    own.pop("base_model")
    assert left_out(artifact(pipeline(small_recipe(**own), "template"))) == []


def test_a_changed_template_file_makes_new_artifacts_and_the_saved_tokenizer_holds_it(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    own, source = tmp_path / "own.jinja", (PROJECT / "include" / "templates" / "llama-3.jinja").read_text("utf-8")
    recipe = small_recipe(chat_template=str(own))

    def prepared() -> tuple[dict[str, str], bytes]:
        lineage = pipeline(recipe, "template")
        return lineage, (artifact(lineage).local() / "tokenizer" / "chat_template.jinja").read_bytes()

    own.write_text(source)
    first, saved = prepared()
    assert saved == own.read_bytes()
    assert prepared()[0] == first, "the same file, the same artifacts"
    own.write_text(source + "{# the same text #}")
    second, saved = prepared()
    assert saved == own.read_bytes()
    assert second["resolve"] != first["resolve"] and second["template"] != first["template"]
    assert second["validate"] == first["validate"], "neither of them writes tools"
    own.unlink()
    with pytest.raises(NotFound, match=r"the file .*own\.jinja cannot be read"):
        prepared()


def test_a_template_that_only_some_rows_make_endless_ends_the_stage(small_recipe: Callable, pipeline: Callable) -> None:
    source = (PROJECT / "include" / "templates" / "llama-3.jinja").read_text("utf-8")
    source += "{% if ' plus ' in messages[0].content %}{{ messages[0].content * 10**9 }}{% endif %}"
    with pytest.raises(TooCostly, match=r"chat_template\.jinja cannot be used: it needs too much memory"):
        pipeline(small_recipe(chat_template=source), "template")
