"""Rows joined into one sequence: the batches, attention that keeps the rows apart, and the proof that it does.

transformers has such attention only with the flash-attn package, which must be compiled for each machine; with a mask,
memory grows with the square of the joined length.
"""

from __future__ import annotations

import inspect
from typing import Any

from include.chat.tokenized import IGNORED
from include.errors import BadRecipe

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments that transformers may pass
PROBE = 8  # tokens of each row
SHORT = 400  # tokens
SHAPES, ROWS = 512, 32  # with few shapes, the numbers of tokens and of rows are multiples of these


class JoinRows:
    """Make a batch of rows, or of packed sequences of rows: one sequence without padding.

    The batch has `input_ids`, `labels`, `position_ids` (each 1 x tokens), `cu_seq_lens_q` (rows + 1: where each row
    begins, and the end), `trained` (positions whose next token is trained), `targets` (these tokens) and `tokens`
    (their number). They are computed before the batch is on the device, so that the host need not wait for it.

    Args:
        padded: tokens that no row exceeds, if the shapes of batches are to be few (for CUDA graphs): rows of padding
            are added, none longer than this.
    """

    def __init__(self, padded: int | None = None):
        self._padded = padded

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows with `input_ids` and `labels`, packed ones with `seq_lengths`."""
        import numpy as np
        import torch

        lengths = [n for example in examples for n in example.get("seq_lengths") or [len(example["input_ids"])]]
        ids, labels = (
            np.concatenate([example[name] for example in examples]).astype(np.int64) for name in ("input_ids", "labels")
        )
        tokens, ends = len(ids), np.cumsum(lengths)
        labels[[0, *ends[:-1]]] = IGNORED  # the first token of a row has nothing before it
        trained = np.flatnonzero(labels[1:] != IGNORED)
        targets = labels[trained + 1]
        if self._padded:
            padding = -tokens % SHAPES
            lengths += [min(self._padded, padding - start) for start in range(0, padding, self._padded)]
            lengths += [0] * (-len(lengths) % ROWS)
            ids, labels = np.pad(ids, (0, padding)), np.pad(labels, (0, padding), constant_values=IGNORED)
            unused = np.arange(-len(trained) % max(SHAPES, len(ids) // 16)) % len(ids)
            trained = np.concatenate([trained, unused])
            targets = np.pad(targets, (0, len(unused)), constant_values=IGNORED)
            ends = np.cumsum(lengths)
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(ends - lengths, lengths))[None],
            "cu_seq_lens_q": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            "trained": torch.from_numpy(trained),
            "targets": torch.from_numpy(targets),
            "tokens": tokens,
        }


def join_rows(model: Any, longest: int | None = None) -> None:
    """Make a model take joined rows, each of which begins where `position_ids` (1 x tokens) is 0, and compute their
    attention apart: on a GPU with `torch.nn.attention.varlen`, on a CPU row by row.

    Args:
        longest: tokens that no row exceeds; None to find the longest one in each batch, for which the host waits.

    Raises:
        BadRecipe: at the first batch, if the model's attention is not plain causal attention, with windows or without.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    attend_rows = _attend_on_gpu() if model.device.type == "cuda" else torch.compiler.disable(_attend_on_cpu)

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, cu_seq_lens_q: Any = None,
        max_length_q: Any = None, **arguments: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        if unsupported := [name for name in UNSUPPORTED if arguments.get(name) is not None]:
            raise BadRecipe(
                f"field 'packing': the base's attention has {', '.join(unsupported)}, which packed rows do not get",
                "Set packing to false",
            )
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # tokens x heads x size
        window = arguments.get("sliding_window")  # tokens that a token sees, itself included
        return attend_rows(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)[None], None

    def find_rows(_: Any, positional: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions, starts = arguments["position_ids"], arguments.get("cu_seq_lens_q")
        if starts is None:
            starts = torch.nonzero(positions[0] == 0).flatten()
            starts = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
        most = longest or int(positions.max()) + 1
        return positional, {**arguments, "cu_seq_lens_q": starts, "max_length_q": most}

    AttentionInterface.register("rows", attend)
    AttentionMaskInterface.register("rows", lambda *_, **__: None)
    model.set_attn_implementation("rows")
    model.base_model.register_forward_pre_hook(find_rows, with_kwargs=True)


def _attend_on_gpu() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer heads of keys than of queries without this argument
    grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def attend(query: Any, key: Any, value: Any, starts: Any, longest: int, scale: Any, window: int | None) -> Any:
        window_size = (-1 if window is None else window - 1, 0)
        return varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scale, window_size=window_size, **grouped
        )

    return attend


def _attend_on_cpu(query: Any, key: Any, value: Any, starts: Any, longest: int, scale: Any, window: int | None) -> Any:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    rows = []
    for parts in zip(*(states.split(starts.diff().tolist()) for states in (query, key, value)), strict=True):
        mask, tokens = None, len(parts[0])
        if window is not None and tokens > window:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)
        # for short rows PyTorch's attention in bfloat16 takes more than twice the time
        q, k, v = (
            states.transpose(0, 1)[None].to(torch.float32 if tokens < SHORT else query.dtype) for states in parts
        )
        row = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True)
        rows.append(row[0].transpose(0, 1).to(query.dtype))
    return torch.cat(rows)


def check_packing(model: Any) -> None:
    """Prove that no row of a packed sequence sees another one: the logits of a row do not depend on the row before it.

    Layers other than attention (convolutions, linear attention, state spaces) and attention with a mask of its own
    ignore where rows begin, and training with them would go on without an error.

    Args:
        model: as it computes packed sequences, with embeddings and head.

    Raises:
        BadRecipe: a row sees another one.
    """
    import torch

    embedded: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> Any:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    training = model.training
    try:
        rows = torch.arange(PROBE, device=model.device)
        ids, positions = torch.cat([rows, rows + 1])[None] + 3, torch.cat([rows, rows])[None]
        logits = model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, PROBE:].float().square().sum(), embedded)
    finally:
        hook.remove()
        model.train(training)
    if gradient[0, :PROBE].any():
        raise BadRecipe(
            "field 'packing': in this base the rows of a packed sequence see each other", "Set packing to false"
        )
