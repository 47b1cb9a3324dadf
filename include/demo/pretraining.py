"""The demo's base model: a Llama of a million parameters, pretrained on the village's texts in a minute or two."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from include.demo.village import good_conversations, pretraining_text

SETTINGS: dict[str, Any] = {
    "seed": 1961,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "window": 128,  # tokens of a training sequence
    "batch": 4,  # sequences
    "steps": 1600,
    "warmup": 20,  # steps
    "lr": 3e-3,
    "weight_decay": 0.01,
}

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _train_tokenizer(documents: list[str]):
    """Train a byte-level BPE tokenizer, built like Llama 3's, on the documents and the texts of the conversations."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SETTINGS["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    chats = [turn["value"] for turns in good_conversations(random.Random(0)) for turn in turns]
    bpe.train_from_iterator([*documents, *chats], trainer)
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, bpe.token_to_id(bos))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def pretrain(folder: Path, log: Callable[[str], None]) -> dict:
    """Train tokenizer and model from scratch on `pretraining_text`, and save both (safetensors).

    The weights are the same on every run on one machine; another processor may round differently.

    Args:
        folder: where to save.
        log: called with a progress line every 25 steps.

    Returns:
        `parameters` and `tokens` (trained on), `seconds` (wall time), `first_loss` and `last_loss` (mean over the first
        and the last ten steps, nats per token).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    start = time.monotonic()
    documents = list(pretraining_text())
    tokenizer = _train_tokenizer(documents)
    token_id = tokenizer.convert_tokens_to_ids
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SETTINGS["hidden_size"],
        intermediate_size=SETTINGS["intermediate_size"],
        num_hidden_layers=SETTINGS["layers"],
        num_attention_heads=SETTINGS["heads"],
        num_key_value_heads=SETTINGS["kv_heads"],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=token_id("<|begin_of_text|>"),
        eos_token_id=[token_id("<|end_of_text|>"), token_id("<|eot_id|>")],
        pad_token_id=token_id("<|finetune_right_pad_id|>"),
    )
    window, batch, steps = SETTINGS["window"], SETTINGS["batch"], SETTINGS["steps"]
    encoded = tokenizer([f"{document}<|end_of_text|>" for document in documents])["input_ids"]
    stream = torch.tensor([token for document in encoded for token in document])
    windows = stream[: steps * batch * window].view(-1, window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SETTINGS["seed"])
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=SETTINGS["lr"], betas=(0.9, 0.98), weight_decay=SETTINGS["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / SETTINGS["warmup"], (steps - step) / (steps - SETTINGS["warmup"])),
        )
        losses = []
        model.train()
        for step in range(steps):
            tokens = windows[step * batch : (step + 1) * batch]
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if (step + 1) % 25 == 0 or step + 1 == steps:
                log(f"pretraining step {step + 1}/{steps}: loss {losses[-1]:.3f}, {time.monotonic() - start:.0f} s")
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": model.num_parameters(),
        "tokens": steps * batch * window,
        "seconds": round(time.monotonic() - start, 1),
        "first_loss": round(sum(losses[:10]) / len(losses[:10]), 4),
        "last_loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
    }
