"""The fast way through a training step: fused adapters, a loss on trained tokens only, compiled layers.

Each part computes the same as the plain way (PEFT, TRL, transformers) with fewer passes over memory, and `use_kernels`
proves it on the base at hand before the first step. What a part does not know keeps the plain way.

The fused adapter and the loss that has its gradient ready follow Unsloth and Liger-Kernel (arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from include.chat.tokenized import IGNORED
from include.engine.attention import JoinRows, check_packing, join_rows
from include.engine.device_plan import CHUNK
from include.engine.fused_lora import fuse_adapters

SMALL = 0.002  # standard deviation of an adapter's B during the proof
PROBE = (48, 33)  # tokens of the rows that the proof computes
# of a gradient, relative to its norm: in bfloat16 the plain way itself differs by as much from one batch to the next
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25}


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
    scaled = logits.float() if scale == 1 else logits.float() * scale
    factor: Any = (targets[:, None] != IGNORED) * scale
    if cap:
        squashed = torch.tanh(scaled / cap)
        scaled, factor = squashed * cap, (1 - squashed * squashed) * factor
    log_sum = scaled.logsumexp(-1, keepdim=True)
    loss = log_sum - scaled.gather(1, targets[:, None].clamp(min=0))
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    grad = (scaled - log_sum).exp_().add_(is_target, alpha=-1).mul_(factor)
    return (loss * (targets[:, None] != IGNORED)).sum(), grad.to(logits.dtype)


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


def use_kernels(
    model: Any, rows: Sequence[Mapping[str, Any]], longest: int, options: Mapping[str, Any] | None
) -> list[str]:
    """Give a model all parts of the fast way that it can have, and prove that its gradients stay the same.

    Args:
        model: the model to train, or PEFT's around it, on its device. It is of no use after an error.
        rows: some of those to train on, of which the first two are used for the proof.
        longest: tokens that no row exceeds.
        options: of `torch.compile`; None to compile nothing.

    Returns:
        What was done, for people.

    Raises:
        Unproven: the fast way computes something else than the plain one.
        BadRecipe: see `join_rows` and `check_packing`.
    """
    probe = [list(rows[place % len(rows)]["input_ids"][:tokens]) for place, tokens in enumerate(PROBE)]
    probes = [{"input_ids": ids, "labels": ids} for ids in probe]
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal.get_output_embeddings()
    random = any(isinstance(module, torch.nn.Dropout) and module.p for module in model.modules())
    training = model.training
    model.train(not random)
    with _adapters_that_matter(model):
        expected = _gradients(model, [JoinRows()([row]) for row in probes], plain=True)
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
        found = _gradients(model, [JoinRows()(probes)])
    model.train(training)
    for kind in ("lora_A", "lora_B", ""):
        apart = _difference(*({name: grad for name, grad in g.items() if kind in name} for g in (expected, found)))
        if not apart <= TOLERANCES[_computed_in(model)]:
            raise Unproven(f"the gradient differs by {apart:.1%}{' in ' + kind if kind else ''}")
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
            noise = torch.randn(parameter.shape, generator=generator) * SMALL
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
    return (apart / max(sum(float(grad.square().sum()) for grad in one.values()), 1e-30)) ** 0.5
