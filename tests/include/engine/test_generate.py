"""Generation: the recipe's sampling fields reach the model, whatever the base's generation_config.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from include.engine.jobs import GenerateJob
from include.recipe import validate_recipe

PROMPT = [0, 40, 41, 42, 43]
LENGTH = 40


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def answer(adapter: Path, tiny_base: Path) -> Callable[..., list[int]]:
    """Returns the adapter's answer to the prompt; fields of the recipe by keyword. It never stops by itself."""
    from include.engine.generate import generate

    def ask(base: Path = tiny_base, **fields: Any) -> list[int]:
        recipe = validate_recipe({"name": "x", "load_in_4bit": False, "max_new_tokens": LENGTH, **fields}, "x")
        job = GenerateJob(recipe=recipe, base=base, adapter=adapter, prompts=[PROMPT], stop=[4], pad=4)
        return generate(job, lambda _, **__: None).adapter[0]

    return ask


def pairs(answer: list[int]) -> list[tuple[int, int]]:
    ids = PROMPT + answer
    return list(pairwise(ids))


def test_greedy_decoding_repeats_itself_and_stops_at_max_new_tokens(answer: Callable) -> None:
    greedy = answer()
    assert len(greedy) == LENGTH
    assert answer() == greedy
    assert answer(max_new_tokens=7) == greedy[:7]


def test_no_repeat_ngram_size_forbids_a_sequence_to_occur_twice(answer: Callable) -> None:
    assert len(set(pairs(answer()))) < len(pairs(answer()))
    once = pairs(answer(no_repeat_ngram_size=2))
    assert len(set(once)) == len(once)


def test_a_repetition_penalty_gives_more_different_tokens(answer: Callable) -> None:
    assert len(set(answer(repetition_penalty=10.0))) > len(set(answer()))


def test_beam_search_finds_a_more_probable_answer(answer: Callable, adapter: Path, tiny_base: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter).eval()

    def likelihood(found: list[int]) -> float:
        ids = torch.tensor([PROMPT + found])
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, ids[0, 1:, None])[len(PROMPT) - 1 :].sum().item()

    greedy, beams = answer(), answer(num_beams=8)
    assert len(beams) == len(greedy)
    assert likelihood(beams) > likelihood(greedy)


def test_a_seed_repeats_the_same_sample(answer: Callable) -> None:
    one = answer(do_sample=True, seed=1)
    assert answer(do_sample=True, seed=1) == one
    assert answer(do_sample=True, seed=2) != one


@pytest.mark.parametrize("only_the_best", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_each_sampling_field_reaches_the_sampler(answer: Callable, only_the_best: dict[str, float]) -> None:
    anything = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert answer(**anything) != answer()
    assert answer(**{**anything, **only_the_best}) == answer()


def test_the_bases_generation_config_does_not_replace_the_recipes_fields(
    answer: Callable, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    recommended = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 3, "repetition_penalty": 2.0, "num_beams": 2,
        "no_repeat_ngram_size": 2, "max_new_tokens": 3, "eos_token_id": 7,
    }  # fmt: skip
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(recommended))
    assert answer(tmp_path / "base") == answer()
    drawn = {"do_sample": True, "top_k": 0, "min_p": 0.0}
    assert answer(tmp_path / "base", **drawn) == answer(**drawn)


def test_generation_arguments_reach_the_model(answer: Callable) -> None:
    greedy = answer()
    assert greedy[0] not in answer(generation_arguments={"suppress_tokens": [greedy[0]]})
