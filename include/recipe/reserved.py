"""Arguments of TRL and transformers that a recipe cannot pass on: they have a field of their own, or Retune decides."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

TRAINING_INSTEAD = {
    "max_length": "max_seq_length",
    "load_best_model_at_end": "early_stopping_patience",
    "metric_for_best_model": "early_stopping_patience",
    "greater_is_better": "early_stopping_patience",
    "packing_strategy": "packing",
    "gradient_checkpointing": "fit_device",
    "auto_find_batch_size": "fit_device",
    "push_to_hub": "registry",
    "run_name": "name",
}
TRAINING_DECIDED = frozenset(
    # files, logs and checkpoints: a later try needs them to resume
    "output_dir do_train do_eval do_predict resume_from_checkpoint ignore_data_skip enable_jit_checkpoint disable_tqdm "
    "save_strategy save_only_model save_on_each_node logging_strategy logging_nan_inf_filter "
    "include_num_input_tokens_seen hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token "
    # the device
    "bf16 fp16 bf16_full_eval fp16_full_eval tf32 use_cpu use_liger_kernel deepspeed fsdp fsdp_config "
    "parallelism_config accelerator_config ddp_backend ddp_find_unused_parameters local_rank "
    # model and rows: the engine passes them loaded, tokenized and masked
    "model_init_kwargs trust_remote_code remove_unused_columns label_names dataset_kwargs dataset_num_proc "
    "dataset_text_field shuffle_dataset chat_template_path eos_token pad_token truncation_mode padding_free "
    "eval_packing assistant_only_loss completion_only_loss".split()
)
GENERATION_INSTEAD = {"max_length": "max_new_tokens"}
GENERATION_DECIDED = frozenset(
    # token ids come from the chat template and the tokenizer; only one answer per prompt is read
    "eos_token_id pad_token_id bos_token_id decoder_start_token_id stop_strings token_healing num_return_sequences "
    "return_dict_in_generate output_attentions output_hidden_states output_scores output_logits is_assistant "
    # strategies that need code from the Hub
    "low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids".split()
)


def refuse_reserved(
    arguments: Mapping[str, Any], fields: Container[str], instead: Mapping[str, str], decided: Container[str]
) -> None:
    """Refuse arguments that a recipe must not set.

    Args:
        fields: names of the recipe's fields.
        instead: by name, the recipe field to use instead.
        decided: names of arguments that Retune sets itself.

    Raises:
        ValueError: a name is one of these.
    """
    for name in arguments:
        if name in fields or name in instead:
            raise ValueError(f"'{name}' is not allowed here: set the recipe field {instead.get(name, name)} instead")
        if name in decided:
            raise ValueError(f"'{name}' is not allowed here: Retune decides it")
