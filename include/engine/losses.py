"""Jobs that measure: losses of holdout rows by the base and by adapters; logits, to compare two copies."""

from __future__ import annotations

import math
from typing import Any

from include.chat.tokenized import IGNORED, load_rows
from include.engine.device_plan import make_plan
from include.engine.model import variants
from include.errors import BadData

BATCH_TOKENS = 4096  # padded tokens of one forward pass: the logits of a 128k vocabulary then take 2 GB


def losses(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """The loss of each holdout row, by the base and by each adapter or whole model.

    It is the mean cross entropy of the trained tokens in nats; with `method: dpo` the loss of DPO (Rafailov et al.
    2023, equation 7), for which the base is the reference and has log 2.

    Args:
        job: `recipe`, `base`, `rows` (folder, see `include.chat.tokenized`), `most` (rows), `adapters` (name -> folder).

    Returns:
        `row` numbers, `tokens` (trained tokens of each row) and `losses` (`base` and each adapter's name -> list).

    Raises:
        BadData: a loss is not finite.
    """
    plan = make_plan({**job["recipe"], "engine": "transformers"})
    import numpy as np
    import torch

    recipe, rows = job["recipe"], load_rows(job["rows"])
    rows = rows.select(range(min(job["most"], len(rows))))
    pairs = recipe["method"] == "dpo"
    sequences = _sequences(rows, pairs)
    tokens = [sum(label != IGNORED for label in labels[1:]) for _, labels in sequences]
    found: dict[str, list[float]] = {}
    references: list[float] = []
    with torch.inference_mode():
        for name, model in variants(job["base"], job["adapters"], recipe, plan):
            sums = _fitting_sums(model, sequences, plan.device, say)
            if pairs:
                margins = [chosen - rejected for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)]
                references = references or margins
                found[name] = np.logaddexp(0, -recipe["beta"] * (np.array(margins) - references)).tolist()
            else:
                found[name] = [-total / count for total, count in zip(sums, tokens, strict=True)]
            if any(not math.isfinite(loss) for loss in found[name]):
                raise BadData("a holdout row's loss is not a number", "The adapter or the base is damaged; train again")
            say(f"{name}: {len(rows)} rows measured")
    if pairs:
        tokens = [chosen + rejected for chosen, rejected in zip(tokens[::2], tokens[1::2], strict=True)]
    return {"row": list(rows["row"]), "tokens": tokens, "losses": found, "plan": plan.as_dict()}


def _sequences(rows: Any, pairs: bool) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row; of a pair those with the chosen answer, then those with the rejected one."""
    if not pairs:
        return [(row["input_ids"], row["labels"]) for row in rows]
    return [
        (row["prompt_ids"] + row[answer], [IGNORED] * len(row["prompt_ids"]) + row[answer])
        for row in rows
        for answer in ("chosen_ids", "rejected_ids")
    ]


def _fitting_sums(model: Any, sequences: list[tuple[list[int], list[int]]], device: str, say: Any) -> list[float]:
    """The log-likelihoods of `_sums`, in smaller batches where memory does not hold larger ones."""
    import torch

    most = BATCH_TOKENS
    while True:
        try:
            return _sums(model, sequences, device, most)
        except torch.OutOfMemoryError:
            if most <= min(len(ids) for ids, _ in sequences):
                raise
            most //= 2
            say(f"out of memory: measuring in batches of {most:,} tokens")
            if device == "cuda":
                torch.cuda.empty_cache()


def _sums(model: Any, sequences: list[tuple[list[int], list[int]]], device: str, most: int) -> list[float]:
    """The log-likelihood of each sequence's trained tokens (nats), in batches of so many padded tokens at most."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    lengths = [len(ids) for ids, _ in sequences]
    order = sorted(range(len(sequences)), key=lengths.__getitem__)
    found = [0.0] * len(sequences)
    while order:
        batch = [order.pop(0)]
        while order and (len(batch) + 1) * lengths[order[0]] <= most:
            batch.append(order.pop(0))
        chosen = [sequences[i] for i in batch]
        ids = pad_sequence([torch.tensor(ids) for ids, _ in chosen], batch_first=True).to(device)
        labels = pad_sequence([torch.tensor(labels) for _, labels in chosen], batch_first=True, padding_value=IGNORED)
        mask = pad_sequence([torch.ones(len(ids)) for ids, _ in chosen], batch_first=True).to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        targets = labels[:, 1:].to(device)
        each = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1)
        for i, total in zip(batch, each.tolist(), strict=True):
            found[i] = -total
    return found


def logits(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """The largest difference between the logits of two copies of an adapter on the same ids.

    Args:
        job: `recipe`, `base`, `adapters` (two folders: the tested one and the published one), `prompts` (token ids).

    Returns:
        `largest_difference` over all positions, and `same_tokens`: whether the likeliest tokens agree everywhere.
    """
    plan = make_plan({**job["recipe"], "engine": "transformers"})
    import torch

    tested, published = job["adapters"]
    found: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for name, model in variants(job["base"], {"tested": tested, "published": published}, job["recipe"], plan):
            prompts = [torch.tensor([ids], device=plan.device) for ids in job["prompts"]]
            found[name] = [model(input_ids=prompt).logits.float() for prompt in prompts]
    both = list(zip(found["tested"], found["published"], strict=True))
    return {
        "largest_difference": max((one - other).abs().max().item() for one, other in both),
        "same_tokens": all(bool((one.argmax(-1) == other.argmax(-1)).all()) for one, other in both),
    }
