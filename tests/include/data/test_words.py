"""Words of texts in every script: Unicode's own, whatever stands beside a text."""

from __future__ import annotations

import random
import unicodedata
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import regex

from include.data.words import hash_shingles, hash_words

TEXTS = {
    "English": "Don't split 3.14, 1,000 or e.g. snake_case; but split a-b, \u201cquoted\u201d words and____lines ____.",
    "Korean": "안녕하세요, 지난주에 주문한 냉장고 상품이 아직 도착하지 않았는데 배송 상태를 확인해 주실 수 있나요?",
    "Hindi": "नमस्ते, मैंने पिछले हफ़्ते जो फ्रिज मंगाया था वह अभी तक नहीं आया है।",
    "Vietnamese": "Xin chào, tủ lạnh tôi đặt tuần trước vẫn chưa đến, bạn có thể kiểm tra giúp không?",
    "Russian": "Здравствуйте, холодильник, заказанный на прошлой неделе, ещё не пришёл — «проверьте», пожалуйста.",
    "Chinese": "你好，我上周订购的冰箱还没有送到，可以帮我查一下物流吗？",
    "Japanese": "先週注文した冷蔵庫がまだ届いていません。カタカナとひらがなABC。",
    "Thai": "สวัสดีครับ ตู้เย็นที่สั่งไปเมื่อสัปดาห์ที่แล้วยังไม่มาถึง",
    "Arabic": "مرحبا، الثلاجة التي طلبتها الأسبوع الماضي لم تصل بعد.",
    "Hebrew": 'צה"ל שלום לכולם',
    "Emoji": "Good 👍 or bad 👎? 🚀",
}


def words(text: str) -> list[str]:
    """The words of a text, by the boundaries that `regex` finds one by one."""
    cuts = [0, *(found.start() for found in regex.finditer(r"(?w)\b", text)), len(text)]
    parts = [text[begin:end] for begin, end in pairwise(cuts)]
    return [part for part in parts if regex.search(r"[\p{Alphabetic}\p{N}\p{Extended_Pictographic}]", part)]


def hashes(*texts: str) -> list[list[int]]:
    found, counts = hash_words(pa.array(texts, pa.large_string()))
    return [part.tolist() for part in np.split(found, counts.cumsum()[:-1])]


@pytest.mark.parametrize("script", TEXTS)
def test_words_are_those_of_unicode(script: str) -> None:
    text = TEXTS[script]
    (found,) = hashes(text)
    alone = [word for (word,) in hashes(*words(text))]
    assert found == alone, "each word of the text has the hash that it has alone, and there are no others"
    different = {unicodedata.normalize("NFC", word.lower()) for word in words(text)}
    assert len(set(found)) == len(different), "other words have other hashes"


def test_words_of_random_texts_are_those_of_unicode() -> None:
    chooser = random.Random(5)
    blocks = (range(0x41, 0x250), range(0x370, 0x590), range(0x3040, 0x3100), range(0xAC00, 0xAD00))
    letters = [chr(c) for block in blocks for c in block if unicodedata.category(chr(c)).startswith("L")]
    marks = list("'.,:;_-\"\u2019 \n\u00b7") + list("漢字ไทย12९٣😀")
    texts = ["".join(chooser.choice(chooser.choice((letters, marks))) for _ in range(30)) for _ in range(300)]
    assert [len(one) for one in hashes(*texts)] == [len(words(text)) for text in texts]
    assert hashes(*texts) == [hashes(text)[0] for text in texts], "a text's words do not depend on other texts"
    # WB4: combining marks and soft hyphens are skipped, also beside punctuation, where `regex` finds a boundary
    for one_word in ("soft\u00adhyphen", "can\u00ad't", "don'\u0301t", "1\u0301;22", "Ӏ\u00ad'Ж"):
        assert [len(found) for found in hashes("x", one_word, "\u0301y")] == [1, 1, 1], one_word
    assert hashes("é", "\u0301y") == [hashes("é")[0], hashes("y")[0]], "a mark at the begin of the next text"


def test_case_and_composition_make_no_difference_and_long_words_count_to_their_end() -> None:
    for text in TEXTS.values():
        plain, decomposed, upper = hashes(text, unicodedata.normalize("NFD", text), text.upper())
        assert decomposed == plain
        assert len(upper) == len(plain) and (upper == plain or "ß" in text)
    one, other, longer = hashes("предпринимательство", "предпринимательница", "предпринимательств")
    assert one != other != longer != one, "words with the same first eight bytes"
    assert hashes("'a", "b'", "c", "d") == [hashes(text)[0] for text in ("a", "b", "c", "d")], "no word in two texts"
    assert hashes("", "?!", "a") == [[], [], hashes("a")[0]]
    assert hash_words(pa.array([], pa.large_string()))[1].tolist() == []


def test_shingles_stay_within_their_text() -> None:
    def shingles(*texts: str) -> list[list[int]]:
        found, counts = hash_shingles(*hash_words(pa.array(texts, pa.large_string())))
        return [part.tolist() for part in np.split(found, counts.cumsum()[:-1])]

    one, short, two, none = shingles("a b c d", "x y", "b c d", "?")
    assert [len(one), len(short), len(two), len(none)] == [2, 1, 1, 0]
    assert one[1:] == two
    assert short == shingles("x y", "z")[0] == shingles("x y")[0] != shingles("y x")[0], "whatever text comes next"
