"""Jobs that measure: losses of holdout rows by the base and by adapters; logits, to compare two copies."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from include.engine.model import load_adapter, load_base
from include.engine.plan import make_plan
from include.errors import BadData
from include.rows import load as load_rows

BATCH_TOKENS = 4096  # padded tokens of one forward pass: the logits of a 128k vocabulary then take 2 GB


def losses(job: dict[str, Any], say: Any) -> dict[str, Any]:
    """The mean loss per trained token of each holdout row, in nats, by the base and by each adapter.

    Args:
        job: `recipe`, `base`, `rows` (folder, see `include.rows`), `most` (rows), `adapters` (name -> folder).

    Returns:
        `row` numbers, `tokens` (trained tokens of each row) and `losses` (`base` and each adapter's name -> list).
    """
    plan = make_plan({**job["recipe"], "engine": "transformers"})
    import torch

    rows = load_rows(job["rows"])
    rows = rows.select(range(min(job["most"], len(rows))))
    model = load_base(job["base"], job["recipe"], plan)
    for name, folder in job["adapters"].items():
        if hasattr(model, "peft_config"):
            model.load_adapter(str(folder), adapter_name=name)
        else:
            model = load_adapter(model, folder, name)
    model.eval()
    found: dict[str, list[float]] = {}
    with torch.inference_mode():
        for name in [*job["adapters"], "base"]:
            if name != "base":
                model.set_adapter(name)
            with model.disable_adapter() if name == "base" else nullcontext():
                found[name] = _fitting_losses(model, rows, plan.device, say)
            say(f"{name}: {sum(found[name]) / len(rows):.3f} nats per token over {len(rows)} rows")
    tokens = [sum(label != -100 for label in row) for row in rows["labels"]]
    return {"row": list(rows["row"]), "tokens": tokens, "losses": found, "plan": plan.as_dict()}


def _fitting_losses(model: Any, rows: Any, device: str, say: Any) -> list[float]:
    """The losses of `_row_losses`, in smaller batches where memory does not hold larger ones."""
    import torch

    most = BATCH_TOKENS
    while True:
        try:
            return _row_losses(model, rows, device, most)
        except torch.OutOfMemoryError:
            if most <= min(map(len, rows["input_ids"])):
                raise
            most //= 2
            say(f"out of memory: measuring in batches of {most:,} tokens")
            if device == "cuda":
                torch.cuda.empty_cache()


def _row_losses(model: Any, rows: Any, device: str, most: int) -> list[float]:
    """The mean cross entropy of each row's trained tokens, in the order of the rows.

    Raises:
        BadData: a loss is not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    found = [0.0] * len(rows)
    while order:
        batch = [order.pop(0)]
        while order and (len(batch) + 1) * lengths[order[0]] <= most:
            batch.append(order.pop(0))
        chosen = [rows[i] for i in batch]
        ids = pad_sequence([torch.tensor(row["input_ids"]) for row in chosen], batch_first=True).to(device)
        labels = pad_sequence([torch.tensor(row["labels"]) for row in chosen], batch_first=True, padding_value=-100)
        mask = pad_sequence([torch.ones(len(row["input_ids"])) for row in chosen], batch_first=True).to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        targets = labels[:, 1:].to(device)
        each = cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(1)
        means = each / (targets != -100).sum(1)
        for i, mean in zip(batch, means.tolist(), strict=True):
            found[i] = mean
    if any(not loss < float("inf") for loss in found):
        raise BadData("a holdout row's loss is not a number", "The adapter or the base is damaged; train again")
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
    model = load_adapter(load_base(job["base"], job["recipe"], plan), tested, "tested")
    model.load_adapter(str(published), adapter_name="published")
    model.eval()
    largest, same = 0.0, True
    with torch.inference_mode():
        for ids in job["prompts"]:
            prompt = torch.tensor([ids], device=plan.device)
            model.set_adapter("tested")
            one = model(input_ids=prompt).logits.float()
            model.set_adapter("published")
            other = model(input_ids=prompt).logits.float()
            largest = max(largest, (one - other).abs().max().item())
            same = same and bool((one.argmax(-1) == other.argmax(-1)).all())
    return {"largest_difference": largest, "same_tokens": same}
