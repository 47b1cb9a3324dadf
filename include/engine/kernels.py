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
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that have the same input
CHUNK = 2048  # tokens whose logits are in memory at once
PROBE = [{"input_ids": ids, "labels": ids} for ids in (list(range(3, 27)), list(range(5, 22)))]  # rows for the proof
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # of the gradient, relative to its norm


# ---- adapters and the layers below them as one operation


@torch.library.custom_op("retune::lora", mutates_args=())
def _lora(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute layers with the same input.

    Args:
        x: tokens x inputs.
        weight: one dense weight (all outputs x inputs), or 4-bit values and scales of each layer.
        bias: all outputs.
        a: (layers x rank) x inputs.
        b: all outputs x rank.
        sizes: outputs of each layer.

    Returns:
        x W' + bias + scale (x A') B' (tokens x all outputs), and x A' (tokens x (layers x rank)).
    """
    low, dense = x @ a.t(), _dense(weight, a, sizes)
    y = x @ dense.t() if bias is None else torch.addmm(bias, x, dense.t())
    for part, up, down in zip(y.split(sizes, 1), b.split(sizes), low.split(b.shape[1], 1), strict=True):
        part.addmm_(down, up.t(), alpha=scale)
    return y, low


@_lora.register_fake
def _(x: Tensor, weight: list[Tensor], bias: Any, a: Tensor, b: Tensor, sizes: list[int], scale: float) -> Any:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], a.shape[0])


@torch.library.custom_op("retune::lora_backward", mutates_args=())
def _lora_backward(
    grad: Tensor, x: Tensor, low: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B."""
    grad_low, grad_b, rank = torch.empty_like(low), torch.empty_like(b), b.shape[1]
    parts = zip(
        grad.split(sizes, 1), b.split(sizes), grad_b.split(sizes), low.split(rank, 1), grad_low.split(rank, 1),
        strict=True,
    )  # fmt: skip
    for part, up, grad_up, down, grad_down in parts:
        torch.mm(part, up, out=grad_down)
        torch.mm(part.t(), down, out=grad_up)
    grad_low *= scale
    grad_b *= scale
    grad_x = (grad @ _dense(weight, a, sizes)).addmm_(grad_low, a)
    return grad_x, grad_low.t() @ x, grad_b


@_lora_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, sizes: list[int], scale: float
) -> Any:
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, a, b, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(x, output[1], a, b, *weight)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    x, low, a, b, *weight = ctx.saved_tensors
    grad_x, grad_a, grad_b = _lora_backward(grad.contiguous(), x, low, weight, a, b, ctx.sizes, ctx.scale)
    return grad_x, [None] * len(weight), None, grad_a, grad_b, None, None


_lora.register_autograd(_backward, setup_context=_save_for_backward)


def _dense(weight: list[Tensor], a: Tensor, sizes: list[int]) -> Tensor:
    """Return the weight (all outputs x inputs): as it is, or from the 4-bit values and scales of each layer."""
    if len(weight) == 1:
        return weight[0]
    dense = a.new_empty(sum(sizes), a.shape[1])
    for packed, scales, part in zip(weight[::2], weight[1::2], dense.split(sizes), strict=True):
        block = 2 * packed.numel() // scales.numel()
        torch.ops.bitsandbytes.dequantize_4bit.out(packed, scales, block, "nf4", part.shape, part.dtype, out=part)
    return dense


class _Group:
    """Layers of one module with the same input and adapters of one shape. The first that is called computes all."""

    def __init__(self, layers: list[Any]):
        self.layers, self.outputs, self.left = layers, (), 0
        bases = [layer.get_base_layer() for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.weight = [tensor for base in bases for tensor in _tensors(base)]
        if type(bases[0]) is torch.nn.Linear:
            self.weight = [torch.cat(self.weight)] if len(layers) > 1 else self.weight
            for base, part in zip(bases, self.weight[0].split(self.sizes), strict=True):
                base.weight = torch.nn.Parameter(part, requires_grad=False)
        self.bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        a, b = (
            torch.cat([getattr(layer, name)[ADAPTER].weight for layer in self.layers]).to(dtype)
            for name in ("lora_A", "lora_B")
        )
        bias, scale = None if self.bias is None else self.bias.to(dtype), self.layers[0].scaling[ADAPTER]
        y, _ = _lora(x.reshape(-1, x.shape[-1]).to(dtype), self.weight, bias, a, b, self.sizes, scale)
        return y.view(*x.shape[:-1], y.shape[-1]).split(self.sizes, -1)


def fuse_adapters(model: Any) -> tuple[int, int]:
    """Make layers with an adapter compute layer and adapter as one operation, and those of `GROUPS` together.

    Layers with dropout, a trained bias, or weights that are neither dense nor nf4 keep PEFT's way.

    Returns:
        The number of fused layers, and of all that have an adapter.
    """
    from peft.tuners.lora import LoraLayer

    fused = total = 0
    for parent in model.modules():
        adapted = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        left = {name: layer for name, layer in adapted.items() if _can_be_fused(layer)}
        total, fused = total + len(adapted), fused + len(left)
        groups = [names for names in GROUPS if left.keys() >= set(names) and len({_kind(left[n]) for n in names}) == 1]
        while groups or left:
            names = groups.pop() if groups else (next(iter(left)),)
            layers = [left.pop(name) for name in names]
            group = _Group(layers)
            for place, layer in enumerate(layers):
                layer.group, layer.place, layer.__class__ = group, place, _fused_class(type(layer))
    return fused, total


def _can_be_fused(layer: Any) -> bool:
    from bitsandbytes.nn import Linear4bit
    from torch.nn import Identity, Linear

    base: Any = layer.get_base_layer()
    return (
        list(layer.lora_A) == [ADAPTER] == layer.active_adapters
        and isinstance(layer.lora_dropout[ADAPTER], Identity)
        and not (layer.lora_variant or layer.lora_bias[ADAPTER] or layer.fan_in_fan_out or layer.merged)
        and (type(base) is Linear or (isinstance(base, Linear4bit) and base.weight.quant_state.quant_type == "nf4"))
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return what layers that are computed together have in common."""
    base = layer.get_base_layer()
    return type(base), base.in_features, base.bias is None, layer.r[ADAPTER], layer.scaling[ADAPTER]


def _tensors(base: Any) -> list[Tensor]:
    """Return the dense weight of a layer, or its 4-bit values and their scales in 32 bits."""
    if not hasattr(base.weight, "quant_state"):
        return [base.weight]
    state = base.weight.quant_state
    if state.nested:  # the scales are quantized, too: dense ones take 6 % of the layer's memory and save a kernel
        from bitsandbytes.functional import dequantize_blockwise

        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
    return [base.weight.data, state.absmax]


@cache
def _fused_class(plain: Any) -> Any:
    """Return a subclass of one of PEFT's classes of layers, with the fused forward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        group = self.group
        if not group.left:
            group.outputs, group.left = group.compute(x), len(group.sizes)
        output: Tensor = group.outputs[self.place]
        group.left -= 1
        if not group.left:
            group.outputs = ()
        return output

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
    slope: Any = 1.0
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
        hidden = self.base_model(**inputs).last_hidden_state[0].index_select(0, trained).to(head.dtype)
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
        fused, adapted = fuse_adapters(model)
        done = ["rows joined without padding"]
        if fused:
            done.append(f"{fused} of {adapted} adapters fused with their layers")
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
