"""The recipe's checks: every wrong field is named, with what is expected there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from include.errors import BadRecipe, NotFound
from include.paths import PROJECT, recipe_files
from include.recipe import Operations, Recipe, find_recipe, form, load_all, load_recipe, validate_recipe
from include.recipe.model import SHIPPED_TEMPLATES
from include.recipe.schema import SECTIONS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 8}, "unknown field 'lora_rank'"),
        ({"learning_rat": 1e-4}, "did you mean 'learning_rate'?"),
        ({"r": "sixteen"}, "field 'r': input should be a valid integer"),
        ({"r": 0}, "field 'r': input should be greater than or equal to 1, got 0"),
        ({"lora_dropout": 1.0}, "field 'lora_dropout': input should be less than 1"),
        ({"learning_rate": float("nan")}, "field 'learning_rate'"),
        ({"chat_template": "lama"}, "field 'chat_template': not a chat template: use llama-3.1, llama-3, "),
        ({"chat_template": "own.txt"}, "a path to a .jinja file, or Jinja text, got 'own.txt'"),
        ({"chat_template": "a\nb.jinja"}, "field 'chat_template': not a chat template"),
        ({"chat_template_kwargs": {"tools": []}}, "field 'chat_template_kwargs': 'tools' is not allowed here"),
        ({"max_steps": 0}, "max_steps is 0"),
        (
            {"registry": "s3://bucket"},
            "field 'registry': not a registry: write hf://owner/name, s3://bucket/path (or gs, az, abfs), or "
            "file:///folder, got 's3://bucket'",
        ),
        ({"registry": "https://bucket/path"}, "field 'registry': not a registry"),
        ({"registry": "hf://owner"}, "field 'registry': not a registry"),
        ({"name": "my recipe"}, "field 'name': not a name: use up to 100 letters"),
        (
            {"gate_questions_matter": True},
            "unknown field 'gate_questions_matter': it is named 'gate_prompt_control' now",
        ),
        ({"prompts": [{"prompt": "hi", "expect": "("}]}, "not a regular expression"),
        (
            {"prompts": [{"prompt": "hi", "expect_json": {"type": "objekt"}}]},
            "field 'prompts.0.expect_json': not a JSON schema: at $.type 'objekt' is not valid",
        ),
        (
            {
                "prompts": [
                    {"prompt": "hi", "expect_json": {"properties": {"a": {"$ref": "http://127.0.0.1:9/a.json"}}}}
                ]
            },
            "field 'prompts.0.expect_json': not a complete JSON schema: it refers to 'http://127.0.0.1:9/a.json'",
        ),
        ({"prompts": [{"prompt": "hi", "expect_json": {"$schema": 7}}]}, "not a JSON schema: its $schema is 7"),
        ({"prompts": [{"prompt": "hi", "contains": ""}]}, "field 'prompts.0.contains'"),
        ({"num_beams": 0}, "field 'num_beams'"),
        ({"repetition_penalty": 0}, "field 'repetition_penalty'"),
        ({"prompts": "hi"}, "field 'prompts': input should be a valid list"),
        ({"required_checks": ["pretty"]}, "field 'required_checks.0'"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        validate_recipe({"name": "x", **values}, "x.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "^" not in str(caught.value), "no regular expression"


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(BadRecipe) as caught:
        validate_recipe({"name": "x", "r": -1, "seed": "a", "nonsense": 1}, "x.yaml")
    assert all(f"'{name}'" in str(caught.value) for name in ("r", "seed", "nonsense"))


def test_the_defaults_are_the_reference_recipe() -> None:
    recipe = load_recipe(find_recipe("llama32_3b_finetome"))
    assert (recipe.base_model, recipe.dataset) == ("unsloth/Llama-3.2-3B-Instruct", "mlabonne/FineTome-100k")
    assert (recipe.r, recipe.lora_alpha, recipe.lora_dropout, len(recipe.target_modules)) == (16, 16, 0.0, 7)
    assert (recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps) == (2, 4)
    assert (recipe.warmup_steps, recipe.max_steps, recipe.learning_rate) == (5, 60, 2e-4)
    assert (recipe.max_seq_length, recipe.load_in_4bit, recipe.chat_template) == (2048, True, "llama-3.1")
    assert (recipe.temperature, recipe.min_p) == (1.5, 0.1)


def test_what_the_reference_leaves_open_about_sampling_is_as_in_transformers() -> None:
    from transformers import GenerationConfig

    recipe, theirs = validate_recipe({"name": "x"}, "x.yaml"), GenerationConfig._get_default_generation_params()
    for name in ("do_sample", "top_p", "top_k", "repetition_penalty", "no_repeat_ngram_size", "num_beams"):
        assert getattr(recipe, name) == theirs[name], name


@pytest.mark.parametrize("file", recipe_files(), ids=lambda file: file.stem)
def test_shipped_recipes_load_and_their_values_fit_the_form(file: Path) -> None:
    fields = form(load_recipe(file))
    assert set(fields) == set(Recipe.model_fields) - {"name", "description", "sweep", *Operations.model_fields}
    for field in fields.values():
        jsonschema.validate(field["value"], field["schema"])
        assert field["schema"]["description_md"]
        assert "anyOf" not in field["schema"]
        assert "$ref" not in str(field["schema"])


@pytest.mark.parametrize("dataset", ["data/*.jsonl", ["a.jsonl", "s3://bucket/b/"]])
def test_a_dataset_is_a_name_or_a_list_of_names_also_in_the_form(dataset: Any) -> None:
    fields = form(validate_recipe({"name": "x", "dataset": dataset, "eval_dataset": dataset}, "a test"))
    assert fields["dataset"]["value"] == fields["eval_dataset"]["value"] == dataset
    assert fields["eval_dataset"]["schema"]["type"] == ["string", "array", "null"]
    assert fields["dataset"]["schema"]["type"] == ["string", "array"], "one text field in the form, for text or JSON"
    for other in ("data/*.jsonl", ["a.jsonl"]):
        jsonschema.validate(other, fields["dataset"]["schema"])
    for wrong in ([], "", [""], 5, None, ["a", 5]):
        with pytest.raises(BadRecipe, match="^a test: field 'dataset': must be a name, or a list of names, got "):
            validate_recipe({"name": "x", "dataset": wrong}, "a test")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, fields["dataset"]["schema"])


@pytest.mark.parametrize("template", ["chatml", "templates/own.jinja", "{{ messages }}", "{% set a = messages %}\n"])
def test_a_chat_template_is_a_name_a_path_or_text_also_in_the_form(template: str) -> None:
    field = form(validate_recipe({"name": "x", "chat_template": template}, "a test"))["chat_template"]
    assert field["value"] == template
    jsonschema.validate(template, field["schema"])
    if "\n" in template:
        assert field["schema"]["format"] == "multiline" and "examples" not in field["schema"]
    else:
        assert "format" not in field["schema"] and {"chatml", "tokenizer"} < {*field["schema"]["examples"]}


def test_every_shipped_template_has_a_file() -> None:
    files = {file.stem for file in (PROJECT / "include" / "templates").glob("*.jinja")}
    assert files == {*SHIPPED_TEMPLATES}


def test_every_field_is_in_one_section() -> None:
    names = [name for model in SECTIONS.values() for name in model.model_fields]
    assert len(names) == len(set(names))


def test_a_file_that_is_not_a_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for content in ("a: [1", "- just\n- a list", ""):
        path.write_text(content)
        with pytest.raises(BadRecipe) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(NotFound, match="demo, demo_real, dpo_preferences, gemma3_4b"):
        find_recipe("dmeo")
    with pytest.raises(NotFound, match="no recipe file"):
        find_recipe("nowhere/dmeo.yaml")


@pytest.mark.parametrize("name", ["rollback", "maintenance"])
def test_the_name_of_a_dag_of_retune_is_refused(name: str, write_recipe: Callable) -> None:
    file = write_recipe(name)
    with pytest.raises(
        BadRecipe, match=f"{file}: the name '{name}' is reserved for Retune's DAG {name}. Rename the file"
    ):
        load_recipe(file)
    recipes = load_all()
    assert name not in recipes, "a broken DAG of this name would replace Retune's"
    assert "is reserved" in str(recipes[f"{name}.yaml"])


def test_a_recipe_is_called_like_its_file(write_recipe: Callable) -> None:
    file = write_recipe("nested")
    with pytest.raises(BadRecipe, match="got 'third'"):
        load_recipe(file, {"name": "third"})
    file.write_text("name: other_name")
    message = "field 'name': a recipe is called like its file, 'nested', got 'other_name'. Remove the field, or rename"
    with pytest.raises(BadRecipe, match=message):
        load_recipe(file)
    assert message in str(load_all()["nested"])
    assert "other_name" not in load_all()
    file.write_text("name: nested")
    assert load_recipe(file).name == "nested"


def test_two_files_of_one_name_are_both_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "dup.yaml", tmp_path / "sub" / "dup.yaml"
    second.parent.mkdir()
    for file in (first, second):
        file.write_text("description: a recipe")
    (tmp_path / "single.yaml").write_text("r: 8")
    monkeypatch.setenv("RETUNE_RECIPES", f"{tmp_path}:{second.parent}")
    for asked in ("dup", str(first), str(second)):
        with pytest.raises(BadRecipe) as caught:
            find_recipe(asked)
        assert f"{first}" in str(caught.value)
        assert f"{second}" in str(caught.value)
    recipes = load_all()
    assert f"2 recipe files have the name 'dup': {first}, {second}. Rename all but one" in str(recipes["dup"])
    assert recipes["single"].r == 8, "other recipes are loaded"
    assert recipes["demo"].name == "demo"

    monkeypatch.setenv("RETUNE_RECIPES", f"{tmp_path}:{first}:{tmp_path / 'sub' / '..' / 'dup.yaml'}")
    assert find_recipe("dup") == first, "a file that is listed twice is one file"
    assert load_all()["dup"].name == "dup"


def test_a_copy_of_a_known_recipe_is_not_run_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("r: 8")
    with pytest.raises(BadRecipe, match="2 recipe files have the name 'demo'"):
        find_recipe(str(tmp_path / "demo.yaml"))
