"""The fast way through a training step: fused adapters, a loss on trained tokens only, compiled layers.

Each part computes the same as the plain way (PEFT, TRL, transformers) with fewer passes over memory, and `use_kernels`
proves it on the base at hand before the first step. What a part does not know keeps the plain way.

The fused adapter and the loss that has its gradient ready follow Unsloth and Liger-Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from include.chat.tokenized import IGNORED
from include.engine.attention import JoinRows, check_packing, join_rows

ADAPTER = "default"  # PEFT's name of the adapter that is trained
CHUNK = 2048  # tokens whose logits are in memory at once
PROBE = [{"input_ids": ids, "labels": ids} for ids in (list(range(3, 27)), list(range(5, 22)))]  # rows for the proof
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # of the gradient, relative to its norm


# ---- an adapter and the layer below it as one operation


@torch.library.custom_op("retune::lora", mutates_args=())
def _lora(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return x W' + bias + scale (x A') B' (tokens x outputs) and x A' (tokens x rank)."""
    low, dense = x @ a.t(), _dense(weight, a, b)
    y = x @ dense.t() if bias is None else torch.addmm(bias, x, dense.t())
    return y.addmm_(low, b.t(), alpha=scale), low


@_lora.register_fake
def _(x: Tensor, weight: list[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Any:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("retune::lora_backward", mutates_args=())
def _lora_backward(
    grad: Tensor, x: Tensor, low: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B."""
    grad_low = (grad @ b).mul_(scale)
    grad_x = (grad @ _dense(weight, a, b)).addmm_(grad_low, a)
    return grad_x, grad_low.t() @ x, (grad.t() @ low).mul_(scale)


@_lora_backward.register_fake
def _(grad: Tensor, x: Tensor, low: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, scale: float) -> Any:
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, a, b, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], a, b, *weight)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    x, low, a, b, *weight = ctx.saved_tensors
    grad_x, grad_a, grad_b = _lora_backward(grad.contiguous(), x, low, weight, a, b, ctx.scale)
    return grad_x, [None] * len(weight), None, grad_a, grad_b, None


_lora.register_autograd(_backward, setup_context=_save_for_backward)


def _dense(weight: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Return a layer's weight (outputs x inputs): as it is, or from its 4-bit values and their scales."""
    if len(weight) == 1:
        return weight[0]
    packed, scales = weight
    shape, block = (b.shape[0], a.shape[1]), 2 * packed.numel() // scales.numel()
    return torch.ops.bitsandbytes.dequantize_4bit(packed, scales, block, "nf4", shape, a.dtype)


def fuse_adapters(model: Any) -> tuple[int, int]:
    """Make layers with an adapter compute layer and adapter as one operation.

    Layers with dropout, a trained bias, or weights that are neither dense nor nf4 keep PEFT's way.

    Returns:
        The number of fused layers, and of those that keep PEFT's way.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fused = 0
    for layer in layers:
        weight = _weight_of(layer)
        if weight:
            layer.weight_tensors = weight
            layer.__class__ = _fused_class(type(layer))
            fused += 1
    return fused, len(layers) - fused


def _weight_of(layer: Any) -> list[Tensor] | None:
    """Return the tensors of the layer below an adapter: its dense weight, or 4-bit values and scales; None for a layer
    that cannot be fused."""
    from bitsandbytes.nn import Linear4bit
    from torch.nn import Identity, Linear

    base = layer.get_base_layer()
    plain = (
        list(layer.lora_A) == [ADAPTER] == layer.active_adapters
        and isinstance(layer.lora_dropout[ADAPTER], Identity)
        and not (layer.lora_variant or layer.lora_bias[ADAPTER] or layer.fan_in_fan_out or layer.merged)
        and isinstance(base, Linear)
        and not any(parameter.requires_grad for parameter in base.parameters())
    )
    if not plain:
        return None
    if type(base) is Linear:
        return [base.weight]
    if not isinstance(base, Linear4bit) or base.weight.quant_state.quant_type != "nf4":
        return None
    state = base.weight.quant_state
    if state.nested:  # the scales are quantized, too: dense ones take 6 % of the layer's memory and save a kernel
        from bitsandbytes.functional import dequantize_blockwise

        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
    return [base.weight.data, state.absmax]


@cache
def _fused_class(plain: type) -> type:
    """Return a subclass of one of PEFT's classes of layers, with the fused forward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = self.base_layer.bias
        y, _ = _lora(
            x.reshape(-1, x.shape[-1]).to(dtype), self.weight_tensors, None if bias is None else bias.to(dtype),
            a.to(dtype), b.to(dtype), self.scaling[ADAPTER],
        )  # fmt: skip
        return y.view(*x.shape[:-1], y.shape[-1])

    return type(f"Fused{plain.__name__}", (plain,), {"forward": forward})


# ---- the loss of trained tokens


class _CrossEntropy(torch.autograd.Function):
    """The sum of cross entropies of hidden states under a frozen head. Its gradient is computed at once, so that the
    logits of one chunk only are in memory, and only once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, scale: float, cap: float, entropy: Callable[..., Any]
    ) -> Tensor:
        grad, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            loss, grad_logits = entropy(hidden[part] @ head.t(), targets[part], scale, cap)
            torch.mm(grad_logits, head, out=grad[part])
            total += loss
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None, None


def _entropy(logits: Tensor, targets: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross entropies, without ignored targets, and its gradient by the logits (tokens x
    vocabulary)."""
    scaled = logits.float() * scale
    slope = 1.0
    if cap:
        squashed = torch.tanh(scaled / cap)
        scaled, slope = squashed * cap, 1 - squashed * squashed
    log_sum, kept = scaled.logsumexp(-1, keepdim=True), targets[:, None] != IGNORED
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    loss = ((log_sum - scaled.gather(1, targets[:, None].clamp(min=0))) * kept).sum()
    return loss, (((scaled - log_sum).exp() - is_target.float()) * kept * slope * scale).to(logits.dtype)


def loss_on_trained_tokens(model: Any, compiled: bool) -> None:
    """Make a model's forward pass return the loss alone, computed at the positions `trained` of a batch of joined rows,
    for the tokens `targets` (`include.engine.attention.JoinRows`). Without `trained` in the batch it stays as it was.

    Args:
        model: a causal language model of transformers; its head is not trained.
        compiled: whether to compile the loss.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    plain, head, config = model.forward, model.get_output_embeddings().weight, model.config.get_text_config()
    # the ways in which transformers' models change logits: Granite, Cohere, Gemma
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    entropy = torch.compile(_entropy, dynamic=True) if compiled else _entropy

    def forward(
        self: Any, *, trained: Tensor | None = None, targets: Any = None, labels: Any = None,
        num_items_in_batch: Any = None, **inputs: Any,
    ) -> Any:  # fmt: skip
        if trained is None:
            return plain(labels=labels, num_items_in_batch=num_items_in_batch, **inputs)
        hidden = self.base_model(**inputs).last_hidden_state[0, trained].to(head.dtype)
        total = _CrossEntropy.apply(hidden, head, targets, scale, cap, entropy)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / count)

    model.forward = MethodType(forward, model)


# ---- compiled layers


def compile_layers(model: Any, **options: Any) -> None:
    """Compile the layers of a model, all with one program for sequences of any length.

    Args:
        options: of `torch.compile`.
    """
    for layer in model.get_decoder().layers:
        layer.compile(dynamic=True, **options)


# ---- all of it


def use_kernels(model: Any, longest: int, options: Mapping[str, Any] | None) -> list[str]:
    """Give a model all parts of the fast way that it can have, and prove that its gradients stay the same.

    Args:
        model: the model to train, or PEFT's around it, on its device. It is of no use after an error.
        longest: tokens that no row exceeds.
        options: of `torch.compile`; None to compile nothing.

    Returns:
        What was done, for people.

    Raises:
        Unproven: the fast way computes something else than the plain one.
        BadRecipe: see `join_rows` and `check_packing`.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    random = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    training = model.training
    model.train(not random)
    with _adapters_that_matter(model):
        expected = _gradients(model, [JoinRows()([row]) for row in PROBE], plain=True)
        join_rows(causal, longest)
        check_packing(causal)
        fused, others = fuse_adapters(model)
        done = ["rows joined without padding"]
        if fused:
            done.append(f"{fused} of {fused + others} adapters fused with their layers")
        own = getattr(causal.config.get_text_config(), "output_router_logits", False)  # the experts' loss is added
        if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad and not own:
            loss_on_trained_tokens(causal, compiled=options is not None)
            done.append("logits of trained tokens only")
        causal.enable_input_require_grads()  # so that the first layer needs no program of its own
        if options is not None:
            compile_layers(causal, **options)
            done.append("compiled layers")
        found = _gradients(model, [JoinRows()(PROBE)])
    model.train(training)
    apart, tolerance = _difference(expected, found), TOLERANCES[_computed_in(model)]
    if not apart <= tolerance:
        raise Unproven(f"the gradient differs by {apart:.1%}")
    return done


class Unproven(Exception):
    """The fast way computes something else than the plain one."""


@contextmanager
def _adapters_that_matter(model: Any) -> Iterator[None]:
    """Give adapters random values meanwhile: a new one is zero, and so are half of its gradients."""
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            kept[name] = parameter.data
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data = noise.to(parameter.device, parameter.dtype)
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def _computed_in(model: Any) -> torch.dtype:
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def _gradients(model: Any, batches: list[dict[str, Tensor]], plain: bool = False) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters by the summed loss of some batches, and clear them."""
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        if plain:
            inputs = {name: inputs[name] for name in ("input_ids", "labels")}
        model(**inputs, num_items_in_batch=1, use_cache=False).loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients relative to the norm of the first."""
    if one.keys() != other.keys():
        return float("inf")
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (apart / sum(float(grad.square().sum()) for grad in one.values())) ** 0.5
