"""Texts to token ids: by tiktoken where it is proven to agree with the tokenizer, else by the tokenizer itself.

tiktoken encodes several times faster than Hugging Face's tokenizers. It merges any two neighbours whose joint is in the
vocabulary, the joint that was learned first before the others. That is what a byte-level BPE tokenizer does when each
token can be reached by every split of it into two tokens and merges are ordered as ids are: Llama 3's vocabulary is
such a one. `fast_encoder` checks exactly that; `ChatFormat.prove` compares real rows at every run besides.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import orjson

Spans = list[tuple[int, int]]  # of characters in a text, or of tokens in its ids; end not included
Encoding = tuple[np.ndarray, Spans]  # ids (int32), and for each span of characters the tokens that overlap it


class Encoder(Protocol):
    """Encodes texts that hold no special tokens; what looks like one in them stays text."""

    name: str

    def encode(self, texts: list[tuple[str, Spans]]) -> list[Encoding]:
        """For each text its ids, and for each of its spans of characters the range of tokens that overlap it."""


class TokenizersEncoder:
    """The tokenizer's own encoder."""

    name = "tokenizers"

    def __init__(self, backend: Any):
        self._backend = backend

    def encode(self, texts: list[tuple[str, Spans]]) -> list[Encoding]:
        """See `Encoder`."""
        encodings = self._backend.encode_batch([text for text, _ in texts], add_special_tokens=False)
        found = []
        for encoding, (_, spans) in zip(encodings, texts, strict=True):
            ranges = []
            for begin, end in spans:
                inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > begin]
                ranges.append((inside[0], inside[-1] + 1) if inside else (0, 0))
            found.append((np.array(encoding.ids, np.int32), ranges))
        return found


class TiktokenEncoder:
    """tiktoken over the tokenizer's own vocabulary."""

    name = "tiktoken"

    def __init__(self, pattern: str, ranks: dict[bytes, int], fallback: Encoder):
        import tiktoken

        self._encoding = tiktoken.Encoding("retune", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._lengths = {rank: len(token) for token, rank in ranks.items()}  # bytes
        self._fallback = fallback

    def encode(self, texts: list[tuple[str, Spans]]) -> list[Encoding]:
        """See `Encoder`."""
        return [self._one(text, spans) for text, spans in texts]

    def _one(self, text: str, spans: Spans) -> Encoding:
        try:
            ids = self._encoding.encode_ordinary(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # tiktoken's regex gives up on, say, a million spaces, with a panic of its own class
            return self._fallback.encode([(text, spans)])[0]
        return np.array(ids, np.int32), [self._overlapping(ids, text, *span) for span in spans]

    def _overlapping(self, ids: list[int], text: str, begin: int, end: int) -> tuple[int, int]:
        """The tokens of which at least a byte stands in the span."""
        if begin == end:
            return 0, 0
        first, last, lengths = 0, len(ids), self._lengths
        before, behind = len(text[:begin].encode()), len(text[end:].encode())
        while before > 0 and lengths[ids[first]] <= before:
            before -= lengths[ids[first]]
            first += 1
        while behind > 0 and lengths[ids[last - 1]] <= behind:
            behind -= lengths[ids[last - 1]]
            last -= 1
        return first, last


def fast_encoder(backend: Any) -> Encoder:
    """tiktoken where it agrees with the tokenizer by construction, else the tokenizer itself."""
    own = TokenizersEncoder(backend)
    settings = orjson.loads(backend.to_str())
    pattern = _byte_level_pattern(settings)
    model = settings["model"]
    if pattern is None or model["type"] != "BPE" or not model.get("ignore_merges") or model.get("dropout"):
        return own
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    vocabulary = {token: id for token, id in model["vocab"].items() if all(c in to_byte for c in token)}
    if not _merges_are_complete(
        vocabulary, [tuple(m) if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    ):
        return own
    special = {token["id"] for token in settings["added_tokens"]}
    ranks = {bytes(to_byte[c] for c in token): id for token, id in vocabulary.items() if id not in special}
    return TiktokenEncoder(pattern, ranks, own)


def _byte_level_pattern(settings: dict[str, Any]) -> str | None:
    """The regular expression of a pre-tokenizer that splits by it and then maps bytes, and does nothing else."""
    steps = (settings["pre_tokenizer"] or {}).get("pretokenizers", [])
    if settings["normalizer"] is not None or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, level = steps
    plain = split["behavior"] == "Isolated" and not split["invert"]
    if not plain or level["add_prefix_space"] or level["use_regex"]:
        return None
    return split["pattern"].get("Regex")


def _merges_are_complete(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> bool:
    """Whether every split of a token into two tokens is a merge, and merges are ordered as the ids of their results."""
    listed = set(merges)
    results = [vocabulary.get(left + right, -1) for left, right in merges]
    if any(earlier > later for earlier, later in pairwise(results)):
        return False
    return all(
        (token[:cut], token[cut:]) in listed
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    )


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
