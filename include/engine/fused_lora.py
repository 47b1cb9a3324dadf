"""Adapters fused with the layers below them: one matrix product for x W' + scale (x A') B', rounded once.

The sum of two rounded products, as PEFT has it, takes more passes over memory, and in bfloat16 it loses every update of
an output by less than 0.4 %. Layers with the same input, as the projections of queries, keys and values, are one.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

ADAPTER = "default"  # PEFT's name of the adapter that is trained
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that have the same input


@torch.library.custom_op("retune::lora", mutates_args=())
def _lora(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, a: Tensor, b: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute layers with the same input: x W' + bias + scale (x A') B', as one product [x, x A'] [W, scale B]'.

    Args:
        x: tokens x inputs.
        weight: [W, scale B] (see `_write_adapters`), or 4-bit values and scales of each layer.
        bias: all outputs.
        a: (layers x rank) x inputs.
        b: all outputs x rank.
        sizes: outputs of each layer.

    Returns:
        The outputs (tokens x all outputs), and [x, x A'].
    """
    tokens, inputs = x.shape
    wide = x.new_empty(tokens, inputs + _columns(inputs, len(a)))
    wide[:, :inputs] = x
    torch.mm(x, a.t(), out=wide[:, inputs : inputs + len(a)])
    wide[:, inputs + len(a) :] = 0
    if len(weight) == 1:
        both = weight[0]
    else:
        both = a.new_empty(len(b), wide.shape[1])
        for rows, dense in zip(both.split(sizes), _dense(weight, a, sizes), strict=True):
            rows[:, :inputs] = dense
        _write_adapters(both, inputs, b, sizes, scale)
    return wide @ both.t() if bias is None else torch.addmm(bias, wide, both.t()), wide


@_lora.register_fake
def _(x: Tensor, weight: list[Tensor], bias: Any, a: Tensor, b: Tensor, sizes: list[int], scale: float) -> Any:
    return x.new_empty(x.shape[0], b.shape[0]), x.new_empty(x.shape[0], x.shape[1] + _columns(x.shape[1], len(a)))


@torch.library.custom_op("retune::lora_backward", mutates_args=())
def _lora_backward(
    grad: Tensor, wide: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, sizes: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B."""
    inputs, rank = a.shape[1], b.shape[1]
    x, low = wide[:, :inputs], wide[:, inputs : inputs + len(a)]
    grad_low, grad_b = torch.empty_like(low, memory_format=torch.contiguous_format), torch.empty_like(b)
    parts = zip(
        grad.split(sizes, 1), b.split(sizes), grad_b.split(sizes), low.split(rank, 1), grad_low.split(rank, 1),
        strict=True,
    )  # fmt: skip
    for part, up, grad_up, down, grad_down in parts:
        torch.mm(part, up, out=grad_down)
        torch.mm(part.t(), down, out=grad_up)
    grad_low *= scale
    grad_b *= scale
    dense = weight[0][:, :inputs] if len(weight) == 1 else torch.cat(_dense(weight, a, sizes))
    return (grad @ dense).addmm_(grad_low, a), grad_low.t() @ x, grad_b


@_lora_backward.register_fake
def _(grad: Tensor, wide: Tensor, weight: list[Tensor], a: Tensor, b: Tensor, sizes: list[int], scale: float) -> Any:
    return wide.new_empty(wide.shape[0], a.shape[1]), a.new_empty(a.shape), b.new_empty(b.shape)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    _, weight, _, a, b, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(output[1], a, b, *weight)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    wide, a, b, *weight = ctx.saved_tensors
    grad_x, grad_a, grad_b = _lora_backward(grad.contiguous(), wide, weight, a, b, ctx.sizes, ctx.scale)
    return grad_x, [None] * len(weight), None, grad_a, grad_b, None, None


_lora.register_autograd(_backward, setup_context=_save_for_backward)


def _columns(inputs: int, ranks: int) -> int:
    """Return the number of columns beside x and W, so many that matrix products are fast: rows of whole 16 bytes, in
    wide layers of whole 128 bytes."""
    multiple = 64 if inputs >= 2048 else 8
    return -(-ranks // multiple) * multiple


def _dense(weight: list[Tensor], a: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return W (outputs x inputs) of each layer from its 4-bit values and their scales."""
    dequantize = torch.ops.bitsandbytes.dequantize_4bit
    return [
        dequantize(packed, scales, 2 * packed.numel() // scales.numel(), "nf4", (outputs, a.shape[1]), a.dtype)
        for packed, scales, outputs in zip(weight[::2], weight[1::2], sizes, strict=True)
    ]


def _write_adapters(both: Tensor, inputs: int, b: Tensor, sizes: list[int], scale: float) -> None:
    """Write scale B beside W, those of several layers as a block diagonal matrix; the columns after it are 0."""
    rank = b.shape[1]
    columns = both[:, inputs:]
    columns.zero_()
    for place, (rows, up) in enumerate(zip(columns.split(sizes), b.split(sizes), strict=True)):
        rows[:, place * rank : (place + 1) * rank] = up * scale


class _Group:
    """Layers of one module with the same input and adapters of one shape. The first that is called computes all."""

    def __init__(self, layers: list[Any]):
        self.layers, self.outputs, self.left = layers, (), 0
        bases = [layer.get_base_layer() for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.weight = [tensor for base in bases for tensor in _tensors(base)]
        self.dense = len(self.weight) == len(bases)
        if self.dense:
            inputs = bases[0].in_features
            columns = _columns(inputs, len(bases) * layers[0].r[ADAPTER])
            both = self.weight[0].new_zeros(sum(self.sizes), inputs + columns)
            for base, rows in zip(bases, both.split(self.sizes), strict=True):
                rows[:, :inputs] = base.weight
                base.weight = torch.nn.Parameter(rows[:, :inputs], requires_grad=False)
            self.weight = [both]
        self.bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])

    def compute(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the output of each layer."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        a, b = (self._stacked(name).to(dtype) for name in ("lora_A", "lora_B"))
        bias, scale = None if self.bias is None else self.bias.to(dtype), self.layers[0].scaling[ADAPTER]
        y, _ = _lora(x.reshape(-1, x.shape[-1]).to(dtype), self.weight, bias, a, b, self.sizes, scale)
        return y.view(*x.shape[:-1], y.shape[-1]).split(self.sizes, -1)

    def write_adapters(self) -> None:
        """Write the adapters' present values beside the dense weights."""
        with torch.no_grad():
            b, scale = self._stacked("lora_B"), self.layers[0].scaling[ADAPTER]
            _write_adapters(self.weight[0], self.layers[0].in_features, b, self.sizes, scale)

    def _stacked(self, name: str) -> Tensor:
        return torch.cat([getattr(layer, name)[ADAPTER].weight for layer in self.layers])


def fuse_adapters(model: Any) -> tuple[int, int]:
    """Make layers with an adapter compute layer and adapter as one operation, and those of `GROUPS` together.

    Layers with dropout, a trained bias, or weights that are neither dense nor nf4 keep PEFT's way.

    Returns:
        The number of fused layers, and of all that have an adapter.
    """
    from peft.tuners.lora import LoraLayer

    fused, total, dense = 0, 0, []
    for parent in model.modules():
        adapted = {name: child for name, child in parent.named_children() if isinstance(child, LoraLayer)}
        left: dict[str, Any] = {name: layer for name, layer in adapted.items() if _can_be_fused(layer)}
        total, fused = total + len(adapted), fused + len(left)
        groups = [names for names in GROUPS if left.keys() >= set(names) and len({_kind(left[n]) for n in names}) == 1]
        while groups or left:
            names = groups.pop() if groups else (next(iter(left)),)
            layers = [left.pop(name) for name in names]
            group = _Group(layers)
            dense += [group] if group.dense else []
            for place, layer in enumerate(layers):
                layer.group, layer.place, layer.__class__ = group, place, _fused_class(layer.__class__)

    def write_adapters(*_: Any) -> None:
        for group in dense:
            group.write_adapters()

    model.register_forward_pre_hook(write_adapters)
    return fused, total


def _can_be_fused(layer: Any) -> bool:
    from bitsandbytes.nn import Linear4bit
    from torch.nn import Identity, Linear

    base = layer.get_base_layer()
    weight: Any = getattr(base, "weight", None)
    return (
        list(layer.lora_A) == [ADAPTER] == layer.active_adapters
        and isinstance(layer.lora_dropout[ADAPTER], Identity)
        and not (layer.lora_variant or layer.lora_bias[ADAPTER] or layer.fan_in_fan_out or layer.merged)
        and (type(base) is Linear or (isinstance(base, Linear4bit) and weight.quant_state.quant_type == "nf4"))
        and not any(parameter.requires_grad for parameter in base.parameters())
    )


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return what layers that are computed together have in common."""
    base = layer.get_base_layer()
    return type(base), base.in_features, base.bias is None, layer.r[ADAPTER], layer.scaling[ADAPTER]


def _tensors(base: Any) -> list[Tensor]:
    """Return the dense weight of a layer, or its 4-bit values and their scales in 32 bits."""
    weight: Any = base.weight
    if type(base) is torch.nn.Linear:
        return [weight]
    state: Any = weight.quant_state
    if state.nested:  # the scales are quantized, too: dense ones take 6 % of the layer's memory and save a kernel
        from bitsandbytes.functional import dequantize_blockwise

        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
    return [weight.data, state.absmax]


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
