"""Attention for packed rows with PyTorch's variable-length kernel: no row sees another one, without any mask.

transformers offers the same only with the flash-attn package, which must be compiled for each machine; with a mask,
memory grows with the square of the packed length.
"""

from __future__ import annotations

from typing import Any

from include.errors import BadRecipe

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")  # arguments that transformers may pass


def use_varlen(model: Any) -> None:
    """Make a model on a GPU compute attention with `torch.nn.attention.varlen`.

    Its batches are one sequence of rows, each of which begins where `position_ids` (1 x tokens) is 0.

    Raises:
        BadRecipe: at the first batch, if the model's attention is not plain causal attention.
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
        causal = (-1, 0)
        out: Any = varlen_attn(
            query, key, value, starts, starts, longest, longest, scale=scaling, window_size=causal
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
