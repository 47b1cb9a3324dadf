"""The declared pipeline, the recipe fields that each stage may read, and the versions of the stages' outputs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from include.errors import BadRecipe, UndeclaredField
from include.pipeline.contracts import CONTRACTS
from include.pipeline.sharding import Sharded
from include.pipeline.stage import Output, Stage
from include.recipe import Recipe, validate_recipe
from tasks.stages import NAMES, PIPELINE, STAGES, longest_try, stages_of, timeout_of
from tests.conftest import PROJECT, conversation

GOLDEN = PROJECT / "tests" / "tasks" / "golden_outputs.json"
DATA_LEG = ("download", "validate", "standardize", "template")


def recipe(**fields: Any) -> Recipe:
    return validate_recipe({"name": "small", **fields}, "here")


def test_every_declared_stage_is_there_with_the_contract_of_its_name() -> None:
    assert len(STAGES) == len(PIPELINE)
    for stage in PIPELINE:
        found = stage.load()
        assert callable(found) and found.__doc__
        if isinstance(found, Stage):
            assert found.name == stage.name
            earlier = NAMES[: NAMES.index(stage.name)]
            assert set(found.input_stages) <= set(earlier), "a stage reads only what stages before it leave"
            assert set(found.recipe_fields) | set(found.other_fields) <= set(Recipe.model_fields)
            assert not set(found.recipe_fields) & set(found.other_fields)
            assert hasattr(found, "plan") == stage.shardable
    assert set(CONTRACTS) == set(NAMES) - {"candidates", "choose"}


def test_a_recipe_has_the_stages_that_it_needs() -> None:
    plain = [stage.name for stage in stages_of(recipe())]
    assert not {"make_base", "candidates", "choose"} & set(plain)
    assert [stage.name for stage in stages_of(recipe(sweep={"r": [4, 8]}))] == [n for n in NAMES if n != "make_base"]
    assert "make_base" in [stage.name for stage in stages_of(recipe(base_model="demo://little-llama"))]
    assert [stage.name for stage in PIPELINE if stage.gpu] == ["train", "smoke_test", "evaluate"]
    mapped = NAMES[NAMES.index("candidates") + 1 : NAMES.index("choose")]
    assert [stage.name for stage in PIPELINE if stage.per_candidate] == [*mapped], "the DAG maps all of them"


def test_timeouts_are_the_stages_own_or_the_recipes() -> None:
    train = STAGES["train"]
    assert timeout_of(recipe(), train) == longest_try(recipe()) == timedelta(hours=72)
    assert timeout_of(recipe(timeout_hours={"train": 100}), train) == timedelta(hours=100)
    assert timeout_of(recipe(), STAGES["approve"]) is None, "a person decides"
    for name in ("trian", "approve"):
        message = f"field 'timeout_hours': there is no stage '{name}' with a time limit. Use one of: resolve, make_base"
        with pytest.raises(BadRecipe, match=message):
            timeout_of(recipe(timeout_hours={name: 1}), train)


@pytest.mark.parametrize("stage", [one for one in PIPELINE if isinstance(one.load(), Stage)], ids=lambda one: one.name)
def test_a_stage_sees_only_the_fields_that_it_declares(stage: Any) -> None:
    found = stage.load()
    view = found.view(recipe())
    declared = {"name", *found.recipe_fields, *found.other_fields}
    for field in Recipe.model_fields:
        if field in declared:
            getattr(view, field)
        else:
            with pytest.raises(UndeclaredField, match=f"the stage {stage.name} reads the recipe field '{field}'"):
                getattr(view, field)


@pytest.mark.parametrize(
    ("stage", "field"), [("validate", "merge_turns"), ("template", "special_tokens_in_text"), ("download", "max_rows")]
)
def test_a_field_that_a_stage_forgets_to_declare_fails_the_stage(
    stage: str, field: str, small_recipe: Callable, pipeline: Callable
) -> None:
    found = STAGES[stage].load()
    options: dict[str, Any] = {"version": found.version, "other_fields": found.other_fields}
    options["recipe_fields"] = [name for name in found.recipe_fields if name != field]
    assert len(options["recipe_fields"]) == len(found.recipe_fields) - 1
    if isinstance(found, Sharded):
        forgetful: Stage[Any] = Sharded(found.work, split_folder=found.split_folder, steps=found.steps, **options)
    else:
        forgetful = Stage(found.work, **options)
    before = pipeline(small_recipe(), NAMES[NAMES.index(stage) - 1] if stage != "download" else "resolve")
    with pytest.raises(UndeclaredField, match=f"the recipe field '{field}'"):
        forgetful(before)


def digest_of(output: Output[Any]) -> dict[str, str]:
    """Return the sha256 of each file, without the Data Docs, whose pages hold times."""
    return {
        name: file["sha256"][:16]
        for name, file in sorted(output.manifest["files"].items())
        if not name.startswith("data_docs/")
    }


def test_a_stage_whose_output_changes_raises_its_version(
    tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable, material: Path
) -> None:
    """Golden digests on a small fixed input. On purpose: raise the stage's version, then WRITE_GOLDEN=1."""
    path = tmp_path / "rows.jsonl"
    rows: list[Any] = [conversation(f"What is {i} plus {i + 1}?", f"It is {2 * i + 1}.") for i in range(40)]
    rows += [rows[0], {"conversations": [{"from": "human", "value": "Only asked."}]}, {"items": []}]
    rows += [{"conversations": [{"from": "Human ", "value": "Hi\x00!"}, {"from": "chatgpt", "value": "Hello."}]}]
    rows += [conversation("Say <|eot_id|> and say it long.", "word " * 90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"base_model": str(material / "models" / "stories260K"), "chat_template": "alpaca"}
    lineage = pipeline(small_recipe(dataset=str(path), max_refused_share=0.5, **fields), "template")
    found = {}
    for name in DATA_LEG:
        output = artifact(lineage, name)
        metadata = output.metadata.to_json() | {"docs": ""}
        text = json.dumps([digest_of(output), metadata], sort_keys=True)
        found[name] = {
            "version": STAGES[name].load().version,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    known = json.loads(GOLDEN.read_text())
    for name in DATA_LEG:
        if found[name]["sha256"] != known[name]["sha256"]:
            assert found[name]["version"] > known[name]["version"], f"the output of {name} changed: raise its version"
            pytest.fail(f"{name} has a new version: write its golden digest (WRITE_GOLDEN=1)")
    assert found == known
