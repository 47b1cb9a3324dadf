"""Verification of token ids and loss masks: against the tokenizer on sampled rows, and by counts for every row."""

from __future__ import annotations

from typing import Any

import numpy as np

from include.chat.chat_format import ChatFormat
from include.chat.encoder import TokenizersEncoder
from include.chat.splitting import trained_turns
from include.chat.template import CONTENT_TRANSFORMS
from include.chat.tokenized import IGNORED, Encoded
from include.data.conversation import Conversation
from include.errors import BadRecipe


def verify_encoding(chat: ChatFormat, conversations: list[Conversation]) -> int:
    """Compare each prompt with that of `apply_chat_template(tokenize=True)`, and loss masks with the answers.

    If the fast encoder gives different ids, `chat` uses the tokenizer itself from then on.

    Args:
        conversations: rows; those with a control token in a text are skipped, because Retune encodes such a text
            literally and the tokenizer does not, and so are those with a text that the template changes.

    Returns:
        The number of compared rows.

    Raises:
        BadRecipe: the ids differ with the tokenizer's own encoder, too, or a loss mask does not cover an answer.
    """
    compared = [c for c in conversations if not _has_markup(chat, c)]
    expected = [_prompts(chat, c) for c in compared]
    encoded = chat.encode(compared)
    row = _first_difference(encoded, expected)
    if row is not None and chat.encoder.name != TokenizersEncoder.name:
        chat.use_tokenizer_encoder()
        encoded = chat.encode(compared)
        row = _first_difference(encoded, expected)
    if row is not None:
        raise BadRecipe(
            f"field 'chat_template': the ids of {chat.template.name} differ from the tokenizer's own for a "
            f"conversation that begins with {compared[row].contents[0][:60]!r}",
            "Report this base and template; until then choose another template",
        )
    _verify_contents(chat, compared)
    if chat.tokenizer.keeps_text:  # with a normalizer, the decoded text is not the text of the row
        verify_loss_masks(chat, compared, encoded)
    return len(compared)


def _has_markup(chat: ChatFormat, conversation: Conversation) -> bool:
    texts = [*conversation.contents, *(text for _, text in conversation.thoughts)]
    return any(chat.template.control_tokens_in(text) for text in texts) or chat.changed_text(conversation) is not None


def _prompts(chat: ChatFormat, conversation: Conversation) -> list[list[int]]:
    """Return the ids of the prompt for each trained answer, by the tokenizer itself."""
    messages = chat.template.messages_of(conversation)
    return [
        chat.tokenizer.encode_rendered(chat.template.render(messages[:turn], True, conversation.tools))
        for turn in trained_turns(conversation)
    ]


def _verify_contents(chat: ChatFormat, conversations: list[Conversation]) -> None:
    """Check that the template writes the answers of these rows as it writes others."""
    for conversation in conversations:
        messages = chat.template.messages_of(conversation)
        for turn in trained_turns(conversation):
            content = conversation.contents[turn]
            written = chat.template.render(messages[: turn + 1], tools=conversation.tools)
            if not any(change(content) in written for change in CONTENT_TRANSFORMS):
                raise BadRecipe(
                    f"field 'chat_template': {chat.template.name} changes an answer that begins with {content[:60]!r}",
                    "Choose a template that writes the contents unchanged",
                )


def verify_loss_masks(chat: ChatFormat, conversations: list[Conversation], encoded: Encoded) -> None:
    """Compare the text of the tokens in the loss with the answers.

    Args:
        encoded: the conversations' ids and loss masks.

    Raises:
        BadRecipe: the tokens in the loss do not contain all answers that are not masked, in their order.
    """
    texts = [""] * len(conversations)
    for origin, (_, labels) in zip(encoded.origin, encoded.rows(), strict=True):
        texts[origin] += chat.decode([label for label in labels if label != IGNORED])
    for conversation, text in zip(conversations, texts, strict=True):
        position = 0
        for turn in trained_turns(conversation):
            content = conversation.contents[turn]
            answer = content.strip()
            position = text.find(answer, position)
            if position < 0:
                raise BadRecipe(
                    f"field 'chat_template': with {chat.template.name} the loss does not count all tokens of an answer "
                    f"that begins with {content[:60]!r}",
                    "Report this base and template; until then choose another template",
                )
            position += len(answer)


def token_faults(
    chat: ChatFormat, encoded: Encoded, conversations: list[Conversation], max_seq_length: int
) -> dict[str, np.ndarray]:
    """Count what breaks the rules of `PREPARED_ROWS` in each conversation.

    Args:
        encoded: the conversations' ids and loss masks.
        max_seq_length: in tokens.

    Returns:
        int32 arrays with one entry per conversation: `tokens` (of its longest sequence); `tokens_over` (1: longer than
        `max_seq_length`); `untrained` (1: no token is in the loss); `bos_errors` (difference between the number of
        beginning-of-text tokens and what the template writes); `unended_turns` (trained turns less segments that end
        with a stop token; 0 if the vocabulary lacks tokens of the template); `mask_errors` (difference between the
        number of segments in the loss and the number of trained turns: assistant turns that are not masked).
    """
    rows = len(conversations)

    def count(positions: np.ndarray) -> np.ndarray:
        """Count the token positions in each conversation."""
        origin = encoded.origin[np.searchsorted(encoded.ends, positions, "right")]
        return np.bincount(origin, minlength=rows).astype(np.int32)

    tokens = np.zeros(rows, np.int32)
    np.maximum.at(tokens, encoded.origin, encoded.lengths.astype(np.int32))
    none = np.zeros_like(tokens)
    next_in_loss = np.append(encoded.loss_mask[1:], False)
    next_in_loss[encoded.ends - 1] = False  # a segment does not continue in the next sequence
    segment_ends = np.flatnonzero(encoded.loss_mask & ~next_in_loss)
    segments = count(segment_ends)
    ended = count(segment_ends[np.isin(encoded.ids[segment_ends], chat.stop_tokens)])
    answers = {roles: roles.count("assistant") for roles in {c.roles for c in conversations}}
    turns = np.array([answers[c.roles] - len(c.masked) for c in conversations], np.int32)
    bos, written = chat.id_of("bos_token"), np.bincount(encoded.origin, encoded.bos, rows).astype(np.int32)
    return {
        "tokens": tokens,
        "tokens_over": (tokens > max_seq_length).astype(np.int32),
        "untrained": (segments == 0).astype(np.int32),
        "bos_errors": none if bos is None else np.abs(count(np.flatnonzero(encoded.ids == bos)) - written),
        "unended_turns": none if chat.missing else turns - ended,
        "mask_errors": np.abs(segments - turns),
    }


def pair_faults(
    chat: ChatFormat,
    chosen: Encoded,
    rejected: Encoded,
    conversations: list[Conversation],
    max_seq_length: int,
) -> dict[str, Any]:
    """Count what breaks the rules of `PREPARED_ROWS` in each preference row.

    Args:
        chosen: ids and loss masks of the conversations with the chosen answer.
        rejected: the same with the rejected answer.
        conversations: the rows; both answers have the same roles before them.

    Returns:
        The arrays of `token_faults`, the larger value of the two conversations in each.
    """
    sides = [token_faults(chat, encoded, conversations, max_seq_length) for encoded in (chosen, rejected)]
    return {name: np.maximum(sides[0][name], sides[1][name]) for name in sides[0]}


def _first_difference(encoded: Encoded, expected: list[list[list[int]]]) -> int | None:
    """Return the number of the first conversation with other prompts than expected, or None."""
    found: list[list[list[int]]] = [[] for _ in expected]
    for origin, (ids, labels) in zip(encoded.origin, encoded.rows(), strict=True):
        trained = [label != IGNORED for label in labels]
        found[origin] += [ids[:i] for i in range(len(ids)) if trained[i] and not (i and trained[i - 1])]
    return next((row for row, prompts in enumerate(found) if prompts != expected[row]), None)
