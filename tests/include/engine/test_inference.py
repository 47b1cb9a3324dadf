"""Answers and losses computed together are those computed one by one, in every architecture; dense weights and oneDNN
change nothing but rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench.architectures import ARCHITECTURES, make_base
from include.chat.tokenized import IGNORED
from include.engine import cpu_linear, dequantize, losses
from include.engine import generate as generation
from include.engine.cpu_linear import packed_for_cpu
from include.engine.device_plan import Device
from include.engine.generate import generate
from include.engine.jobs import GenerateJob, GenerateResult
from include.engine.model import load_adapter, load_base, variants
from include.recipe import validate_recipe

CPU = Device(device="cpu", device_name="", dtype="float32")
ROWS = [[(3 * row + 7 * place) % 590 + 5 for place in range(length)] for row, length in enumerate((41, 3, 20, 9, 3))]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Makes a base of an architecture and an adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            base, adapter = (tmp_path_factory.mktemp(kind) for kind in ("base", "adapter"))
            make_base(name, base)
            config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
            get_peft_model(load_base(base, CPU), config).save_pretrained(adapter)
            made[name] = base, adapter
        return made[name]

    return make


def ask(
    base: Path, adapter: Path, prompts: list[list[int]], pad: int = 2, **fields: Any
) -> tuple[GenerateResult, list[str]]:
    """Return the answers to prompts and the lines for people."""
    recipe = validate_recipe({"name": "x", "max_new_tokens": 24, **fields}, "x")
    lines: list[str] = []
    result = generate(GenerateJob(recipe, base, adapter, prompts, [2, 77], pad), lambda line, **_: lines.append(line))
    return result, lines


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_answers_generated_together_are_those_generated_alone(name: str, bases: Callable) -> None:
    together, lines = ask(*bases(name), ROWS)
    assert not any("one by one" in line for line in lines)
    alone = [ask(*bases(name), [prompt])[0] for prompt in ROWS]
    assert together.adapter == [one.adapter[0] for one in alone]
    assert together.base == [one.base[0] for one in alone]


def test_an_answer_ends_with_its_own_stop_token_not_with_the_last_ones(bases: Callable) -> None:
    base, adapter = bases("Llama")
    longest = ask(base, adapter, ROWS, max_new_tokens=24)[0].adapter
    stop = longest[2][5]
    recipe = validate_recipe({"name": "x", "max_new_tokens": 24}, "x")
    answers = generate(GenerateJob(recipe, base, adapter, ROWS, [stop], 2), lambda *_, **__: None).adapter
    assert answers == [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in longest]
    assert len(answers[2]) <= 6


def test_a_base_in_which_padding_counts_answers_one_by_one(bases: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = bases("Llama")
    expected = ask(base, adapter, ROWS)[0]

    def without_mask(*arguments: Any) -> Any:
        for name, model in variants(*arguments):
            inner = getattr(model, "base_model", model)
            inner = getattr(inner, "model", inner)
            hook = inner.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None, "position_ids": None}),
                with_kwargs=True,
            )
            yield name, model
            hook.remove()

    monkeypatch.setattr(generation, "variants", without_mask)
    answers, lines = ask(base, adapter, ROWS)
    assert all("one by one" in line for line in lines)
    assert answers == expected


@pytest.mark.parametrize(
    "fields",
    [{"do_sample": True, "temperature": 1.0, "min_p": 0.0}, {"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1},
     {"num_beams": 3}, {"generation_arguments": {"min_new_tokens": 3}}],
)  # fmt: skip
def test_an_answer_does_not_depend_on_the_other_prompts(fields: dict[str, Any], bases: Callable) -> None:
    greedy = ask(*bases("Llama"), ROWS)[0].adapter[1]
    together = ask(*bases("Llama"), ROWS, pad=greedy[0], **fields)[0]  # padding with a token that is an answer's
    assert together.adapter == [ask(*bases("Llama"), [prompt], **fields)[0].adapter[0] for prompt in ROWS]
    assert together.adapter[1] != greedy or "generation_arguments" in fields


def test_batches_are_bounded_by_tokens_and_halved_when_memory_runs_out(
    bases: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ask(*bases("Llama"), ROWS)[0]
    sizes: list[int] = []
    plain = generation._answers

    def limited(model: Any, prompts: list[list[int]], config: Any) -> Any:
        if len(prompts) > 2 and config.max_new_tokens == 24:
            raise torch.OutOfMemoryError
        sizes.append(len(prompts))
        return plain(model, prompts, config)

    monkeypatch.setattr(generation, "_answers", limited)
    answers, lines = ask(*bases("Llama"), ROWS)
    assert answers == expected
    assert any("out of memory" in line for line in lines)
    sizes.clear()
    monkeypatch.setattr(generation, "BATCH_TOKENS", 2 * (20 + 24))
    assert ask(*bases("Llama"), ROWS)[0] == expected
    assert sizes[2:5] == [1, 2, 2], "after the two of the test of padding"


@pytest.mark.parametrize("name", [*ARCHITECTURES, "softcap"])
@pytest.mark.parametrize("batch_tokens", [1, 1024])
def test_losses_are_those_of_all_logits_row_by_row(
    name: str, batch_tokens: int, bases: Callable, tmp_path: Path
) -> None:
    base, adapter = bases("Gemma 3" if name == "softcap" else name)
    labels = [[id if place % 3 else IGNORED for place, id in enumerate(row)] for row in ROWS]
    sequences = list(zip(ROWS, labels, strict=True))
    model = load_adapter(load_base(base, CPU), adapter).eval()
    if name == "softcap":
        model.config.get_text_config().final_logit_softcapping = 0.5
    with torch.inference_mode():
        with packed_for_cpu(model):
            found = losses._batched_log_likelihoods(model, sequences, "cpu", batch_tokens)
        for row, wanted, total in zip(ROWS, labels, found, strict=True):
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
            expected = -cross_entropy(logits.double(), torch.tensor(wanted[1:]), ignore_index=IGNORED, reduction="sum")
            assert total == pytest.approx(expected.item(), abs=1e-5 * len(row))


def test_the_head_computes_trained_tokens_only(bases: Callable) -> None:
    model = load_base(bases("Llama")[0], CPU).eval()
    rows = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[1]))
    labels = [[IGNORED] * (len(row) - 2) + row[-2:] for row in ROWS]
    with torch.inference_mode():
        losses._batched_log_likelihoods(model, list(zip(ROWS, labels, strict=True)), "cpu", 1024)
    assert rows == [2 * len(ROWS)]


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "LFM2"])
def test_dense_weights_give_the_outputs_of_4_bits(name: str, bases: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import Linear4bit

    base, adapter = bases(name)
    ids = torch.tensor(ROWS[:1])

    def outputs() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for kind, model in variants(base, {"adapter": adapter}, CPU, 4):
            found[kind] = model(input_ids=ids).logits
            found[f"{kind} in 4 bits"] = any(isinstance(module, Linear4bit) for module in model.modules())
        return found

    with torch.inference_mode():
        dense = outputs()
        monkeypatch.setattr(dequantize, "available_host_memory", lambda: 0)
        monkeypatch.setattr(cpu_linear, "available_host_memory", lambda: 0)
        plain = outputs()
    assert (plain["base in 4 bits"], dense["base in 4 bits"], dense["adapter in 4 bits"]) == (True, False, False)
    for kind in ("base", "adapter"):
        torch.testing.assert_close(dense[kind], plain[kind], atol=1e-5, rtol=1e-5)
    assert not torch.equal(plain["base"], plain["adapter"])


def test_layers_are_computed_by_onednn_only_while_asked_and_where_memory_allows(
    bases: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(bases("Llama")[0], CPU).eval()
    ids = torch.tensor(ROWS[:1])

    def ran() -> set[str]:
        with torch.inference_mode(), torch.profiler.profile() as profile:
            model(input_ids=ids)
        return {event.key for event in profile.key_averages()} & {"mkldnn::_linear_pointwise", "aten::linear"}

    with packed_for_cpu(model):
        assert ran() == {"mkldnn::_linear_pointwise"}
        with packed_for_cpu(model):
            pass
        assert ran() == {"mkldnn::_linear_pointwise"}, "a second context leaves the first one's layers"
    assert ran() == {"aten::linear"}
    monkeypatch.setattr(cpu_linear, "available_host_memory", lambda: 0)
    with packed_for_cpu(model):
        assert ran() == {"aten::linear"}


def test_a_layer_with_a_bias_computes_the_same_by_onednn() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(9, 7), torch.randn(2, 3, 9)
    with torch.inference_mode():
        expected = layer(x)
        with packed_for_cpu(layer):
            torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
