"""Flags of turns that say whether the loss counts a turn: `train`, `training` and `loss`, or a `weight` of 0 or 1."""

from __future__ import annotations

from typing import Any

import orjson

TRAIN_FLAGS = ("train", "training", "loss", "weight")
UNREAD_FLAGS = ("train_detail", "loss_scale", "loss_weight")  # flags of parts of a turn, and weights beside `weight`


def read_train_flag(turn: dict[str, Any]) -> bool | None:
    """Return whether a turn is trained on, by its flags; None if it has none. A null is as good as no flag.

    Raises:
        ValueError: a flag has another value than true, false, 1 or 0; two flags contradict each other; or the turn has
            a flag that Retune does not follow.
    """
    flags = {}
    for key in TRAIN_FLAGS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{key} is {orjson.dumps(value).decode()[:60]}; it can be true, false, 1 or 0")
        flags[key] = bool(value)
    if unread := next((key for key in UNREAD_FLAGS if turn.get(key) is not None), None):
        raise ValueError(f"{unread} is not supported; flags of whole turns are {', '.join(TRAIN_FLAGS)}")
    if len(set(flags.values())) > 1:
        raise ValueError(f"{' and '.join(flags)} contradict each other")
    return next(iter(flags.values()), None)
