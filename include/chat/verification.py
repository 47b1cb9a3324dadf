"""Verification of token ids and loss masks: against the tokenizer on sampled rows, and by counts for every row."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from include.chat.chat_format import ChatFormat
from include.chat.encoder import TokenizersEncoder
from include.chat.splitting import trained_turns
from include.chat.tokenized import IGNORED, Encoded, answer_span, prompt_tokens
from include.chat.tokenizer import CONTROL_TOKEN
from include.data.conversation import Conversation
from include.errors import BadRecipe


def verify_encoding(chat: ChatFormat, conversations: list[Conversation]) -> int:
    """Compare ids with those of `apply_chat_template(tokenize=True)`, and loss masks with the assistants' answers.

    If the fast encoder gives different ids, `chat` uses the tokenizer itself from then on.

    Args:
        conversations: rows; those with a text in the form of a special token are skipped, because Retune encodes such
            a text literally and the tokenizer does not.

    Returns:
        The number of compared rows.

    Raises:
        BadRecipe: the ids differ with the tokenizer's own encoder, too, or a loss mask does not cover an answer.
    """
    compared = [c for c in conversations if not any(re.search(CONTROL_TOKEN, content) for content in c.contents)]
    expected = [chat.tokenizer.encode_rendered(chat.template.render(c.messages, tools=c.tools)) for c in compared]
    row = _first_difference(chat.encode(compared), expected)
    if row is not None and chat.encoder.name != TokenizersEncoder.name:
        chat.use_tokenizer_encoder()
        row = _first_difference(chat.encode(compared), expected)
    if row is not None:
        raise BadRecipe(
            f"field 'chat_template': the ids of {chat.template.name} differ from the tokenizer's own for a "
            f"conversation that begins with {compared[row].contents[0][:60]!r}",
            "Report this base and template; until then choose another template",
        )
    if chat.tokenizer.keeps_text:  # with a normalizer, the decoded text is not the text of the row
        verify_loss_masks(chat, compared, chat.encode(compared))
    return len(compared)


def verify_loss_masks(chat: ChatFormat, conversations: list[Conversation], encoded: Encoded) -> None:
    """Compare the text of the tokens in the loss with the answers.

    Args:
        encoded: the conversations' ids and loss masks.

    Raises:
        BadRecipe: the tokens in the loss do not contain all answers that are not masked, in their order.
    """
    for conversation, (_, labels) in zip(conversations, encoded.rows(), strict=True):
        text, position = chat.decode([label for label in labels if label != IGNORED]), 0
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


def count_prefix_mismatches(chat: ChatFormat, conversations: list[Conversation]) -> int:
    """Count rows whose training prefix differs from the inference prompt.

    Rows whose first answer token is not in the loss count, too. The training prefix is the ids before the last answer.
    A tokenizer that joins the line break at the end of the prompt with the first characters of the answer makes the two
    differ. The loss does not show it, and the answers of the trained model can be bad.

    Args:
        conversations: rows; those with tools and those that do not end with a user turn and an answer that is trained
            on are skipped.
    """
    compared = [
        c
        for c in conversations
        if c.tools is None and c.roles[-2:] == ("user", "assistant") and len(c.roles) - 1 not in c.masked
    ]
    prompts = chat.encode_prompts([Conversation.of(c.messages[:-1]) for c in compared])
    count = 0
    for (ids, labels), (prompt, _) in zip(chat.encode(compared).rows(), prompts.rows(), strict=True):
        count += ids[: len(prompt)] != prompt or labels[len(prompt)] == IGNORED
    return count


def token_faults(
    chat: ChatFormat, encoded: Encoded, conversations: list[Conversation], max_seq_length: int
) -> dict[str, np.ndarray]:
    """Count what breaks the rules of `PREPARED_ROWS` in each conversation.

    Args:
        encoded: the conversations' ids and loss masks.
        max_seq_length: in tokens.

    Returns:
        int32 arrays with one entry per conversation: `tokens`; `tokens_over` (1: longer than `max_seq_length`);
        `untrained` (1: no token is in the loss); `bos_errors` (difference between the number of beginning-of-text
        tokens and `chat.bos_count`); `unended_turns` (trained turns less segments that end with a stop token; 0 if
        the vocabulary lacks tokens of the template); `mask_errors` (difference between the number of segments in the
        loss and the number of trained turns: assistant turns that are not masked).
    """

    def count(positions: np.ndarray) -> np.ndarray:
        """Count the token positions in each conversation."""
        return np.bincount(np.searchsorted(encoded.ends, positions, "right"), minlength=len(tokens)).astype(np.int32)

    tokens = (encoded.ends - encoded.starts).astype(np.int32)
    none = np.zeros_like(tokens)
    next_in_loss = np.append(encoded.loss_mask[1:], False)
    next_in_loss[encoded.ends - 1] = False  # a segment does not continue in the next conversation
    segment_ends = np.flatnonzero(encoded.loss_mask & ~next_in_loss)
    segments = count(segment_ends)
    ended = count(segment_ends[np.isin(encoded.ids[segment_ends], chat.stop_tokens)])
    answers = {roles: roles.count("assistant") for roles in {c.roles for c in conversations}}
    turns = np.array([answers[c.roles] - len(c.masked) for c in conversations], np.int32)
    bos = chat.id_of("bos_token")
    return {
        "tokens": tokens,
        "tokens_over": (tokens > max_seq_length).astype(np.int32),
        "untrained": (segments == 0).astype(np.int32),
        "bos_errors": none if bos is None else np.abs(count(np.flatnonzero(encoded.ids == bos)) - chat.bos_count),
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
    """Count what breaks the rules of `PREPARED_ROWS` and `PREPARED_PAIRS` in each preference row.

    Args:
        chosen: ids and loss masks of the conversations with the chosen answer.
        rejected: the same with the rejected answer.
        conversations: the rows; both answers have the same roles before them.

    Returns:
        The arrays of `token_faults`, the larger value of the two conversations in each; and `prompt_errors` (1: the
        tokens before the two answers differ, so that the pair is cut before them, see `pair_batch`).
    """
    sides = [token_faults(chat, encoded, conversations, max_seq_length) for encoded in (chosen, rejected)]
    larger = {name: np.maximum(sides[0][name], sides[1][name]) for name in sides[0]}
    differ = [
        prompt_tokens(chosen, rejected, i) < max(answer_span(chosen, i)[0], answer_span(rejected, i)[0])
        for i in range(len(conversations))
    ]
    return {**larger, "prompt_errors": np.array(differ, np.int32)}


def _first_difference(encoded: Encoded, expected: list[list[int]]) -> int | None:
    """Return the number of the first conversation with other ids than expected, or None."""
    return next((row for row, (ids, _) in enumerate(encoded.rows()) if ids != expected[row]), None)
