"""Preparation of rows for the trainer: which conversations are used, whole or in part, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from include.chat.chat_format import ChatFormat
from include.chat.splitting import mask_all_but_last, split_conversation, trained_turns
from include.chat.tokenized import IGNORED, batch, pair_batch, prompt_tokens
from include.chat.verification import pair_faults, token_faults
from include.data.conversation import Conversation, conversations_in
from include.recipe import Recipe

# why a row does not train
BROKEN_BY_TEXT = "special tokens in the text of a turn break the form of the template (special_tokens_in_text: parse)"
MARKUP_IN_TEXT = "the text of a turn has markup of the chat template, which the template would change"
LAST_IS_MASKED = "the last answer is masked, and train_on is last"
TOO_LONG = "longer than max_seq_length"
NOTHING_LEFT = "truncated to max_seq_length, before the first trained token"
NO_COMMON_PROMPT = "the tokens before the two answers have no common begin"
# why a part of a row does not train
TRUNCATED = "in part: truncated to max_seq_length"
EXCHANGE_TOO_LONG = "in part: an exchange that alone is longer than max_seq_length"

Line = dict[str, Any]  # of `left_out.jsonl`: `row`, `reasons`, and `turn` or `tokens` where they say more


@dataclass
class PreparedFile:
    """One file of messages as the trainer gets it.

    Attributes:
        faults: the columns that the suite checks, one entry per row.
        batches: record batches of the rows for training (False) and of those that are held out (True); see
            `include.chat.tokenized`.
        left_out: for each row or part that does not train, its line in `left_out.jsonl`.
    """

    faults: dict[str, Any]
    batches: dict[bool, list[Any]]
    left_out: list[Line]

    def __post_init__(self) -> None:
        self.left_out.sort(key=lambda line: (line["row"], line.get("turn", 0)))

    @property
    def longest(self) -> int:
        """Return the number of tokens of the longest row."""
        longest = 0
        for rows in (*self.batches[False], *self.batches[True]):
            lengths = {name: np.diff(ids.offsets.to_numpy()) for name, ids in _id_lists(rows).items()}
            prompts = lengths.pop("prompt_ids", 0)  # each of the two answers follows the prompt
            longest = max([longest, *(int((prompts + count).max(initial=0)) for count in lengths.values())])
        return longest

    @property
    def largest_id(self) -> int:
        """Return the largest token id in the rows."""
        lists = [ids for rows in (*self.batches[False], *self.batches[True]) for ids in _id_lists(rows).values()]
        return max((int(ids.flatten().to_numpy().max(initial=0)) for ids in lists), default=0)

    def samples(self, chat: ChatFormat, count: int) -> list[str]:
        """Return the first rows as text, with the trained parts between » and «."""
        rows = [row for rows in (*self.batches[False], *self.batches[True]) for row in rows.slice(0, count).to_pylist()]
        return [_readable(chat, row) for row in sorted(rows, key=lambda row: row["row"])[:count]]


def prepare_file(chat: ChatFormat, table: Any, recipe: Recipe) -> PreparedFile:
    """Encode a table of messages (see `StandardizeOutput`), and decide which rows are used."""
    prepare = _prepare_pairs if recipe.method == "dpo" else _prepare_conversations
    return prepare(chat, conversations_of(table, recipe), table["row"].to_numpy(), table["holdout"].to_numpy(), recipe)


def conversations_of(table: Any, recipe: Recipe) -> list[Conversation]:
    """Return the conversations of a table of messages, with the masks that the recipe asks for."""
    last_only = recipe.train_on == "last" or recipe.method == "dpo"
    return [mask_all_but_last(c) if last_only else c for c in conversations_in(table)]


def with_rejected(pair: Conversation) -> Conversation:
    """Return the conversation of a preference row with the rejected answer as its last turn."""
    return replace(pair, contents=[*pair.contents[:-1], str(pair.rejected)])


def _left_out(rows: Any, chosen: Iterable[Any], reason: str, tokens: Any = None) -> list[Line]:
    """Return a line for `left_out.jsonl` for each chosen row, with the row's number of tokens if it says more."""
    numbers = [{} if tokens is None else {"tokens": int(tokens[i])} for i in chosen]
    return [{"row": int(rows[i]), "reasons": [reason], **number} for i, number in zip(chosen, numbers, strict=True)]


def _refuse_rows(
    chat: ChatFormat, conversations: list[Conversation], rows: Any, faults: dict[str, Any]
) -> tuple[Any, list[Line]]:
    """Find the rows that cannot train by their own content, and set their faults to zero.

    Returns:
        Which rows these are, and their lines for `left_out.jsonl`. Rows with the same faults for another reason keep
        the faults, and end the run.
    """
    refused, entries = np.zeros(len(rows), bool), []
    for i in np.flatnonzero(faults["bos_errors"] | faults["unended_turns"] | faults["mask_errors"]):
        contents = [*conversations[i].contents, conversations[i].rejected or ""]
        turn = next((turn for turn, text in enumerate(contents, 1) if chat.parsed_tokens_in(text)), None)
        if turn is not None:
            refused[i] = True
            entries += [{**entry, "turn": turn} for entry in _left_out(rows, [i], BROKEN_BY_TEXT)]
    for number, conversation in enumerate(conversations):
        if not refused[number] and (changed := chat.changed_text(conversation)):
            refused[number] = True
            entries += [{**entry, "turn": changed[0] + 1} for entry in _left_out(rows, [number], MARKUP_IN_TEXT)]
    masked = [i for i in np.flatnonzero(faults["untrained"]) if not (refused[i] or trained_turns(conversations[i]))]
    refused[masked] = True
    for name in ("untrained", "bos_errors", "unended_turns", "mask_errors"):
        faults[name] = np.where(refused, 0, faults[name])
    return refused, [*entries, *_left_out(rows, masked, LAST_IS_MASKED)]


def _prepare_conversations(
    chat: ChatFormat, conversations: list[Conversation], rows: Any, holdout: Any, recipe: Recipe
) -> PreparedFile:
    longest = recipe.max_seq_length
    encoded = chat.encode(conversations)
    faults = {"row": rows, **token_faults(chat, encoded, conversations, longest)}
    refused, left_out = _refuse_rows(chat, conversations, rows, faults)
    too_long = (faults["tokens_over"] > 0) & ~refused
    over = np.flatnonzero(too_long)
    used = ~too_long & ~refused  # rows that are used, whole or in part
    usable = used[encoded.origin]  # sequences
    parts = []
    if len(over) and recipe.on_too_long == "truncate":
        encoded = encoded.truncate(longest)
        usable = np.logical_or.reduceat(encoded.loss_mask, encoded.starts) & ~refused[encoded.origin]
        used = np.zeros(len(rows), bool)
        used[encoded.origin[usable]] = True
        left_out += _left_out(rows, over[used[over]], TRUNCATED, faults["tokens"])
    elif len(over) and recipe.on_too_long == "split":
        pieces = []
        for row in over:
            found, lost = split_conversation(chat, conversations[row], longest)
            pieces += [(row, piece) for piece in found]
            if found:
                entry = {"row": int(rows[row]), "reasons": [EXCHANGE_TOO_LONG]}
                left_out += [{**entry, "turn": turn + 1} for turn in lost]
        if pieces:
            split = chat.encode([piece for _, piece in pieces])
            origin = np.array([row for row, _ in pieces])[split.origin]
            used[origin] = True
            parts.append((split, rows[origin], holdout[origin], origin >= 0))
    whole = NOTHING_LEFT if recipe.on_too_long == "truncate" else TOO_LONG
    left_out += _left_out(rows, over[~used[over]], whole, faults["tokens"])
    parts.insert(0, (encoded, rows[encoded.origin], holdout[encoded.origin], usable))
    kept = np.zeros(len(rows), np.int64)
    np.maximum.at(kept, encoded.origin[usable], encoded.lengths[usable])
    faults["left_out"] = (~used).astype(np.int32)
    faults["kept_over"] = (kept > longest).astype(np.int32)
    faults["cut"] = ((kept > 0) & (kept < faults["tokens"])).astype(np.int32)
    if recipe.on_too_long == "truncate":
        faults["cut"] *= 0
    batches = {
        held: [batch(e, r, np.flatnonzero(use & (h == held))) for e, r, h, use in parts] for held in (False, True)
    }
    return PreparedFile(faults, batches, left_out)


def _prepare_pairs(
    chat: ChatFormat, conversations: list[Conversation], rows: Any, holdout: Any, recipe: Recipe
) -> PreparedFile:
    chosen, rejected = chat.encode(conversations), chat.encode([with_rejected(pair) for pair in conversations])
    faults = {"row": rows, **pair_faults(chat, chosen, rejected, conversations, recipe.max_seq_length)}
    refused, left_out = _refuse_rows(chat, conversations, rows, faults)
    over = (faults["tokens_over"] > 0) & ~refused
    left_out += _left_out(rows, np.flatnonzero(over), TOO_LONG, faults["tokens"])
    alone = np.array([prompt_tokens(chosen, rejected, i) == 0 for i in range(len(rows))], bool) & ~refused & ~over
    left_out += _left_out(rows, np.flatnonzero(alone), NO_COMMON_PROMPT)
    usable = ~(refused | over | alone)
    used = np.flatnonzero(usable)
    faults.update(
        left_out=(~usable).astype(np.int32),
        kept_over=np.zeros(len(rows), np.int32),  # a pair is used whole or not at all
        cut=np.zeros(len(rows), np.int32),
    )
    batches = {held: [pair_batch(chosen, rejected, rows, used[holdout[used] == held])] for held in (False, True)}
    return PreparedFile(faults, batches, left_out)


def _id_lists(rows: Any) -> dict[str, Any]:
    return {name: rows[name] for name in rows.schema.names if name.endswith("_ids")}


def _readable(chat: ChatFormat, row: dict[str, Any]) -> str:
    if "prompt_ids" in row:
        return (
            f"row {row['row']}\n{chat.decode(row['prompt_ids'])}»{chat.decode(row['chosen_ids'])}«\n"
            f"rather than »{chat.decode(row['rejected_ids'])}«\n"
        )
    ids, trained = row["input_ids"], [label != IGNORED for label in row["labels"]]
    parts, begin = [], 0
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[begin]:
            text = chat.decode(ids[begin:end])
            parts.append(f"»{text}«" if trained[begin] else text)
            begin = end
    return f"row {row['row']}\n{''.join(parts)}\n"
