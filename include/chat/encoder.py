"""Texts to token ids: by gigatoken where it is proven to agree with the tokenizer, else by the tokenizer itself.

gigatoken encodes byte-level vocabularies many times faster than Hugging Face's tokenizers. Where the two could
differ is how they classify a character (their Unicode tables are of different years): so every character of the data
is compared in a few surroundings before a text that holds it is trusted to gigatoken, and `ChatFormat.prove` compares
whole rows at every run besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from include.data.parallel import no_collection

Spans = list[tuple[int, int]]  # of characters in a text; end not included
UNICODE = 0x110000
SURROUNDINGS = ("{0}", "a{0}b", " {0}", "1{0}2", "{0}{0}", ".{0}\n", " {0} x", "'{0}")  # where a class would show


@dataclass(frozen=True)
class Tokens:
    """Token ids of texts, one text after another.

    Attributes:
        ids: int32, flat.
        starts: where each text's ids begin, with the end of the last one (int64, number of texts + 1).
        marked: whether at least a byte of the token stands in one of the text's spans (bool, as long as ids).
    """

    ids: np.ndarray
    starts: np.ndarray
    marked: np.ndarray


class Encoder(Protocol):
    """Encodes texts that hold no special tokens; what looks like one in them stays text."""

    name: str

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """The ids of each text, and which of them overlap its spans."""


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices of the ranges from `start` to `start + length`, one after another."""
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    kind = np.int32 if total < 2**31 and (starts + lengths).max(initial=0) < 2**31 else np.int64
    found = np.repeat((starts - (ends - lengths)).astype(kind), lengths)
    found += np.arange(total, dtype=kind)
    return found


class TokenizersEncoder:
    """The tokenizer's own encoder."""

    name = "tokenizers"

    def __init__(self, backend: Any):
        self._backend = backend

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """See `Encoder`."""
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        lengths = [len(encoding) for encoding in encodings]
        ids = np.array([id for encoding in encodings for id in encoding.ids], np.int32)
        marked = [
            any(begin < b and end > a for a, b in wanted) for encoding, wanted in zip(encodings, spans, strict=True)
            for begin, end in encoding.offsets
        ]  # fmt: skip
        return Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(marked, bool))


class GigatokenEncoder:
    """gigatoken over the tokenizer's own vocabulary, for texts whose characters it classifies as the tokenizer does."""

    name = "gigatoken"

    def __init__(self, encoder: Any, fallback: TokenizersEncoder):
        self._encoder, self._fallback = encoder, fallback
        vocabulary = encoder.vocab
        self._bytes = np.zeros(max(vocabulary) + 1, np.int64)  # of each token
        for id, token in vocabulary.items():
            self._bytes[id] = len(token)
        self._known = np.arange(UNICODE) < 128  # characters that have been compared
        self._odd = np.zeros(UNICODE, bool)  # those on which the two differ
        self._compare(np.arange(128))

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        """See `Encoder`."""
        if not texts:
            return Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, bool))
        foreign = [text for text in texts if not text.isascii()]
        seen = np.zeros(UNICODE, bool)
        seen[_code_points("".join(foreign))] = True
        if len(new := np.flatnonzero(seen & ~self._known)):
            self._compare(new)
        if (seen & self._odd).any() or self._odd[:128].any():
            own = np.array([bool(self._odd[_code_points(text)].any()) for text in texts])
            if own.any():
                return self._encode_apart(texts, spans, own)
        return self._encode(texts, spans)

    def _encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        layout = self._encoder.encode_batch(texts, parallel=False).layout
        ids, starts = np.asarray(layout.content.data).view(np.int32), np.asarray(layout.offsets.data)
        ends = self._bytes[ids].cumsum()  # of each token, in bytes from the beginning of the first text
        begins = np.concatenate([[0], ends])[starts]  # of each text
        wanted = [
            (text, *(span if texts[text].isascii() else _in_bytes(texts[text], span)))
            for text, found in enumerate(spans)
            for span in found
            if span[0] < span[1]
        ]
        change = np.zeros(len(ids) + 1, np.int8)  # +1 where a marked stretch begins, -1 where it ends
        if wanted:
            text, first, last = np.array(wanted, np.int64).T
            np.add.at(change, np.searchsorted(ends, begins[text] + first, "right"), 1)
            np.add.at(change, np.searchsorted(ends, begins[text] + last, "left") + 1, -1)
        return Tokens(ids, starts.astype(np.int64), change[:-1].cumsum() > 0)

    def _encode_apart(self, texts: list[str], spans: list[Spans], own: np.ndarray) -> Tokens:
        """Some of the texts by the tokenizer itself, put back in their places."""
        parts = []
        for chosen, encode in ((np.flatnonzero(~own), self._encode), (np.flatnonzero(own), self._fallback.encode)):
            if len(chosen):
                parts.append((chosen, encode([texts[i] for i in chosen], [spans[i] for i in chosen])))
        starts, lengths, base = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64), 0
        for chosen, tokens in parts:
            starts[chosen], lengths[chosen] = base + tokens.starts[:-1], np.diff(tokens.starts)
            base += len(tokens.ids)
        order = places(starts, lengths)
        ids, marked = (np.concatenate([getattr(t, name) for _, t in parts])[order] for name in ("ids", "marked"))
        return Tokens(ids, np.concatenate([[0], lengths.cumsum()]), marked)

    def _compare(self, characters: np.ndarray) -> None:
        """Learn on which of the characters the two differ."""
        texts = [form.format(chr(c)) for c in characters for form in SURROUNDINGS]
        ours, theirs = (encode(texts, [[]] * len(texts)) for encode in (self._encode, self._fallback.encode))
        for i in range(len(texts)):
            mine, other = (t.ids[t.starts[i] : t.starts[i + 1]] for t in (ours, theirs))
            if not np.array_equal(mine, other):
                self._odd[characters[i // len(SURROUNDINGS)]] = True
        self._known[characters] = True


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _in_bytes(text: str, span: tuple[int, int]) -> tuple[int, int]:
    begin = len(text[: span[0]].encode())
    return begin, begin + len(text[span[0] : span[1]].encode())


def fast_encoder(backend: Any, file: Path) -> Encoder:
    """gigatoken where it knows this kind of tokenizer and keeps every byte of a text, else the tokenizer itself.

    Args:
        backend: the tokenizer, as Hugging Face's `tokenizers.Tokenizer`; file: its tokenizer.json.
    """
    import gigatoken
    from gigatoken.gigatoken_rs import BPETokenizer

    own = TokenizersEncoder(backend)
    if backend.normalizer is not None:
        return own  # offsets are counted in the bytes of the text as it is
    try:
        with no_collection():
            settings = orjson.loads(file.read_bytes())
            settings.update(added_tokens=[], post_processor=None)  # what looks like a special token stays text
            encoder = gigatoken.Tokenizer.from_json(orjson.dumps(settings))
    except Exception:  # whatever it does not know, it says in an exception of one kind or another
        return own
    return GigatokenEncoder(encoder, own) if isinstance(encoder.backend, BPETokenizer) else own
