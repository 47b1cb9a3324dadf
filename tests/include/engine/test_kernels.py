"""The fast kernels compute what PEFT, TRL and transformers compute, or are not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.architectures import ARCHITECTURES, config_of, make_base
from bench.train import make_rows
from include.engine import supervise
from include.engine.attention import JoinRows, join_rows
from include.engine.fused_lora import fuse_adapters
from include.engine.graphs import StepGraphs
from include.engine.jobs import TrainJob
from include.engine.kernels import CHUNK, Unproven, loss_on_trained_tokens, use_kernels
from include.errors import BadRecipe
from include.recipe import PROJECTIONS, validate_recipe

MIXING = ("gpt-oss", "LFM2")  # rows of a joined sequence see each other
ROWS = [{"input_ids": list(range(5, 55))}, {"input_ids": list(range(7, 48))}]
WINDOW = 16  # of Mistral and Gemma 3


def adapted(name: str = "Llama", **lora: Any) -> Any:
    """A tiny model of an architecture with an adapter that is not zero."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(name)).train()
    with_adapter = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": "all-linear", **lora})
    )
    for key, parameter in with_adapter.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    return with_adapter


def gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**{name: value for name, value in batch.items() if name != "tokens"}, use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss), found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        assert (grad - other[name]).norm() <= tolerance * grad.norm() + 1e-9, name


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in MIXING])
def test_each_architecture_is_trained_with_all_of_them_and_the_same_gradients(name: str) -> None:
    model = adapted(name)
    rows = [{"input_ids": row["input_ids"], "labels": [-100] * 9 + row["input_ids"][9:]} for row in ROWS]
    total, expected = 0.0, {}
    for row in rows:  # each alone
        loss, grads = gradients(model, {key: torch.tensor([value]) for key, value in row.items()})
        weight = len(row["labels"]) - 9
        total += loss * weight
        expected = {key: expected.get(key, 0) + grad * weight for key, grad in grads.items()}
    trained = sum(len(row["labels"]) - 9 for row in rows)
    done = use_kernels(model, ROWS, 64, None)
    assert "rows joined without padding" in done
    assert "logits of trained tokens only" in done
    count = sum(hasattr(module, "lora_A") and "vision" not in key for key, module in model.named_modules())
    fused = int(next(line for line in done if "fused" in line).split()[0])
    assert fused >= count - 1, "all but a layer that the text model does not have"
    loss, found = gradients(model, JoinRows()(rows))
    assert loss == pytest.approx(total / trained, abs=1e-5)
    assert_equal({key: grad / trained for key, grad in expected.items() if float(grad.norm())}, {
        key: found[key] for key, grad in expected.items() if float(grad.norm())
    })  # fmt: skip


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3"])
def test_compiled_layers_have_the_same_gradients(name: str) -> None:
    model, batch = adapted(name), JoinRows()([{**row, "labels": row["input_ids"]} for row in ROWS])
    join_rows(model.get_base_model())
    loss_on_trained_tokens(model.get_base_model(), compiled=False)
    expected = gradients(model, batch)
    compiled = adapted(name)
    # the proof is computed with compiled layers, too; PyTorch's backend without a C++ compiler
    assert use_kernels(compiled, ROWS, 64, {"backend": "aot_eager"})[-1] == "compiled layers"
    found = gradients(compiled, batch)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_equal(expected[1], found[1])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MIXING)
def test_a_base_that_mixes_joined_rows_is_refused(name: str) -> None:
    with pytest.raises(BadRecipe, match="field 'packing'"):
        use_kernels(adapted(name), ROWS, 64, None)


def test_a_base_that_they_would_train_wrongly_is_noticed() -> None:
    model = adapted()
    key = model.get_base_model().model.layers[1].self_attn.k_proj
    key.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))  # not the input of q_proj, as they take it to be
    with pytest.raises(Unproven, match=r"the gradient differs by \d+"):
        use_kernels(model, ROWS, 64, None)


def test_the_proof_leaves_adapters_gradients_and_mode_as_they_were() -> None:
    model = adapted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    use_kernels(model.eval(), ROWS, 64, None)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


def four_bits(model: Any) -> Any:
    """Give the linear layers of a model 4-bit weights, without the head."""
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                layer = Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, torch.float32, True, "nf4"
                )
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer.to("cpu"))
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_fused_adapters_have_pefts_outputs_and_gradients(quantized: bool, bias: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=99, attention_bias=bias)
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    model = four_bits(model) if quantized else model
    with_adapter: Any = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=10, use_rslora=True, target_modules=PROJECTIONS)
    )
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(2, 42).view(2, 20)
    expected = gradients(with_adapter, {"input_ids": ids, "labels": ids})
    assert fuse_adapters(with_adapter) == (14, 14)
    for _ in range(2):
        found = gradients(with_adapter, {"input_ids": ids, "labels": ids})
        assert found[0] == pytest.approx(expected[0], abs=1e-5)
        assert_equal(expected[1], found[1])
    changed = with_adapter.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight
    with torch.no_grad():
        changed.add_(1)
    assert gradients(with_adapter, {"input_ids": ids, "labels": ids})[0] != pytest.approx(expected[0], abs=1e-3)


@pytest.mark.parametrize(
    ("lora", "fused"),
    [({}, 14), ({"lora_dropout": 0.1}, 0), ({"use_dora": True}, 0), ({"bias": "all"}, 14), ({"lora_bias": True}, 0)],
)
def test_what_they_do_not_know_keeps_pefts_way(lora: dict[str, Any], fused: int) -> None:
    model = adapted(target_modules=PROJECTIONS, **lora).eval()
    ids = torch.arange(5, 25)[None]
    expected = model(input_ids=ids).logits
    assert fuse_adapters(model) == (fused, 14)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-5)


def test_small_updates_survive_in_bfloat16() -> None:
    """PEFT adds an update to an output that is rounded already, so that a small one is lost."""
    torch.manual_seed(0)

    def mean_update(fused: bool) -> float:
        torch.manual_seed(0)
        model: Any = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).bfloat16()
        peft_model: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["0"]))
        x = torch.randn(2000, 256).bfloat16()
        base = x.float() @ model[0].base_layer.weight.float().t()
        with torch.no_grad():
            a = peft_model.base_model.model[0].lora_A["default"].weight.float()
            peft_model.base_model.model[0].lora_B["default"].weight.fill_(2e-4)
            update = (x.float() @ a.t()) @ torch.full((8, 256), 2e-4)
            if fused:
                fuse_adapters(peft_model)
            with torch.autocast("cpu", torch.bfloat16):
                got = peft_model(x).float() - base
        return float((got * update).sum() / update.square().sum())

    assert mean_update(fused=True) == pytest.approx(1, abs=0.15)
    assert mean_update(fused=False) < 0.6


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Llama", {}), ("Granite", {"logits_scaling": 3.0}), ("Gemma 3", {"final_logit_softcapping": 0.5})],
)
def test_the_loss_of_trained_tokens_is_that_of_the_model(name: str, changes: dict[str, Any]) -> None:
    config = config_of(name)
    for field, value in changes.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data *= 20  # far from the linear part of a cap
    model.get_output_embeddings().requires_grad_(False)
    rows = [{"input_ids": list(range(3, 203)), "labels": [*[-100] * 7, *range(10, 203)]}] * 12
    batch = JoinRows()(rows)
    assert len(batch["trained"]) > CHUNK, "more than one chunk of logits"
    join_rows(model)
    plain = {key: batch[key] for key in ("input_ids", "labels", "position_ids", "cu_seq_lens_q")}
    expected = gradients(model, plain)
    loss_on_trained_tokens(model, compiled=False)
    found = gradients(model, batch)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for grads in (expected[1], found[1]):
        grads.pop("model.embed_tokens.weight", None)
    assert_equal(expected[1], found[1], 1e-4)
    items = gradients(model, {**batch, "num_items_in_batch": 2 * len(batch["trained"])})
    assert items[0] == pytest.approx(expected[0] / 2, abs=1e-5)


def test_batches_of_few_shapes_have_the_same_loss_and_gradients() -> None:
    model = adapted("Mistral")
    use_kernels(model, ROWS, 64, None)
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    batch, padded = JoinRows()(rows), JoinRows(64)(rows)
    assert batch["input_ids"].shape == (1, 91)
    assert padded["input_ids"].shape == padded["labels"].shape == padded["position_ids"].shape == (1, 512)
    assert padded["trained"].shape == padded["targets"].shape == (512,)
    assert padded["cu_seq_lens_q"].shape == (33,)
    assert padded["cu_seq_lens_q"].diff().max() == 64, "no row of padding is longer than the others"
    assert padded["tokens"] == batch["tokens"] == 91
    expected, found = gradients(model, batch), gradients(model, padded)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert_equal(expected[1], found[1])
    assert JoinRows(2048)([{"input_ids": [1] * 512, "labels": [1] * 512}])["input_ids"].shape == (1, 512)


def test_packed_rows_begin_where_they_began() -> None:
    packed = {"input_ids": list(range(10)), "labels": list(range(10)), "seq_lengths": [4, 6]}
    batch = JoinRows()([packed, {"input_ids": [7, 8], "labels": [-100, 8]}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 10, 12]
    assert batch["trained"].tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10]
    assert batch["targets"].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 8]
    assert batch["labels"].tolist()[0][4] == -100


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, list[float]]]:
    """Train an architecture in a process of its own; return the result and the losses."""
    folder = tmp_path_factory.mktemp("kernels")
    make_rows(str(folder / "rows"), "8", "100", "590")

    def run(name: str, **fields: Any) -> tuple[Any, list[float]]:
        base = folder / name
        if not base.exists():
            make_base(name, base)
        out = folder / f"{name} {sorted(fields.items())}".replace("/", "")
        recipe = {
            "name": "x",
            "max_steps": 3,
            "warmup_steps": 0,
            "learning_rate": 0.01,
            "max_seq_length": 128,
            **fields,
        }
        job = TrainJob(
            recipe=validate_recipe(recipe, "x"), base=base, base_name="x", base_revision=None, tokenizer=base,
            rows=[folder / "rows" / "00000.arrow"], holdout=[folder / "rows" / "00000.arrow"], out=out, run_name="x",
        )  # fmt: skip
        result = supervise.run(job, out, lambda _: None)
        log = (out / "training_log.jsonl").read_text().splitlines()
        return result, [json.loads(line)["loss"] for line in log]

    return run


@pytest.mark.engine
def test_training_uses_them_and_reaches_the_losses_of_the_plain_way(trained: Any) -> None:
    plain, expected = trained("Llama", kernels="plain")
    fast, found = trained("Llama")
    assert (plain.plan.kernels, plain.plan.dense, plain.plan.dtype) == ("plain", False, "float32")
    assert (fast.plan.kernels, fast.plan.dense, fast.plan.micro_batch) == ("fast", True, 8)
    assert "fast kernels: rows joined without padding, 14 of 14 adapters" in " ".join(fast.plan.notes)
    assert found == pytest.approx(expected, abs=2e-3)
    assert expected[0] - expected[-1] > 0.01, "it learns something"
    assert fast.tokens == plain.tokens


@pytest.mark.engine
def test_training_takes_the_plain_way_where_they_cannot_be_used_and_says_why(trained: Any) -> None:
    result, losses = trained("LFM2", target_modules="all-linear")
    assert result.plan.kernels == "plain"
    assert any("plain kernels: BadRecipe: field 'packing': in this base the rows" in n for n in result.plan.notes)
    _, expected = trained("LFM2", target_modules="all-linear", kernels="plain")
    assert losses == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_adds_the_same_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3, device="cuda"))

    def step(batch: dict[str, Any]) -> Tensor:
        loss = (batch["x"] @ weight).square().sum()
        loss.backward()
        return loss.detach()

    graphs = StepGraphs(step, [weight])
    for repeat in range(1, 5):
        x = torch.full((2, 3), float(repeat), device="cuda")
        loss = graphs({"x": x})
        assert float(loss) == pytest.approx(6 * (3 * repeat) ** 2)
        assert weight.grad is not None
        assert float(weight.grad.sum()) == pytest.approx(float((2 * x.t() @ (x @ weight)).sum()))
        graphs.zero_grad()
    assert graphs.failure is None
