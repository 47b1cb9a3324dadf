"""The side of each row, near-duplicates, rows that hold a benchmark's prompt, and the list of rows left out."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from upath import UPath

from include.data.tables import read_table
from include.errors import BadData, BadRecipe, Conflict, NotFound
from tasks.download import download
from tasks.report import report
from tests.conftest import conversation
from tests.rows import ROWS, csv, lines, listed, messages
from tests.services.hub import Hub


def sides(standardized: Any) -> dict[int, bool]:
    """Return for each row that is used whether it is held out."""
    found: dict[int, bool] = {}
    for file in sorted((standardized.local() / "messages").iterdir()):
        table = read_table(file)
        found.update(zip(table["row"].to_pylist(), table["holdout"].to_pylist(), strict=True))
    return found


def entries(standardized: Any, name: str = "left_out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (standardized.local() / name).read_text().splitlines()]


def story(i: int, last: str = "once") -> dict[str, Any]:
    words = random.Random(i).choices([f"word{k}" for k in range(200)], k=60)
    return conversation(f"Tell me story {i}: {' '.join(words)}", f"{' '.join(reversed(words))} {last}.")


def test_near_duplicates_are_on_one_side_and_listed_and_dropped_when_asked(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    system = {"from": "system", "value": "You are the same long message in front of all of them. " * 20}
    rows = [story(i, last) for last in ("once", "twice") for i in range(60)]
    path.write_bytes(lines([{"conversations": [system, *row["conversations"]]} for row in rows]))
    made = {}
    for policy in ("report", "drop"):
        recipe = small_recipe(dataset=str(path), near_duplicates=policy, holdout_share=0.2)
        made[policy] = artifact(pipeline(recipe, "standardize"))
    found = sides(made["report"])
    assert len(found) == 120, "no row is lost"
    assert all(found[i] == found[i + 60] for i in range(60)), "no pair has a row on each side"
    assert sides(made["drop"]) == {i: found[i] for i in range(60)}, "the first row of each pair stays on its side"
    assert 0 < sum(found.values()) < 60
    pairs = entries(made["report"], "near_duplicates.jsonl")
    assert [(pair["row"], pair["nearly_equals"]) for pair in pairs] == [(i + 60, i) for i in range(60)]
    assert all(0.9 < pair["similarity"] < 1 for pair in pairs)
    assert entries(made["report"]) == [] and made["report"].metadata.left_out_reasons == {}
    assert entries(made["drop"]) == [
        {"row": i + 60, "reasons": [f"near-duplicate of the row {i}, similarity {int(pair['similarity'] * 100) / 100}"]}
        for i, pair in enumerate(pairs)
    ]
    for artifact_, dropped in ((made["report"], 0), (made["drop"], 60)):
        metadata = artifact_.metadata
        assert (metadata.near_duplicates, metadata.dropped, metadata.leaking) == (60, dropped, 0)
        assert sum(metadata.left_out_reasons.values()) == dropped == 120 - metadata.train - metadata.holdout
    assert made["drop"].metadata.left_out_reasons == {"near-duplicate of another row": 60}
    assert "60 left out: near-duplicate of another row (60)" in made["drop"].manifest["summary"]
    page = UPath(report("small", "test")["report"]).read_text()
    assert "near-duplicate of another row (60)" in page
    assert f"<code>{made['drop'].folder}/left_out.jsonl</code>" in page


def test_of_a_group_the_first_row_that_can_be_used_stays(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    words = [f"word{i}" for i in range(60)]
    begins, ends = ["other"] * 4 + words[4:], words[:56] + ["other"] * 4
    path, evaluation = tmp_path / "a.jsonl", tmp_path / "eval.jsonl"
    like = [conversation(" ".join(text), "Yes.") for text in (words, ends, [*ends[:-1], "another"])]
    path.write_bytes(lines([*like, *(story(i) for i in range(20))]))
    evaluation.write_bytes(lines([conversation(" ".join(begins), "Yes."), *(story(i) for i in range(30, 40))]))
    fields = {"holdout_share": 0, "near_duplicates": "drop"}
    made = artifact(pipeline(small_recipe(dataset=str(path), eval_dataset=str(evaluation), **fields), "standardize"))
    assert {row: reason for entry in entries(made) for row, reason in [(entry["row"], entry["reasons"][0][:40])]} == {
        0: "near-duplicate of the held-out row 23, s", 2: "near-duplicate of the row 1, similarity "
    }  # fmt: skip
    assert 1 in sides(made), "the first row of its group is not used, and nothing like it is held out"


def test_similarity_1_links_equal_texts_only(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path = tmp_path / "a.jsonl"
    equal = {"conversations": [{"from": "system", "value": "Be brief."}, *story(3)["conversations"]]}
    louder = conversation(*(turn["value"].upper() for turn in story(4)["conversations"]))
    again = conversation("Is 3 < 4? Is 3 < 4? Is 3 < 4?", "yes")
    fewer = conversation("Is 3 < 4? Is 3 < 4?", "yes")
    path.write_bytes(lines([*(story(i) for i in range(60)), equal, louder, story(5, "twice"), again, fewer]))
    pairs = {}
    for similarity in (1, 0.99):
        recipe = small_recipe(dataset=str(path), near_duplicate_similarity=similarity, holdout_share=0.2)
        found = entries(artifact(pipeline(recipe, "standardize")), "near_duplicates.jsonl")
        pairs[similarity] = [(pair["row"], pair["nearly_equals"], pair["similarity"]) for pair in found]
    assert pairs[1] == [(60, 3, 1.0)]
    assert pairs[0.99] == [(60, 3, 1.0), (61, 4, 1.0), (64, 63, 1.0)]


def test_different_rows_of_one_manner_are_all_used(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path
) -> None:
    for name in ("korean", "english_same"):
        path = material / "cases" / "40-near-duplicates-outside-latin" / f"{name}.jsonl"
        made = artifact(pipeline(small_recipe(dataset=str(path), near_duplicates="drop"), "standardize")).metadata
        assert (made.near_duplicates, made.dropped, made.train + made.holdout) == (0, 0, 225)


def test_rows_that_hold_a_benchmarks_prompt_do_not_train(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    benchmark = tmp_path / "benchmark.jsonl"
    prompts = [
        "Question 7?",
        "A prompt of which a row holds only eight words and no more",
        "Never asked by anybody here",
    ]
    benchmark.write_bytes(lines([{"category": "answer", "turns": [p, "Answer 8."]} for p in prompts]))
    path = tmp_path / "a.jsonl"
    planted = "Of which a ROW holds only eight words, yes."
    system = {"from": "system", "value": f"Example: {planted}"}
    path.write_bytes(
        lines([
            *ROWS, conversation("X?", planted), {"conversations": [system, *conversation("Y?", "Z.")["conversations"]]},
            conversation("Y?", "Question 7? That is no answer."),
        ])
    )  # fmt: skip
    recipe = small_recipe(dataset=str(path), decontaminate_against=str(benchmark))
    with caplog.at_level(logging.INFO):
        made = artifact(pipeline(recipe, "standardize"))
    assert set(range(43)) - set(messages(made)) == {7, 40, 41}
    assert entries(made) == [
        {"row": row, "reasons": [f"contains the prompt {prompt} of benchmark.jsonl"]}
        for row, prompt in ((7, 0), (40, 1), (41, 1))
    ]
    assert made.metadata.contaminated == 3
    assert made.metadata.left_out_reasons == {"contains a benchmark's prompt": 3}
    log = 'decontaminate_against: 3 prompts from the column turns of benchmark.jsonl, first "Question 7?"; "A prompt'
    assert log in caplog.text
    recipe = small_recipe(dataset=str(path), decontaminate_against=str(benchmark), decontaminate_column="category")
    assert artifact(pipeline(recipe, "standardize")).metadata.contaminated == 0
    benchmark.write_bytes(lines([{"category": "writing", "text": "Question 7?"}]))
    with pytest.raises(BadData, match="its columns: category, text"):
        pipeline(small_recipe(dataset=str(path), decontaminate_against=str(benchmark)), "standardize")


def test_prompts_of_mt_bench_are_read_from_their_column_and_not_from_the_label(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path
) -> None:
    case = material / "cases" / "33-decontaminate-wrong-column"
    recipe = small_recipe(dataset=str(case / "rows.jsonl"), decontaminate_against=str(case / "benchmark.jsonl"))
    made = artifact(pipeline(recipe, "standardize"))
    assert sorted(sides(made)) == list(range(60)), "the innocent rows, some with the word writing, are used"
    assert entries(made) == [
        {"row": row, "reasons": [f"contains the prompt {prompt} of benchmark.jsonl"]}
        for row, prompt in ((60, 0), (61, 2), (62, 1))
    ], "row 62 has the prompt in its system turn"
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    recipe = small_recipe(dataset=str(case / "rows.jsonl"), decontaminate_against=str(folder))
    for index, line in enumerate((case / "benchmark.jsonl").read_bytes().splitlines()[:2]):
        (folder / f"{index}.jsonl").write_bytes(line)
        made = artifact(pipeline(recipe, "standardize"))
        assert [entry["row"] for entry in entries(made)] == [[60], [60, 62]][index], "also after a new file"
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([story(i) for i in range(20)]))
    asked = {"eval_dataset": str(case / "rows.jsonl"), "decontaminate_against": str(case / "benchmark.jsonl")}
    made = artifact(pipeline(small_recipe(dataset=str(path), holdout_share=0, **asked), "standardize"))
    assert sides(made) == {row: row >= 20 for row in range(83)}, "rows to evaluate on may have the prompts"


def test_too_few_held_out_rows_are_said_with_the_share_that_is_enough(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path
) -> None:
    small = material / "cases" / "31-too-few-held-out" / "r60.jsonl"
    with pytest.raises(BadData, match=r"too few held-out rows: \d of 60 at holdout_share=0.05, and the gate needs 6 "):
        pipeline(small_recipe(dataset=str(small), holdout_share=0.05), "standardize")
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines([story(i) for i in range(60)]))
    message = (
        r"too few held-out rows: \d of 60 at holdout_share=0.02, and the gate needs 6 at gate_confidence=0.95. "
        r"Set holdout_share to at least 0\.\d+, or use more rows"
    )
    with pytest.raises(BadData, match=message) as caught:
        pipeline(small_recipe(dataset=str(path), holdout_share=0.02), "standardize")
    share = float(str(caught.value).split("at least ")[1].split(",")[0])
    made = artifact(pipeline(small_recipe(dataset=str(path), holdout_share=share), "standardize"))
    assert made.metadata.holdout >= 6
    with pytest.raises(BadData, match="too few held-out rows"):
        pipeline(small_recipe(dataset=str(path), holdout_share=share - 0.01), "standardize")
    # held-out rows that are too long are left out later, and that is said before any training
    short = [conversation(f"{i}?", f"{i}!") for i in range(30)]
    path.write_bytes(lines([story(i) if i % 4 else short[i // 2] for i in range(60)]))
    recipe = small_recipe(dataset=str(path), holdout_share=0.2, max_seq_length=200)
    with pytest.raises(
        BadData, match="too few held-out rows: . are left, and the gate needs 6. Hold out more rows, or raise max"
    ):
        pipeline(recipe, "train")
    asked, turns = tmp_path / "asked.jsonl", [conversation(f"{i}?", f"{i}! " * 5)["conversations"] for i in range(30)]
    asked.write_bytes(
        lines([{"conversations": [turn for pair in turns for turn in pair]}, *(story(i) for i in range(60, 65))])
    )
    fields = {"holdout_share": 0, "max_seq_length": 200, "on_too_long": "split"}
    recipe = small_recipe(dataset=str(path), eval_dataset=str(asked), **fields)
    assert artifact(pipeline(recipe, "template")).metadata.holdout.rows >= 6, "pieces of one conversation"
    with pytest.raises(BadData, match="too few held-out rows: 1 are left, and the gate needs 6"):
        pipeline(recipe, "train")
    path.write_bytes(lines([story(i) for i in range(60)]))
    # the gate needs more rows for each candidate of a sweep: 0.975 instead of 0.95
    sweep = {"r": [4, 8], "lora_alpha": [4, 8]}
    with pytest.raises(BadData, match="the gate needs 8 at gate_confidence=0.95 for each of 4 candidates"):
        pipeline(small_recipe(dataset=str(path), holdout_share=0.02, sweep=sweep), "standardize")
    with pytest.raises(BadData, match="the gate needs 6 held-out rows .* Raise max_holdout_rows to at least 6"):
        pipeline(small_recipe(dataset=str(path), max_holdout_rows=5), "standardize")
    path.write_bytes(lines([story(1, f"time {i}") for i in range(60)]))
    with pytest.raises(BadData, match="too few held-out rows: 0 of 60 .* raise near_duplicate_similarity"):
        pipeline(small_recipe(dataset=str(path)), "standardize")


def test_the_rows_of_an_evaluation_dataset_are_the_holdout(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path, evaluation = tmp_path / "a.jsonl", tmp_path / "eval.jsonl"
    path.write_bytes(lines([story(i) for i in range(40)] + [story(7, "twice")]))
    asked = [story(100 + i) for i in range(10)] + [story(3), story(5, "twice"), {"items": []}, story(100)]
    evaluation.write_bytes(lines(asked))
    fields = {"dataset": str(path), "holdout_share": 0.05, "eval_dataset": str(evaluation), "max_refused_share": 0.1}
    lineage = pipeline(small_recipe(**fields), "standardize")
    downloaded, validated, made = (artifact(lineage, name) for name in ("download", "validate", "standardize"))
    assert (downloaded.metadata.rows, downloaded.metadata.eval_rows) == (55, 14)
    assert downloaded.manifest["summary"] == "41 rows, and 14 to evaluate on"
    refused = listed(validated, "quarantine.jsonl")
    assert {row: entry.get("copy_of") for row, entry in refused.items()} == {3: 51, 53: None, 54: 41}, (
        "a training row that equals an evaluation row is the copy; rows to evaluate on are checked, too"
    )
    assert entries(made) == [{"row": 5, "reasons": ["near-duplicate of the held-out row 52, similarity 0.98"]}]
    used = sides(made)
    assert used == {row: row >= 41 for row in range(55) if row not in (3, 5, 53, 54)}
    assert (made.metadata.leaking, made.metadata.near_duplicates) == (1, 1)
    assert entries(made, "near_duplicates.jsonl")[-1] == {"row": 40, "nearly_equals": 7, "similarity": 0.9839}

    few = artifact(pipeline(small_recipe(**fields, max_rows=8), "download")).metadata
    assert (few.rows, few.eval_rows) == (8 + 14, 14), "max_rows is about the rows to train on"
    assert pipeline(small_recipe(**fields), "standardize") == lineage
    pinned = json.loads((artifact(lineage, "resolve").local() / "recipe.json").read_text())
    assert pinned["eval_dataset"] == str(evaluation) and pinned["eval_revision"]
    evaluation.write_bytes(lines(asked[:10]))
    assert pipeline(small_recipe(**fields), "download")["download"] != lineage["download"], "it is pinned"
    evaluation.write_bytes(lines(asked[:11]))
    resolved = pipeline(small_recipe(**fields), "resolve")
    evaluation.write_bytes(lines(asked[:5]))
    with pytest.raises(Conflict, match="field 'eval_dataset': .* has changed"):
        download(resolved)
    with pytest.raises(BadData, match="too few held-out rows: 5 of 46, .* Use a larger evaluation dataset"):
        pipeline(small_recipe(**fields), "standardize")
    evaluation.write_bytes(lines([{"instruction": f"Count to {i}.", "output": "No."} for i in range(14)]))
    with pytest.raises(BadData, match="too few held-out rows: 0 of .* or correct its rows in quarantine"):
        pipeline(small_recipe(**(fields | {"max_refused_share": 0.5})), "standardize")
    evaluation.write_bytes(lines([story(i, "twice") for i in range(30)]))
    with pytest.raises(BadData, match="30 of 40 rows are near-duplicates of rows of the evaluation dataset"):
        pipeline(small_recipe(**fields), "standardize")
    evaluation.write_bytes(b"")
    with pytest.raises(BadData, match="field 'eval_dataset': .* holds no rows"):
        pipeline(small_recipe(**fields), "download")


def test_another_split_of_a_hub_dataset_is_the_holdout(
    small_recipe: Callable, retune: Callable, artifact: Callable, tmp_path: Path
) -> None:
    with Hub() as hub:
        sha = hub.put(
            "owner/rows",
            {
                "data/train.jsonl": lines([story(i) for i in range(30)]),
                "data/validation.jsonl": lines([story(100 + i) for i in range(10)]),
            },
            kind="dataset",
        )
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        recipe = small_recipe(dataset="owner/rows", eval_split="validation", holdout_share=0)
        done = retune("stage", "small", "--until", "standardize", RETUNE_RECIPES=str(recipe), **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "30 rows to train on, 10 held out" in done.stdout + done.stderr
        recipe = small_recipe(dataset="owner/rows", eval_dataset="owner/rows", holdout_share=0)
        done = retune("stage", "small", "--until", "download", RETUNE_RECIPES=str(recipe), **environment)
        missing = "field 'eval_split': the dataset owner/rows has no split 'test'. Choose one of: train, validation"
        assert missing in done.stdout + done.stderr
        assert f"evaluated on owner/rows@{sha[:8]}" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"eval_dataset": "nowhere.jsonl", "holdout_share": 0.05}, NotFound, "field 'eval_dataset': there is no file"),
        ({"eval_dataset": "a.jsonl"}, BadRecipe, "holdout_share is set together with eval_dataset or eval_split"),
        (
            {"eval_dataset": ["a.jsonl", "owner/rows"], "holdout_share": 0},
            BadRecipe,
            "field 'eval_dataset': the list has 'owner/rows'",
        ),
        ({"eval_revision": "main"}, BadRecipe, "eval_revision is a revision of eval_dataset, which is empty"),
    ],
)
def test_fields_of_the_evaluation_that_do_not_fit_are_refused_before_the_download(
    fields: dict[str, Any], error: type[Exception], message: str, small_recipe: Callable, pipeline: Callable
) -> None:
    with pytest.raises(error, match=message):
        pipeline(small_recipe(**fields), "resolve")


def test_another_list_of_a_json_file_and_several_files_are_the_holdout(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    path, folder = tmp_path / "a.json", tmp_path / "eval"
    trained, asked = [story(i) for i in range(30)], [story(100 + i) for i in range(10)]
    path.write_bytes(orjson.dumps({"train": trained, "validation": asked}))
    folder.mkdir()
    for begin in (0, 5):
        (folder / f"{begin}.jsonl").write_bytes(lines(asked[begin : begin + 5]))
    files = [str(folder / "0.jsonl"), str(folder / "5.jsonl")]
    for fields in (
        {"eval_split": "validation"},
        {"eval_dataset": str(path), "eval_split": "validation"},
        {"eval_dataset": str(folder)},
        {"eval_dataset": str(folder / "*.jsonl")},
        {"eval_dataset": files},
    ):
        lineage = pipeline(small_recipe(dataset=str(path), holdout_share=0, **fields), "standardize")
        assert sides(artifact(lineage)) == {row: row >= 30 for row in range(40)}, fields
        said = artifact(lineage, "download").metadata.notes
        assert "the rows are the list 'train' of the file; not read: validation (10 rows)" in said
        assert [note for note in said if note.startswith(("eval_dataset: ", "eval_split: "))], said
    path.write_bytes(orjson.dumps({"data": trained}))
    (tmp_path / "b.jsonl").write_bytes(lines(trained))
    (tmp_path / "c.csv").write_bytes(csv(trained))
    for name, missing in (("a.json", "; its lists of rows are: data"), ("b.jsonl", ""), ("c.csv", "")):
        recipe = small_recipe(dataset=str(tmp_path / name), eval_split="validation", holdout_share=0)
        with pytest.raises(BadData, match=f"field 'eval_split': .*{name} .*'validation'{missing}. .*eval_dataset"):
            pipeline(recipe, "download")


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_used_or_listed_with_its_reasons(
    seed: int, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    chooser = random.Random(seed)
    benchmark, evaluation = tmp_path / "benchmark.txt", tmp_path / "eval.jsonl"
    benchmark.write_text("Name the eight planets of our system in order, please\n")
    planted = conversation("A quiz: name the eight planets of our system in order, please.", "Mercury first.")
    kinds: list[Callable[[], Any]] = [
        lambda: story(chooser.randrange(80)), lambda: story(chooser.randrange(80), chooser.choice(["twice", "never"])),
        lambda: {**planted, "id": chooser.random()}, lambda: {"conversations": []}, lambda: ["no row"],
    ]  # fmt: skip
    rows = [chooser.choices(kinds, [9, 4, 1, 1, 1])[0]() for _ in range(120)]
    evaluation.write_bytes(lines([story(i) for i in range(60, 75)] + [{"conversations": []}]))
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(rows))
    recipe = small_recipe(
        dataset=str(path), near_duplicates=chooser.choice(["report", "drop"]), decontaminate_against=str(benchmark),
        max_refused_share=1, holdout_share=0.2 if seed else 0, **({} if seed else {"eval_dataset": str(evaluation)}),
    )  # fmt: skip
    lineage = pipeline(recipe, "standardize")
    made, refused = artifact(lineage), listed(artifact(lineage, "validate"), "quarantine.jsonl")
    left_out = {entry["row"]: entry["reasons"] for entry in entries(made)}
    every = [*sides(made), *refused, *left_out]
    assert sorted(every) == list(range(120 if seed else 136)), "each row once"
    assert all(left_out.values()) and all(entry.get("reasons") or "copy_of" in entry for entry in refused.values())
    assert len(left_out) == made.metadata.dropped == sum(made.metadata.left_out_reasons.values()) > 0


def test_a_row_keeps_its_side_when_rows_are_added_or_moved(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    def sides_of(rows: list[Any]) -> dict[str, bool]:
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(rows))
        made = artifact(pipeline(small_recipe(dataset=str(path)), "standardize"))
        return {said.contents[0]: sides(made)[row] for row, said in messages(made).items()}

    before = sides_of(ROWS)
    # golden: the first 8 bytes of sha256 of the messages' JSON, as a fraction of 2^64, are below holdout_share (0.2)
    expected = {f"Question {i}?" for i in (0, 3, 4, 9, 19, 21, 24, 25, 27, 28, 31, 37)}
    assert {question for question, held in before.items() if held} == expected
    more = [conversation(f"Other {i}?", "Yes.") for i in range(40)]
    after = sides_of([*more, *reversed(ROWS)])
    assert {question: after[question] for question in before} == before
