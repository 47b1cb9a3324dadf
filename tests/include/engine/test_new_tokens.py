"""Special tokens that the base's vocabulary lacks: added, trained, and published with the adapter."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from include.chat.tokenized import load_rows
from include.engine import supervise
from include.engine.checkpoints import newest_checkpoint
from include.engine.device_plan import Device
from include.engine.model import load_base, load_trainable, variants
from include.engine.new_tokens import make_room
from include.errors import BadRecipe, ProcessLost
from include.recipe import validate_recipe
from include.reporting.model_card import model_card
from tests.include.engine.test_model import CPU_PLAN
from tests.services.engine import log_of, strike
from tests.services.older_packages import load_with_older_packages

CPU = Device(device="cpu", device_name="", dtype="float32")
ADD = {"chat_template": "chatml", "missing_special_tokens": "add"}
OWN = """<|im_start|>system
Be {{ mood }}.<|im_end|>
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
NEW = {"<|im_end|>": 512, "<|im_start|>": 513}


def test_added_tokens_of_an_own_template_are_trained_published_and_merged_and_load_as_the_card_says(
    tiny_base: Path, tmp_path: Path, small_recipe: Callable, pipeline: Callable, artifact: Callable
) -> None:
    own, mood = tmp_path / "own.jinja", {"mood": "brief"}
    own.write_bytes(OWN.replace("\n", "\r\n").encode())
    fields = {**ADD, "chat_template": str(own), "chat_template_kwargs": mood}
    lineage = pipeline(small_recipe(**fields, merged_16bit=True, max_steps=20))
    prepared, published = artifact(lineage, "template"), artifact(lineage, "publish").metadata
    assert prepared.metadata.new_special_tokens == NEW
    assert prepared.metadata.missing_special_tokens == prepared.metadata.untrained_special_tokens == []
    rows = load_rows(prepared.files("train"))
    assert all(row["input_ids"][0] == 513 and row["labels"][-1] == -100 and 512 in row["labels"] for row in rows)

    folder = Path(published.place)
    weights = load_file(folder / "adapter_model.safetensors")
    (name,) = (name for name in weights if "lora" not in name)
    assert weights[name].shape == (2, 64) and not torch.equal(*weights[name]), "two rows, and not the embeddings"

    # as a user loads it: transformers and PEFT alone
    assert (folder / "chat_template.jinja").read_bytes() == own.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", **mood)["input_ids"]
    assert "Be brief." in tokenizer.decode(ids[0])
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("<|im_start|>") == 513
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="float32")
    base.resize_token_embeddings(len(tokenizer))
    with torch.inference_mode():
        loaded = PeftModel.from_pretrained(base, folder)(ids).logits
        automatic = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits
        tested = {"adapter": artifact(lineage, "train").local() / "adapter"}
        trained = {name: model(ids).logits for name, model in variants(tiny_base, tested, CPU, 16)}
    assert loaded.shape[-1] == 514
    assert torch.equal(loaded, trained["adapter"]) and torch.equal(automatic, loaded)
    assert not torch.equal(trained["base"], loaded)
    card = (folder / "README.md").read_text("utf-8")
    assert "| template | chat_template.jinja with `mood=brief` (set them when you serve it, too)" in card
    assert "new special tokens `<|im_end|>`, `<|im_start|>`" in card and "AutoPeftModelForCausalLM" in card

    answered = [*messages, {"role": "assistant", "content": "It is 5."}]
    manifest = orjson.loads((folder / "manifest.json").read_bytes())
    manifest["base"]["name"] = "owner/base"
    on_hub = model_card(manifest, "abc")
    assert "base.resize_token_embeddings(len(tokenizer))" in on_hub and "FastLanguageModel" not in on_hub
    assert on_hub.index("resize_token_embeddings") < on_hub.index("PeftModel.from_pretrained")
    manifest["tokens"]["new_special_tokens"] = {}
    plain = model_card(manifest, "abc")
    assert "resize_token_embeddings" not in plain and "FastLanguageModel" in plain and "new special" not in plain

    job = {"model": str(tiny_base), "adapter": str(folder), "tokenizer": str(folder), "ids": ids[0].tolist()}
    (older,) = load_with_older_packages([{**job, "messages": answered, "text": "It is 5."}])
    assert older["versions"]["peft"].startswith("0.15")
    assert torch.allclose(torch.tensor(older["logits"]), loaded[0], atol=1e-4)

    assert artifact(lineage, "smoke_test").metadata.failed == []
    assert artifact(lineage, "verify").metadata.largest_difference == 0
    assert artifact(lineage, "verify").metadata.merged.kl < 1e-3
    whole = Path(published.merged.place)
    assert orjson.loads((whole / "config.json").read_bytes())["vocab_size"] == 514
    with torch.inference_mode():
        merged = AutoModelForCausalLM.from_pretrained(whole, dtype="float32")(ids).logits
    assert torch.allclose(merged.argmax(-1), loaded.argmax(-1))


@pytest.fixture
def untied(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base with a head of its own and eight rows more than its vocabulary has tokens."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "untied"))
    torch.manual_seed(1)
    config = LlamaForCausalLM.from_pretrained(tiny_base).config
    config.tie_word_embeddings, config.vocab_size = False, 520
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_killed_training_of_new_tokens_resumes_and_trains_their_rows_in_embeddings_and_head(
    untied: Path, train_job: Callable, tmp_path: Path
) -> None:
    def job(name: str) -> Any:
        made = train_job(tmp_path / name, **ADD, base_model=str(untied), max_steps=16, save_steps=2)
        return replace(made, base=untied, new_tokens=list(NEW.values()))

    def ignore(_: str) -> None:
        pass

    supervise.run(job("straight"), tmp_path / "straight", ignore)
    killer = strike(tmp_path / "killed", 5, signal.SIGKILL)
    with pytest.raises(ProcessLost, match="ended by SIGKILL"):
        supervise.run(job("killed"), tmp_path / "killed", ignore)
    killer.join()
    checkpoint = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert checkpoint and not [
        name for name in load_file(checkpoint / "adapter_model.safetensors") if "base_" in name[11:]
    ]
    assert supervise.run(job("killed"), tmp_path / "killed", ignore).resumed_from
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("straight", "killed")]
    assert losses[0] == losses[1], "bitwise the same losses"
    one, other = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "killed")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = {name.split(".token_adapter")[0].rsplit(".", 1)[1]: rows for name, rows in one.items() if "token_" in name}
    assert {name: tuple(tensor.shape) for name, tensor in rows.items()} == {"embed_tokens": (2, 64), "lm_head": (2, 64)}
    base = load_base(untied, CPU)
    make_room(base, NEW.values())
    for layer, name in ((base.model.embed_tokens, "embed_tokens"), (base.lm_head, "lm_head")):
        assert layer.weight.shape[0] == 520, "it has room already"
        assert not torch.allclose(rows[name], layer.weight[[512, 513]], atol=1e-3), "trained"


def test_new_rows_are_the_mean_of_the_others_and_the_others_stay(untied: Path, tiny_base: Path) -> None:
    for folder, size in ((tiny_base, 514), (untied, 520)):
        before, model = load_base(folder, CPU), load_base(folder, CPU)
        make_room(model, NEW.values())
        for old, new in (
            (before.get_input_embeddings(), model.get_input_embeddings()),
            (before.get_output_embeddings(), model.get_output_embeddings()),
        ):
            assert new.weight.shape[0] == size
            others = [id for id in range(len(old.weight)) if id not in (512, 513)]
            assert torch.equal(new.weight[others], old.weight[others])
            assert torch.allclose(new.weight[[512, 513]], old.weight[others].mean(0).expand(2, -1), atol=1e-6)
        make_room(before, [])
        assert before.get_input_embeddings().weight.shape[0] == size - (2 if size == 514 else 0)


def test_new_rows_are_trained_in_32_bits_also_of_a_base_in_16(tiny_base: Path) -> None:
    recipe = validate_recipe({"name": "x", "load_in_4bit": False}, "x")
    model = load_trainable(tiny_base, recipe, replace(CPU_PLAN, dtype="bfloat16", new_tokens=[512, 513]))
    dtypes = {name.rsplit(".", 2)[1]: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert dtypes["trainable_tokens_delta"] == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layers", [{"target_modules": "comprehensive"}, {"modules_to_save": ["lm_head"]}])
def test_layers_that_are_trained_otherwise_exclude_new_tokens(layers: dict[str, Any]) -> None:
    with pytest.raises(BadRecipe, match="missing_special_tokens is add, .*lm_head"):
        validate_recipe({"name": "x", **ADD, **layers}, "x")
    assert validate_recipe({"name": "x", **ADD}, "x")
    assert validate_recipe({"name": "x", **layers}, "x")
