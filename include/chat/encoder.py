"""Texts to token ids: with gigatoken where it agrees with the tokenizer, else with the tokenizer itself.

gigatoken encodes byte-level vocabularies many times faster than Hugging Face's tokenizers. The two can differ in how
they classify a character, because their Unicode tables are of different years. Therefore a text with a character that
the tokenizer's tables do not have goes to the tokenizer, and each other character of the data is compared in a few
contexts before a text that contains it goes to gigatoken. So does a text that the tokenizer would first bring into
Unicode's normal form C. In addition, `include.chat.verification.verify_encoding` compares whole rows at every run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from include.data.parallel import no_collection

Spans = list[tuple[int, int]]  # begin and end in characters of a text; the end is not included
CODE_POINTS = 0x110000  # of Unicode
NORMAL_FORM_C = {"type": "NFC"}  # in tokenizer.json
# contexts in which a different class of the character {0} gives different tokens
CONTEXTS = ("{0}", "a{0}b", " {0}", "1{0}2", "{0}{0}", ".{0}\n", " {0} x", "'{0}", "{0}'s", "x{0}'re")


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, one text after another.

    Attributes:
        ids: the ids of all texts (int32, flat).
        starts: the start of each text in `ids`, and the end of the last text (int64, number of texts + 1).
        mask: whether at least one byte of the token is in one of the text's spans (bool, as long as `ids`).
    """

    ids: np.ndarray
    starts: np.ndarray
    mask: np.ndarray


class Encoder(Protocol):
    """Encodes texts between special tokens. A special token inside a text is encoded as ordinary text."""

    name: str

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """Return the ids of each text, with the mask of its spans."""


def range_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices of the ranges from `start` to `start + length`, one range after another."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    dtype = np.int32 if total < 2**31 and (starts + lengths).max(initial=0) < 2**31 else np.int64
    indices = np.repeat((starts - (ends - lengths)).astype(dtype), lengths)
    indices += np.arange(total, dtype=dtype)
    return indices


class TokenizersEncoder:
    """Encodes with the tokenizer itself.

    Args:
        backend: a `tokenizers.Tokenizer` with `encode_special_tokens` set.
    """

    name = "tokenizers"

    def __init__(self, backend: Any):
        self._backend = backend

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """Return the ids of each text, with the mask of its spans."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        ids = np.array([id for encoding in encodings for id in encoding.ids], np.int32)
        mask = [
            any(begin < span_end and end > span_begin for span_begin, span_end in text_spans)
            for encoding, text_spans in zip(encodings, spans, strict=True)
            for begin, end in encoding.offsets
        ]
        return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(mask, bool))


class GigatokenEncoder:
    """Encodes with gigatoken; texts with a character on which it differs from the tokenizer go to the tokenizer.

    Args:
        encoder: a `gigatoken.Tokenizer` over the tokenizer's vocabulary.
        tokenizer_encoder: the tokenizer.
        normalizer: brings texts into normal form C, of `tokenizers`; None if the tokenizer leaves texts as they are.
    """

    name = "gigatoken"

    def __init__(self, encoder: Any, tokenizer_encoder: TokenizersEncoder, normalizer: Any = None):
        self._encoder, self._tokenizer_encoder, self._normalizer = encoder, tokenizer_encoder, normalizer
        vocabulary = encoder.vocab
        self._token_bytes = np.zeros(max(vocabulary) + 1, np.int64)  # length of each token in bytes
        for id, token in vocabulary.items():
            self._token_bytes[id] = len(token)
        self._compared = np.arange(CODE_POINTS) < 128
        self._differs = np.zeros(CODE_POINTS, bool)
        self._compare(np.arange(128))

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """Return the ids of each text, with the mask of its spans."""
        if not texts:
            return Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, bool))
        present = np.zeros(CODE_POINTS, bool)
        present[_code_points("".join(text for text in texts if not text.isascii()))] = True
        if len(new := np.flatnonzero(present & ~self._compared)):
            self._compare(new)
        if (present & self._differs).any() or self._differs[:128].any() or (self._normalizer and present.any()):
            by_tokenizer = np.array([self.differs_on(text) for text in texts])
            if by_tokenizer.any():
                return self._encode_by_both(texts, spans, by_tokenizer)
        return self._encode(texts, spans)

    def differs_on(self, text: str) -> bool:
        """Return whether gigatoken can differ from the tokenizer on a compared character of the text, or the tokenizer
        would normalize the text.
        """
        if self._normalizer and not text.isascii() and self._normalizer.normalize_str(text) != text:
            return True
        return bool(self._differs[_code_points(text)].any())

    def _encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        layout = self._encoder.encode_batch(texts, parallel=False).layout
        ids, starts = np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data)
        token_ends = self._token_bytes[ids].cumsum()  # in bytes from the start of the first text
        text_begins = np.concatenate([[0], token_ends])[starts]
        byte_spans = [
            (number, *(span if texts[number].isascii() else _byte_span(texts[number], span)))
            for number, text_spans in enumerate(spans)
            for span in text_spans
            if span[0] < span[1]
        ]
        change = np.zeros(len(ids) + 1, np.int8)  # +1 at the first token of a span, -1 after its last token
        if byte_spans:
            numbers, begins, ends = np.array(byte_spans, np.int64).T
            np.add.at(change, np.searchsorted(token_ends, text_begins[numbers] + begins, "right"), 1)
            np.add.at(change, np.searchsorted(token_ends, text_begins[numbers] + ends, "left") + 1, -1)
        return Tokens(ids, starts.astype(np.int64), change[:-1].cumsum() > 0)

    def _encode_by_both(self, texts: list[str], spans: list[Spans], by_tokenizer: np.ndarray) -> Tokens:
        """Encode some of the texts with the tokenizer and the others with gigatoken; keep the order of the texts."""
        parts = []
        for chosen, encode in (
            (np.flatnonzero(~by_tokenizer), self._encode),
            (np.flatnonzero(by_tokenizer), self._tokenizer_encoder.encode),
        ):
            if len(chosen):
                parts.append((chosen, encode([texts[i] for i in chosen], [spans[i] for i in chosen])))
        starts, lengths, base = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64), 0
        for chosen, tokens in parts:
            starts[chosen], lengths[chosen] = base + tokens.starts[:-1], np.diff(tokens.starts)
            base += len(tokens.ids)
        order = range_indices(starts, lengths)
        ids, mask = (np.concatenate([getattr(t, name) for _, t in parts])[order] for name in ("ids", "mask"))
        return Tokens(ids, np.concatenate([[0], lengths.cumsum()]), mask)

    def _compare(self, characters: np.ndarray) -> None:
        """Find the characters that the tokenizer does not know, or on which the two differ in one of `CONTEXTS`."""
        # no few contexts show every difference of a character that is unassigned for one and a letter for the other
        self._differs[characters] = ~np.isin(characters, _code_points(_assigned("".join(map(chr, characters)))))
        texts = [context.format(chr(c)) for c in characters for context in CONTEXTS]
        no_spans: list[Spans] = [[]] * len(texts)
        fast, exact = self._encode(texts, no_spans), self._tokenizer_encoder.encode(texts, no_spans)
        for i in range(len(texts)):
            fast_ids, exact_ids = (t.ids[t.starts[i] : t.starts[i + 1]] for t in (fast, exact))
            if not np.array_equal(fast_ids, exact_ids):
                self._differs[characters[i // len(CONTEXTS)]] = True
        self._compared[characters] = True


def _assigned(text: str) -> str:
    """Return the characters of a text that the Unicode tables of `tokenizers` know."""
    from tokenizers import Regex, pre_tokenizers

    return "".join(part for part, _ in pre_tokenizers.Split(Regex(r"\p{Cn}"), "removed").pre_tokenize_str(text))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _byte_span(text: str, span: tuple[int, int]) -> tuple[int, int]:
    """Convert a span of characters to a span of UTF-8 bytes."""
    begin = len(text[: span[0]].encode())
    return begin, begin + len(text[span[0] : span[1]].encode())


def fast_encoder(backend: Any, content: bytes, as_text: Collection[str]) -> Encoder:
    """Return a gigatoken encoder if gigatoken supports the tokenizer, and it normalizes no text or into normal form C.

    For every other tokenizer, return the encoder of the tokenizer itself.

    Args:
        backend: the tokenizer, as `tokenizers.Tokenizer`.
        content: its tokenizer.json.
        as_text: the added tokens that stay text in a text.
    """
    import gigatoken
    from gigatoken.gigatoken_rs import BPETokenizer

    tokenizer_encoder = TokenizersEncoder(backend)
    try:
        with no_collection():
            settings = orjson.loads(content)
            normalizer = settings.pop("normalizer", None)
            if normalizer not in (None, NORMAL_FORM_C, {"type": "Sequence", "normalizers": []}):
                return tokenizer_encoder
            others = [token for token in settings["added_tokens"] if token["content"] not in as_text]
            settings.update(added_tokens=others, post_processor=None)
            encoder = gigatoken.Tokenizer.from_json(orjson.dumps(settings))
    except Exception:  # gigatoken raises several types for tokenizers that it does not support
        return tokenizer_encoder
    supported = isinstance(encoder.backend, BPETokenizer)
    if not supported:
        return tokenizer_encoder
    return GigatokenEncoder(encoder, tokenizer_encoder, backend.normalizer if normalizer == NORMAL_FORM_C else None)
