"""Linear layers of a model on a CPU computed by oneDNN: PyTorch gives float32 to MKL, which is two to three times
slower on some CPUs, and slowest for the few rows of a token step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from include.engine.dequantize import MARGIN, available_host_memory


@contextmanager
def packed_for_cpu(model: Any) -> Iterator[None]:
    """Compute the float32 linear layers of a model on a CPU by oneDNN while the context is open; without gradients.

    The results differ by rounding only. oneDNN has the weights a second time, in its own order, where memory allows;
    otherwise, and on a GPU, the layers stay as they are.
    """
    import torch

    layers = [module for module in model.modules() if _can_pack(module)]
    weights = {id(layer.weight): layer.weight for layer in layers}
    size = sum(weight.nbytes for weight in weights.values())
    if not torch.backends.mkldnn.is_available() or MARGIN * size > available_host_memory():
        layers = []
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.forward = partial(_linear, packed, layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_pack(module: Any) -> bool:
    import torch

    plain = type(module) is torch.nn.Linear and "forward" not in vars(module)
    return plain and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _linear(packed: Any, bias: Any, x: Any) -> Any:
    """Return x W' + bias; this is what PyTorch's compiler calls for a model whose weights do not change."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
