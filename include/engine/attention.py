"""Packed rows: the proof that no row sees another one, and attention with PyTorch's variable-length kernel.

transformers has such a kernel only with the flash-attn package, which must be compiled for each machine; with a mask,
memory grows with the square of the packed length.
"""

from __future__ import annotations

from typing import Any

from include.errors import BadRecipe

UNSUPPORTED = ("softcap", "s_aux", "position_bias")  # arguments that transformers may pass
PROBE = 8  # tokens of each row


def use_varlen(model: Any) -> None:
    """Make a model on a GPU compute attention with `torch.nn.attention.varlen`.

    Its batches are one sequence of rows, each of which begins where `position_ids` (1 x tokens) is 0.

    Raises:
        BadRecipe: at the first batch, if the model's attention is not plain causal attention, with windows or without.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, cu_seq_lens_q: Any = None,
        max_length_q: Any = None, **arguments: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        if unsupported := [name for name in UNSUPPORTED if arguments.get(name) is not None]:
            raise BadRecipe(
                f"field 'packing': the base's attention has {', '.join(unsupported)}, which packed rows do not get",
                "Set packing to false",
            )
        groups = module.num_key_value_groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # tokens x heads x size
        starts, longest = cu_seq_lens_q, max_length_q
        window = arguments.get("sliding_window")  # tokens that a token sees, itself included
        out: Any = varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
        )  # fmt: skip
        return out[None], None

    def find_rows(_: Any, positional: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions: Any = arguments["position_ids"]
        starts = torch.nonzero(positions[0] == 0).flatten()
        starts = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
        return positional, {**arguments, "cu_seq_lens_q": starts, "max_length_q": int(positions.max()) + 1}

    AttentionInterface.register("varlen", attend)
    AttentionMaskInterface.register("varlen", lambda *_, **__: None)
    model.set_attn_implementation("varlen")
    model.base_model.register_forward_pre_hook(find_rows, with_kwargs=True)


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
