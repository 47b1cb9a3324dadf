"""Conversations to token ids and loss masks: the pieces of sequences, filled with the contents, in one pass.

What is the same for every conversation of one form is encoded once. Control tokens are looked up only in the
template's text: a control token that a user writes stays text, unless the recipe parses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from include.chat.encoder import Encoder, Spans, Tokens, range_indices
from include.chat.sequences import Piece, Sequence, pieces, prompt_of, sequences
from include.chat.template import CONTENT_TRANSFORMS, ChatTemplate, Form
from include.chat.tokenized import Encoded
from include.data.conversation import Conversation

MAX_CACHED_LAYOUTS = 10_000  # rows with many different lists of tools have as many layouts


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


class Layout(NamedTuple):
    """One sequence of the conversations of one form.

    Attributes:
        parts: fixed tokens, and pieces to be encoded together.
        bos: how many beginning-of-text tokens are among the fixed tokens.
    """

    parts: list[FixedSegment | list[Piece]]
    bos: int


class ConversationEncoder:
    """Encodes conversations with one chat template.

    Args:
        template: the chat template.
        text_encoder: encodes the texts between control tokens.
        parsed_tokens: ids of the special tokens that are parsed in contents, by their texts; empty: none.

    Attributes:
        template: see above.
        text_encoder: see above; `use` changes it.
    """

    def __init__(self, template: ChatTemplate, text_encoder: Encoder, parsed_tokens: Mapping[str, int]):
        self.text_encoder = text_encoder
        self.template, self._parsed_tokens = template, parsed_tokens
        self._parsed = re.compile("(" + "|".join(map(re.escape, parsed_tokens)) + ")") if parsed_tokens else None
        self._bos = template.added.ids.get(template.named_tokens.get("bos_token") or "")
        self._layouts: dict[tuple[Form, tuple[int, ...] | None, bool], list[Layout]] = {}

    def use(self, text_encoder: Encoder) -> None:
        """Change the encoder of the texts."""
        self.text_encoder = text_encoder
        self._layouts.clear()

    def encode(self, conversations: list[Conversation]) -> Encoded:
        """Return the token ids and the loss masks of conversations, each answer behind the prompt that asks for it.

        Raises:
            BadData, BadRecipe: see `include.chat.sequences.sequences`.
        """
        encoded, joined = self._encode(conversations, apart=False)
        if len(joined):  # the begin of an answer changes the tokens of its prompt, which it cannot do at inference
            again, _ = self._encode([conversations[i] for i in joined], apart=True)
            encoded = encoded.replaced(joined, again)
        return encoded

    def encode_prompts(self, conversations: list[Conversation]) -> Encoded:
        """Return the token ids of conversations that the assistant continues: with the header of its next turn.

        Raises:
            BadData, BadRecipe: see `include.chat.sequences.sequences`.
        """
        parts = _Parts()
        for number, conversation in enumerate(conversations):
            self._add(parts, number, conversation, self._layouts_of(conversation, None, apart=False))
        return parts.encoded(self.text_encoder)[0]

    def _encode(self, conversations: list[Conversation], apart: bool) -> tuple[Encoded, np.ndarray]:
        """Return the sequences, and the conversations with an answer that changes the tokens of its prompt."""
        parts = _Parts()
        for number, conversation in enumerate(conversations):
            masked = conversation.masked
            answers = tuple(i for i, role in enumerate(conversation.roles) if role == "assistant" and i not in masked)
            self._add(parts, number, conversation, self._layouts_of(conversation, answers, apart))
        return parts.encoded(self.text_encoder)

    def _add(self, parts: _Parts, number: int, conversation: Conversation, layouts: list[Layout]) -> None:
        for layout in layouts:
            for part in layout.parts:
                if isinstance(part, FixedSegment):
                    parts.add_fixed(part)
                else:
                    self._add_text(parts, part, conversation)
            parts.end_sequence(number, layout.bos)

    def _add_text(self, parts: _Parts, between: list[Piece], conversation: Conversation) -> None:
        """Add the text of pieces that stand side by side, cut at the special tokens that are parsed."""
        text, spans = "", list[tuple[int, int]]()
        for piece in between:
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
                    _extend(spans, len(text), len(text) + len(section))
                text = text + section if text else section
        if text:
            parts.add_text(text, spans)

    def parsed_tokens_in(self, text: str) -> list[str]:
        """Return the special tokens that are parsed in a text, in their order."""
        return self._parsed.findall(text) if self._parsed else []

    def _layouts_of(self, conversation: Conversation, answers: tuple[int, ...] | None, apart: bool) -> list[Layout]:
        """Return the layouts of a conversation's sequences.

        Args:
            answers: the turns to train on; None: the prompt for the next turn.
            apart: whether each answer has a sequence of its own and is encoded apart from its prompt.
        """
        form = Form.of(conversation)
        key = (form, answers, apart)
        if key not in self._layouts:
            if len(self._layouts) > MAX_CACHED_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._build(form, answers, apart)
        return self._layouts[key]

    def _build(self, form: Form, answers: tuple[int, ...] | None, apart: bool) -> list[Layout]:
        if answers is None:
            return [self._build_layout(prompt_of(self.template, form), apart)[0]]
        made = [self._build_layout(s, apart) for s in sequences(self.template, form, answers, apart)]
        if any(joined for _, joined in made):  # by the template's own text, in every conversation of this form
            return self._build(form, answers, apart=True)
        return [layout for layout, _ in made]

    def _build_layout(self, sequence: Sequence, apart: bool) -> tuple[Layout, bool]:
        """Encode all text between two control tokens that holds no content.

        A token can cover both template text and content, so text around a content is encoded together with it.

        Returns:
            The layout, and whether the begin of an answer in such a text changes the tokens before it.
        """
        parts: list[FixedSegment | list[Piece]] = []
        between: list[Piece] = []
        joined, bos = False, 0

        def add_fixed(segment: FixedSegment) -> None:
            if parts and isinstance(parts[-1], FixedSegment):
                parts[-1] = parts[-1].joined(segment)
            else:
                parts.append(segment)

        def add_between() -> None:
            nonlocal joined
            if any(piece.turn is not None for piece in between):
                parts.append(list(between))
            elif between:
                text, spans = "", list[tuple[int, int]]()
                for piece in between:
                    if piece.in_loss:
                        _extend(spans, len(text), len(text) + len(piece.text))
                    text += piece.text
                tokens = self.text_encoder.encode([text], [spans])
                joined = joined or len(_joined_texts(self.text_encoder, [text], [spans], tokens)) > 0
                add_fixed(FixedSegment(tuple(tokens.ids.tolist()), tuple(tokens.mask.tolist())))
            between.clear()

        for piece in pieces(self.template, sequence, apart):
            if piece.cut:
                add_between()
            if piece.token is None:
                between.append(piece)
                continue
            add_between()
            add_fixed(FixedSegment((piece.token,), (piece.in_loss,)))
            bos += piece.token == self._bos
        add_between()
        return Layout(parts, bos), joined


def _extend(spans: Spans, begin: int, end: int) -> None:
    """Add a span, joined with the last one if it begins where that one ends."""
    if spans and spans[-1][1] == begin:
        spans[-1] = (spans[-1][0], end)
    else:
        spans.append((begin, end))


def _content(piece: Piece, conversation: Conversation) -> str:
    """Return a turn's content or thoughts as the template writes them."""
    turn = piece.turn or 0
    content = dict(conversation.thoughts)[turn] if piece.of_thoughts else conversation.contents[turn]
    content = content if piece.transform == 0 else CONTENT_TRANSFORMS[piece.transform](content)
    return content.lstrip() if piece.stripped else content


def _joined_texts(text_encoder: Encoder, texts: list[str], spans: list[Spans], tokens: Tokens) -> np.ndarray:
    """Return the numbers of the texts in which tokens before a span differ from those of the text before it alone.

    Args:
        tokens: of the texts.
    """
    before: dict[str, list[int]] = {}
    for number, text_spans in enumerate(spans):
        for begin, _ in text_spans:
            if begin:
                before.setdefault(texts[number][:begin], []).append(number)
    alone = text_encoder.encode([*before], [[] for _ in before])
    found: list[int] = []
    for i, numbers in enumerate(before.values()):
        ids, chosen = alone.ids[alone.starts[i] : alone.starts[i + 1]], np.array(numbers)
        starts, long = tokens.starts[chosen], tokens.starts[chosen + 1] - tokens.starts[chosen] >= len(ids)
        same = long.copy()
        same[long] = (tokens.ids[starts[long][:, None] + np.arange(len(ids))] == ids).all(axis=1)
        found += chosen[~same].tolist()
    return np.unique(np.array(found, np.int64))


class _Parts:
    """The parts of sequences in their order: fixed segments, each stored once, and texts, encoded in one call."""

    def __init__(self) -> None:
        self._segments: dict[FixedSegment, int] = {}
        self._texts: list[str] = []
        self._spans: list[Spans] = []
        self._order: list[int] = []  # of each part: the number of its fixed segment, or -1 - the number of its text
        self._sequence_ends: list[int] = []  # in parts
        self._origin: list[int] = []
        self._bos: list[int] = []

    def add_fixed(self, segment: FixedSegment) -> None:
        self._order.append(self._segments.setdefault(segment, len(self._segments)))

    def add_text(self, text: str, loss_spans: Spans) -> None:
        self._order.append(-1 - len(self._texts))
        self._texts.append(text)
        self._spans.append(loss_spans)

    def end_sequence(self, origin: int, bos: int) -> None:
        self._sequence_ends.append(len(self._order))
        self._origin.append(origin)
        self._bos.append(bos)

    def encoded(self, text_encoder: Encoder) -> tuple[Encoded, np.ndarray]:
        """Encode the texts and put all parts in order.

        Returns:
            The sequences, and the indices of the conversations in which the begin of a trained stretch changes the
            tokens before it (int64, ascending).
        """
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
        sequence_ends, origin = np.array(self._sequence_ends, np.int64), np.array(self._origin, np.int64)
        ends = np.concatenate([[0], lengths.cumsum()])[sequence_ends]
        indices = range_indices(starts, lengths)
        ids, mask = np.concatenate([segment_ids, tokens.ids]), np.concatenate([segment_mask, tokens.mask])
        # the place of each such text in the order of the parts
        joined = np.flatnonzero(is_text)[_joined_texts(text_encoder, self._texts, self._spans, tokens)]
        return (
            Encoded(ids[indices], mask[indices], ends, origin, np.array(self._bos, np.int32)),
            np.unique(origin[np.searchsorted(sequence_ends, joined, "right")]),
        )
