"""Attention for packed rows by PyTorch's variable-length kernel: no row sees another, and no mask is ever made.

transformers has the like only for the flash-attn package, which must be compiled for each machine; with a mask, memory
grows with the square of the packed length.
"""

from __future__ import annotations

from typing import Any

from include.errors import BadRecipe

NOT_DONE = ("sliding_window", "softcap", "s_aux", "position_bias")  # of what transformers may ask for


def use_varlen(model: Any) -> None:
    """Let a model on a GPU attend by `torch.nn.attention.varlen`.

    Its batches are one sequence of rows, each of which begins where `position_ids` (1 x tokens) is 0.

    Raises:
        BadRecipe: at the first batch, if the model's attention is more than causal.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import repeat_kv

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, cu_seq_lens_q: Any = None,
        max_length_q: Any = None, **more: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        if asked := [name for name in NOT_DONE if more.get(name) is not None]:
            raise BadRecipe(
                f"field 'packing': the base's attention has {', '.join(asked)}, which packed rows do not get here",
                "Set packing to false",
            )
        groups = module.num_key_value_groups
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # tokens x heads x size
        rows, longest = cu_seq_lens_q, max_length_q
        out: Any = varlen_attn(
            query,
            key,
            value,
            rows,
            rows,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal
        )
        return out[None], None

    def find_rows(_: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions: Any = named["position_ids"]
        starts = torch.nonzero(positions[0] == 0).flatten()
        ends = torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
        return arguments, {**named, "cu_seq_lens_q": ends, "max_length_q": int(positions.max()) + 1}

    AttentionInterface.register("varlen", attend)
    AttentionMaskInterface.register("varlen", lambda *_, **__: None)
    model.set_attn_implementation("varlen")
    model.base_model.register_forward_pre_hook(find_rows, with_kwargs=True)
