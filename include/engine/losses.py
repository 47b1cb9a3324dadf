"""Jobs that measure: losses of holdout rows by the base and by adapters; logits of two copies of an adapter."""

from __future__ import annotations

import math
from typing import Any

from include.chat.tokenized import IGNORED, load_rows
from include.engine.device_plan import find_device
from include.engine.jobs import LogitsJob, LogitsResult, LossesJob, LossesResult, Progress
from include.engine.model import variants, weight_bits
from include.errors import BadData

# padded tokens of one forward pass: on a GPU the logits of a 128k vocabulary then take 2 GB; a CPU has nothing to gain
# from a large batch, and the system spends time on fresh memory for it
BATCH_TOKENS = {"cuda": 4096, "cpu": 1024}

Sequence = tuple[list[int], list[int]]  # ids and labels


def losses(job: LossesJob, progress: Progress) -> LossesResult:
    """Measure the loss of each holdout row, by the base and by each adapter or whole model.

    It is the mean cross entropy of the trained tokens in nats; with `method: dpo` the loss of DPO (Rafailov et al.
    2023, equation 7), for which the base is the reference and has log 2.

    Raises:
        BadData: a loss is not finite.
        NotFound: the base or an adapter cannot be loaded.
    """
    import numpy as np
    import torch

    recipe, device, rows = job.recipe, find_device(), load_rows(job.rows)
    rows = rows.select(range(min(job.max_rows, len(rows))))
    pairs = recipe.method == "dpo"
    sequences = _sequences(rows, pairs)
    tokens = [sum(label != IGNORED for label in labels[1:]) for _, labels in sequences]
    losses: dict[str, list[float]] = {}
    references: list[float] = []
    with torch.inference_mode():
        for name, model in variants(job.base, job.adapters, device, weight_bits(recipe), job.new_tokens):
            sums = _log_likelihoods(model, sequences, device.device, progress)
            if pairs:
                margins = [chosen - rejected for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)]
                references = references or margins
                losses[name] = np.logaddexp(0, -recipe.beta * (np.array(margins) - references)).tolist()
            else:
                losses[name] = [-total / count for total, count in zip(sums, tokens, strict=True)]
            if any(not math.isfinite(loss) for loss in losses[name]):
                raise BadData("a holdout row's loss is not a number", "The adapter or the base is damaged; train again")
            progress(f"{name}: {len(rows)} rows measured")
    if pairs:
        tokens = [chosen + rejected for chosen, rejected in zip(tokens[::2], tokens[1::2], strict=True)]
    return LossesResult(row=list(rows["row"]), tokens=tokens, losses=losses, device=device)


def _sequences(rows: Any, pairs: bool) -> list[Sequence]:
    """Return ids and labels of each row; of a pair those with the chosen answer, then those with the rejected one."""
    if not pairs:
        return [(row["input_ids"], row["labels"]) for row in rows]
    return [
        (row["prompt_ids"] + row[answer], [IGNORED] * len(row["prompt_ids"]) + row[answer])
        for row in rows
        for answer in ("chosen_ids", "rejected_ids")
    ]


def _log_likelihoods(model: Any, sequences: list[Sequence], device: str, progress: Progress) -> list[float]:
    """Return the log-likelihood (nats) of each sequence's trained tokens; halve the batches when memory runs out."""
    import torch

    batch_tokens = BATCH_TOKENS[device]
    while True:
        try:
            return _batched_log_likelihoods(model, sequences, device, batch_tokens)
        except torch.OutOfMemoryError:
            if batch_tokens <= min(len(ids) for ids, _ in sequences):
                raise
            batch_tokens //= 2
            progress(f"out of memory: measuring in batches of {batch_tokens:,} tokens")
            if device == "cuda":
                torch.cuda.empty_cache()


def _batched_log_likelihoods(model: Any, sequences: list[Sequence], device: str, batch_tokens: int) -> list[float]:
    """Return the log-likelihoods, computed in batches of at most so many padded tokens."""
    import torch
    from torch.nn.functional import cross_entropy, pad
    from torch.nn.utils.rnn import pad_sequence

    lengths = [len(ids) for ids, _ in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)
    sums = [0.0] * len(sequences)
    while order:
        batch = [order.pop(0)]
        while order and (len(batch) + 1) * lengths[order[0]] <= batch_tokens:
            batch.append(order.pop(0))
        chosen = [sequences[i] for i in batch]
        ids = pad_sequence([torch.tensor(ids) for ids, _ in chosen], batch_first=True).to(device)
        labels = pad_sequence([torch.tensor(labels) for _, labels in chosen], batch_first=True, padding_value=IGNORED)
        mask = pad_sequence([torch.ones(len(ids)) for ids, _ in chosen], batch_first=True).to(device)
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED).to(device)  # the token after each
        trained = targets != IGNORED
        entropies = cross_entropy(_logits(model, ids, mask, trained), targets[trained], reduction="none")
        for i, entropy in zip(batch, entropies.split(trained.sum(1).tolist()), strict=True):
            sums[i] = -entropy.sum().item()
    return sums


def _logits(model: Any, ids: Any, mask: Any, wanted: Any) -> Any:
    """Return the logits (float32) at the wanted positions; the head computes no others.

    Args:
        ids, mask: rows x tokens.
        wanted: rows x tokens, boolean.

    Returns:
        wanted positions, row by row, x vocabulary.
    """

    def only_wanted(_: Any, inputs: tuple[Any, ...]) -> Any:
        return (inputs[0][wanted][None], *inputs[1:])

    head = model.get_output_embeddings()
    if head is None:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[wanted].float()
    hook = head.register_forward_pre_hook(only_wanted)
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def logits(job: LogitsJob, progress: Progress) -> LogitsResult:
    """Compare the logits of two copies of an adapter on the same ids.

    Raises:
        NotFound: the base or an adapter cannot be loaded.
    """
    import torch

    device, found = find_device(), {}
    copies = {"tested": job.tested, "published": job.published}
    with torch.inference_mode():
        for name, model in variants(job.base, copies, device, weight_bits(job.recipe), job.new_tokens):
            prompts = [torch.tensor([ids], device=device.device) for ids in job.prompts]
            found[name] = [model(input_ids=prompt).logits.float() for prompt in prompts]
    both = list(zip(found["tested"], found["published"], strict=True))
    return LogitsResult(
        largest_difference=max((one - other).abs().max().item() for one, other in both),
        same_tokens=all(bool((one.argmax(-1) == other.argmax(-1)).all()) for one, other in both),
    )
