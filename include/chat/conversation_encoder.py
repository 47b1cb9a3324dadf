"""Conversations to token ids and loss masks: the template's pieces, filled with the contents, in one pass.

What is the same for every conversation with one order of roles is encoded once. Special tokens are looked up only in
the template's text: a special token that a user writes stays text, unless the recipe parses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from include.chat.encoder import Encoder, Spans, range_indices
from include.chat.template import CONTENT_TRANSFORMS, Calls, ChatTemplate, Piece
from include.chat.tokenized import Encoded
from include.data.conversation import Conversation

MAX_CACHED_LAYOUTS = 10_000  # rows with many different lists of tools have as many layouts

Layout = list["FixedSegment | list[Piece]"]  # of one order of roles: fixed tokens, and pieces to be encoded together


class FixedSegment(NamedTuple):
    """Tokens that are the same in every conversation.

    Attributes:
        ids: the token ids.
        loss_mask: whether the loss counts each token.
    """

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def joined(self, other: FixedSegment) -> FixedSegment:
        """Return this segment followed by another one."""
        return FixedSegment(self.ids + other.ids, self.loss_mask + other.loss_mask)


class ConversationEncoder:
    """Encodes conversations with one chat template.

    Args:
        template: the chat template.
        text_encoder: encodes the texts between special tokens.
        parsed_tokens: ids of the special tokens that are parsed in contents, by their texts; empty: none.

    Attributes:
        template: see above.
        text_encoder: see above; `use` changes it.
    """

    def __init__(self, template: ChatTemplate, text_encoder: Encoder, parsed_tokens: Mapping[str, int]):
        self.text_encoder = text_encoder
        self.template, self._parsed_tokens = template, parsed_tokens
        self._parsed = re.compile("(" + "|".join(map(re.escape, parsed_tokens)) + ")") if parsed_tokens else None
        self._pieces: dict[tuple[tuple[str, ...], str | None, bool, Calls], list[Piece]] = {}
        self._layouts: dict[tuple[tuple[str, ...], str | None, bool, Calls, tuple[int, ...]], Layout] = {}

    def use(self, text_encoder: Encoder) -> None:
        """Change the encoder of the texts."""
        self.text_encoder = text_encoder
        self._layouts.clear()

    def encode(self, conversations: list[Conversation], generation_prompt: bool = False) -> Encoded:
        """Return the token ids and the loss masks of conversations.

        Args:
            generation_prompt: whether the header of an assistant turn follows each conversation.

        Raises:
            BadData, BadRecipe: see `ChatTemplate.pieces`.
        """
        parts = _Parts()
        for conversation in conversations:
            for entry in self._layout(conversation, generation_prompt):
                if isinstance(entry, FixedSegment):
                    parts.add_fixed(entry)
                else:
                    self._add_text(parts, entry, conversation)
            parts.end_conversation()
        return parts.encoded(self.text_encoder)

    def _add_text(self, parts: _Parts, pieces: list[Piece], conversation: Conversation) -> None:
        """Add the text of pieces that stand side by side, cut at the special tokens that are parsed."""
        text, spans = "", list[tuple[int, int]]()
        for piece in pieces:
            content = piece.text if piece.turn is None else _content(piece, conversation)
            # re.split with a group: texts and parsed tokens alternate
            for number, section in enumerate(self._parsed.split(content) if self._parsed else (content,)):
                if number % 2:
                    if text:
                        parts.add_text(text, spans)
                    parts.add_fixed(FixedSegment((self._parsed_tokens[section],), (piece.in_loss,)))
                    text, spans = "", []
                    continue
                if piece.in_loss:
                    spans.append((len(text), len(text) + len(section)))
                text = text + section if text else section
        if text:
            parts.add_text(text, spans)

    def parsed_tokens_in(self, text: str) -> list[str]:
        """Return the special tokens that are parsed in a text, in their order."""
        return self._parsed.findall(text) if self._parsed else []

    def _layout(self, conversation: Conversation, generation_prompt: bool) -> Layout:
        calls = calls_of(conversation) if conversation.calls else ()
        rendered = (conversation.roles, conversation.tools, generation_prompt, calls)
        key = (*rendered, conversation.masked)
        if key not in self._layouts:
            for cached in (self._layouts, self._pieces):
                if len(cached) > MAX_CACHED_LAYOUTS:
                    cached.clear()
            if rendered not in self._pieces:
                self._pieces[rendered] = self.template.pieces(*rendered)
            self._layouts[key] = self._build_layout(_with_masks(self._pieces[rendered], conversation.masked))
        return self._layouts[key]

    def _build_layout(self, pieces: list[Piece]) -> Layout:
        """Encode all text between two special tokens that holds no content.

        A token can cover both template text and content, so text around a content is encoded together with it.
        """
        layout: Layout = []
        between: list[Piece] = []

        def add_fixed(segment: FixedSegment) -> None:
            if layout and isinstance(layout[-1], FixedSegment):
                layout[-1] = layout[-1].joined(segment)
            else:
                layout.append(segment)

        def add_between() -> None:
            if any(piece.turn is not None for piece in between):
                layout.append(list(between))
            elif between:
                text, spans = "", list[tuple[int, int]]()
                for piece in between:
                    spans += [(len(text), len(text) + len(piece.text))] if piece.in_loss else []
                    text += piece.text
                tokens = self.text_encoder.encode([text], [spans])
                add_fixed(FixedSegment(tuple(tokens.ids.tolist()), tuple(tokens.mask.tolist())))
            between.clear()

        for piece in pieces:
            if piece.token is None:
                between.append(piece)
                continue
            add_between()
            add_fixed(FixedSegment((piece.token,), (piece.in_loss,)))
        add_between()
        return layout


def _with_masks(pieces: list[Piece], masked: tuple[int, ...]) -> list[Piece]:
    """Take the masked turns' contents, and the tokens that end these turns, out of the loss."""
    if not masked:
        return pieces
    found, turn = [], None
    for piece in pieces:
        turn = next((of for of in (piece.turn, piece.calls_of) if of is not None), turn)
        found.append(replace(piece, in_loss=False) if turn in masked else piece)
    return found


def calls_of(conversation: Conversation) -> Calls:
    """Return the tool calls of a conversation as `ChatTemplate.pieces` takes them."""
    return tuple((turn, made, bool(conversation.contents[turn])) for turn, made in conversation.calls)


def _content(piece: Piece, conversation: Conversation) -> str:
    """Return a turn's content as the template writes it."""
    content = conversation.contents[piece.turn or 0]
    return content if piece.transform == "unchanged" else CONTENT_TRANSFORMS[piece.transform](content)


class _Parts:
    """The parts of conversations in their order: fixed segments, each stored once, and texts, encoded in one call."""

    def __init__(self) -> None:
        self._segments: dict[FixedSegment, int] = {}
        self._texts: list[str] = []
        self._spans: list[Spans] = []
        self._order: list[int] = []  # of each part: the number of its fixed segment, or -1 - the number of its text
        self._conversation_ends: list[int] = []  # in parts

    def add_fixed(self, segment: FixedSegment) -> None:
        self._order.append(self._segments.setdefault(segment, len(self._segments)))

    def add_text(self, text: str, loss_spans: Spans) -> None:
        self._order.append(-1 - len(self._texts))
        self._texts.append(text)
        self._spans.append(loss_spans)

    def end_conversation(self) -> None:
        self._conversation_ends.append(len(self._order))

    def encoded(self, text_encoder: Encoder) -> Encoded:
        """Encode the texts and put all parts in order."""
        tokens = text_encoder.encode(self._texts, self._spans)
        segment_ids = np.array([id for segment in self._segments for id in segment.ids], np.int32)
        segment_mask = np.array([bit for segment in self._segments for bit in segment.loss_mask], bool)
        segment_lengths = np.array([len(segment.ids) for segment in self._segments], np.int64)
        order = np.array(self._order, np.int64)
        is_text = order < 0
        texts, segments = -1 - order[is_text], order[~is_text]
        # where each part begins in the segments' ids followed by the texts' ids
        starts, lengths = np.empty_like(order), np.empty_like(order)
        starts[is_text] = len(segment_ids) + tokens.starts[texts]
        lengths[is_text] = tokens.starts[texts + 1] - tokens.starts[texts]
        starts[~is_text] = (segment_lengths.cumsum() - segment_lengths)[segments]
        lengths[~is_text] = segment_lengths[segments]
        ends = np.concatenate([[0], lengths.cumsum()])[np.array(self._conversation_ends, np.int64)]
        indices = range_indices(starts, lengths)
        ids, mask = np.concatenate([segment_ids, tokens.ids]), np.concatenate([segment_mask, tokens.mask])
        return Encoded(ids[indices], mask[indices], ends)
