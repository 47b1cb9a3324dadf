"""4-bit weights turned into dense ones once, where memory allows: bitsandbytes does it at each call otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARGIN = 2  # available memory over the bytes of the dense weights


def dequantize(model: Any) -> None:
    """Replace the 4-bit layers of a model by dense ones with the same values, in the type they are computed in."""
    import torch

    for parent, name, layer in list(_quantized(model)):
        dense = torch.nn.Linear(layer.in_features, layer.out_features, device="meta")
        dense.weight = torch.nn.Parameter(dense_weight(layer), requires_grad=False)
        dense.bias = layer.bias
        setattr(parent, name, dense)


def dense_weight(layer: Any) -> Any:
    """Return the dense weight (outputs x inputs) of a 4-bit layer, as the layer's own forward pass computes it."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype or weight.dtype)


def dense_bytes(model: Any) -> int:
    """Return the bytes that the dense weights of a model's 4-bit layers take."""
    return sum(
        layer.in_features * layer.out_features * (layer.compute_dtype or layer.weight.quant_state.dtype).itemsize
        for _, _, layer in _quantized(model)
    )


def fits_dense(model: Any) -> bool:
    """Return whether the dense weights take at most half of the memory that is available on the model's device."""
    import torch

    on_gpu = model.device.type == "cuda"
    available = torch.cuda.mem_get_info(model.device)[0] if on_gpu else available_host_memory()
    return MARGIN * dense_bytes(model) <= available


def available_host_memory() -> int:
    """Return the bytes of host memory that can still be used: of the machine, and of the control group's limit."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(used.read_text()))
    return available


def _quantized(model: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield each 4-bit layer with its parent and its name there."""
    from bitsandbytes.nn import Linear4bit

    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, Linear4bit):
                yield parent, name, child
