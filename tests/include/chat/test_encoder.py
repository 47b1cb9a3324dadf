"""The fast encoder gives the tokenizer's ids and masks, on published vectors and on any text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from include.chat.chat_format import ChatFormat
from include.chat.conversation_encoder import ConversationEncoder
from include.chat.encoder import GigatokenEncoder, Spans, TokenizersEncoder, fast_encoder
from include.data.conversation import Conversation
from tests.include.chat.conftest import MakeFormat

AWKWARD = [
    "", " ", "\n", "\n\nhello", "tail \n", "äöü ß", "日本語テキスト", "🙂👩‍👩‍👧",
    "e\u0301", "\x00\ufffd\u200b", "a" * 3000, "don't DON'T",
    "1234567", " \t\r\n x", "<|eot_id|>", "</s><s>", "x" + " " * 5000 + "y", "العربية", "\U0010ffff", "ﬁ²½",
]  # fmt: skip


@pytest.mark.parametrize("template", ["llama-3.1", "llama-3", "alpaca", "vicuna"])
def test_the_fast_encoder_agrees_with_the_tokenizer_on_ids_and_masks(
    llama_encode: Callable[..., ConversationEncoder], llama_encoder: TokenizersEncoder, template: str
) -> None:
    fast = llama_encode(template)
    assert fast.text_encoder.name == "gigatoken"
    exact = ConversationEncoder(fast.template, llama_encoder, parsed_tokens={})
    rows = [Conversation(("user", "assistant"), [one, other]) for one in AWKWARD for other in AWKWARD]
    assert list(fast.encode(rows).rows()) == list(exact.encode(rows).rows())


def test_the_fast_encoder_agrees_with_published_vectors(llama: ChatFormat, material: Path) -> None:
    published = json.loads((material / "golden" / "llama_bpe_vectors.json").read_text("utf-8"))
    vectors = [*published["cases"], *published["extra"]]
    texts = [vector["text"] for vector in vectors]
    tokens = llama.encoder.encode(texts, [[] for _ in texts])
    for i, vector in enumerate(vectors):
        assert tokens.ids[tokens.starts[i] : tokens.starts[i + 1]].tolist() == vector["ids"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80))
def test_the_fast_encoder_agrees_on_any_text(llama: ChatFormat, llama_encoder: TokenizersEncoder, text: str) -> None:
    spans = [[(0, len(text) // 2)]]
    fast, exact = llama.encoder.encode([text], spans), llama_encoder.encode([text], spans)
    assert fast.ids.tolist() == exact.ids.tolist()
    assert fast.mask.tolist() == exact.mask.tolist()


def test_any_character_in_any_surroundings_gets_the_tokenizers_ids(
    llama: ChatFormat, llama_encoder: TokenizersEncoder
) -> None:
    draw = random.Random(0)
    newer = [0x88F, 0xC5C, 0xCDC, 0xA7CE, 0xA7F1, *range(0x10940, 0x1095A), *range(0x11DB0, 0x11DEA)]  # Unicode 17
    # the planes with scripts; in the others nearly all is one class
    drawn = [draw.choice((draw.randrange(0x80, 0xD800), draw.randrange(0xE000, 0x20000))) for _ in range(2000)]
    before, after = (
        ["", "x", " ", "1", "é", "'", "\n", ".", " x", "\t"],
        ["", "'sjk", "'s", "b", "1", "\n\n", " ", "'ll"],
    )
    for character in map(chr, [*newer, *drawn]):
        surroundings = [one + character + other for one in before for other in after]
        texts = surroundings if ord(character) in newer else draw.sample(surroundings, 6)
        no_spans: list[Spans] = [[]] * len(texts)
        fast, exact = llama.encoder.encode(texts, no_spans), llama_encoder.encode(texts, no_spans)
        assert (fast.starts.tolist(), fast.ids.tolist()) == (exact.starts.tolist(), exact.ids.tolist()), hex(
            ord(character)
        )
    assert isinstance(llama.encoder, GigatokenEncoder)
    assert all(llama.encoder.differs_on(chr(c)) for c in newer)
    assert sum(llama.encoder.differs_on(chr(c)) for c in range(0xC0, 0x250)) == 0, "gigatoken encodes known letters"


def test_rows_with_characters_newer_than_the_tokenizers_tables_get_its_ids(
    llama: ChatFormat, llama_encoder: TokenizersEncoder, material: Path
) -> None:
    file = next((material / "cases").glob("42-*")) / "unicode_row512.jsonl"
    rows = [json.loads(line)["conversations"] for line in file.read_bytes().splitlines()]
    texts = [turn["value"] for row in rows for turn in row]
    fast, exact = (encoder.encode(texts, [[] for _ in texts]) for encoder in (llama.encoder, llama_encoder))
    assert (fast.starts.tolist(), fast.ids.tolist()) == (exact.starts.tolist(), exact.ids.tolist())


def test_a_character_that_the_two_classify_differently_goes_to_the_tokenizer(
    llama: ChatFormat, llama_encoder: TokenizersEncoder
) -> None:
    newer = "\U00011de0"  # in Unicode 17 a digit, in the tables of tokenizers 0.23 unassigned
    texts = [f"x {newer} y", "plain", f"{newer}{newer}", "also plain"]
    spans = [[(0, 3)], [(0, 5)], [(0, 1)], []]
    fast, exact = llama.encoder.encode(texts, spans), llama_encoder.encode(texts, spans)
    assert fast.ids.tolist() == exact.ids.tolist()
    assert fast.mask.tolist() == exact.mask.tolist()
    assert isinstance(llama.encoder, GigatokenEncoder)
    assert llama.encoder.differs_on(newer), "otherwise this test shows nothing"
    assert not llama.encoder.differs_on("plain")


def test_a_vocabulary_that_does_not_keep_the_bytes_of_a_text_is_encoded_by_the_tokenizer(
    stories: Path, chat_format: MakeFormat
) -> None:
    assert chat_format(stories, "vicuna").encoder.name == "tokenizers"


@pytest.mark.parametrize("name", ["qwen3", "smollm2", "deepseek_v3", "gptoss", "gemma3", "llama2"])
def test_published_tokenizers_get_the_fast_encoder_where_it_gives_their_ids(
    name: str, published: Callable[[str], Path]
) -> None:
    file = published(name) / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.encode_special_tokens = True
    added = [token["content"] for token in json.loads(file.read_bytes())["added_tokens"]]
    fast, exact = fast_encoder(backend, file.read_bytes(), added), TokenizersEncoder(backend)
    # two are of SentencePiece, and SmolLM2's vocabulary lacks some bytes
    assert fast.name == ("tokenizers" if name in ("gemma3", "llama2", "smollm2") else "gigatoken")
    texts = [*AWKWARD, "cafe\u0301 and caf\u00e9", "\u212b", "q\u0307\u0323", "\u1100\u1161\u11a8", "10 = 2 * 5"]
    texts += [f"{one} {other}" for one in texts for other in texts[:8]]
    spans: list[Spans] = [[(0, len(text) // 2)] for text in texts]
    assert fast.encode(texts, spans).ids.tolist() == exact.encode(texts, spans).ids.tolist()
    assert fast.encode(texts, spans).mask.tolist() == exact.encode(texts, spans).mask.tolist()
    if isinstance(fast, GigatokenEncoder):
        assert fast.differs_on("cafe\u0301") is (name == "qwen3"), "Qwen3's tokenizer composes the two characters"
        assert not fast.differs_on("caf\u00e9")
