"""Each rule on ids and loss masks: it fires on a fault of that kind, and not on good rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from include.chat.chat_format import ChatFormat
from include.chat.encoder import Encoder, Spans, TokenizersEncoder, Tokens
from include.chat.splitting import mask_all_but_last, split_conversation, trained_turns
from include.chat.tokenized import Encoded
from include.chat.verification import (
    pair_faults,
    token_faults,
    verify_encoding,
    verify_loss_masks,
)
from include.data.conversation import Conversation
from include.errors import BadRecipe
from tests.include.chat.conftest import HELLO, MakeFormat

ROLES = ("user", "assistant")
TWO_EXCHANGES = Conversation((*ROLES, *ROLES), ["One?", "First answer.", "Two?", "Second answer."])
ROWS = [Conversation(ROLES, ["What is it?", "It is 7."]), TWO_EXCHANGES, Conversation.of(HELLO)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BOS, EOT = 0, 4  # ids of the tiny base's vocabulary


@dataclass
class Faulty:
    """An encoder with a fault: other ids, or a mask without the first token of each text's spans."""

    exact: Encoder
    id_offset: int = 0
    drops_first: bool = False
    name: str = "faulty"

    def encode(self, texts: list[str], spans: list[Spans]) -> Tokens:
        tokens = self.exact.encode(texts, spans)
        before = np.concatenate([[False], tokens.mask[:-1]])
        return Tokens(tokens.ids + self.id_offset, tokens.starts, tokens.mask & (before | (not self.drops_first)))


@pytest.fixture(scope="session")
def tiny(tiny_base: Path, chat_format: MakeFormat) -> ChatFormat:
    return chat_format(tiny_base)


def test_a_fast_encoder_with_other_ids_is_replaced_by_the_tokenizer(tiny_base: Path, tiny: ChatFormat) -> None:
    chat = ChatFormat(tiny_base, chat_template="llama-3.1")
    chat.use_encoder(Faulty(TokenizersEncoder(chat.tokenizer.backend), id_offset=1))
    assert list(chat.encode(ROWS).rows()) != list(tiny.encode(ROWS).rows())
    assert verify_encoding(chat, ROWS) == len(ROWS)
    assert chat.encoder.name == "tokenizers"
    assert list(chat.encode(ROWS).rows()) == list(tiny.encode(ROWS).rows())


def test_a_fast_encoder_with_the_same_ids_is_kept(tiny: ChatFormat, llama: ChatFormat) -> None:
    for chat in (tiny, llama):
        assert verify_encoding(chat, ROWS) == len(ROWS)
        assert chat.encoder.name == "gigatoken"


def test_a_token_that_swallows_the_blanks_behind_it_does_so_in_rows(base_with: Callable[..., Path]) -> None:
    # in a whole text the token takes the line breaks after it with it, as tokens of Phi-3 do
    chat = ChatFormat(base_with(TEMPLATE, end_header_id={"rstrip": True}), chat_template="tokenizer")
    assert verify_encoding(chat, ROWS) == len(ROWS)
    assert "\n" not in chat.decode(chat.encode(ROWS[:2]).ids.tolist())


def test_a_template_that_changes_some_contents_is_refused(base_with: Callable[..., Path]) -> None:
    folder = base_with(TEMPLATE.replace("m['content']", "m['content'].replace('7', 'seven')"))
    chat = ChatFormat(folder, chat_template="tokenizer")
    assert verify_encoding(chat, [TWO_EXCHANGES]) == 1
    with pytest.raises(BadRecipe, match="tokenizer changes an answer that begins with 'It is 7.'"):
        verify_encoding(chat, ROWS)
    with pytest.raises(BadRecipe, match="the ids of tokenizer differ.*begins with 'Are there 7"):
        verify_encoding(chat, [Conversation(ROLES, ["Are there 7?", "Yes."])])


def test_rows_with_text_like_a_special_token_are_not_compared(tiny: ChatFormat) -> None:
    assert verify_encoding(tiny, [*ROWS, Conversation(ROLES, ["<|eot_id|>?", "Yes."])]) == len(ROWS)


def test_an_encoder_whose_mask_lacks_a_part_of_an_answer_is_refused(tiny_base: Path) -> None:
    chat = ChatFormat(tiny_base, chat_template="llama-3.1")
    chat.use_encoder(Faulty(TokenizersEncoder(chat.tokenizer.backend), drops_first=True, name="tokenizers"))
    with pytest.raises(BadRecipe, match="the ids of llama-3.1 differ"):
        verify_encoding(chat, ROWS)


def test_a_mask_without_one_token_of_any_answer_is_refused(tiny: ChatFormat) -> None:
    encoded = tiny.encode([TWO_EXCHANGES])
    verify_loss_masks(tiny, [TWO_EXCHANGES], encoded)
    for position in np.flatnonzero(encoded.loss_mask & (encoded.ids != EOT)):
        mask = encoded.loss_mask.copy()
        mask[position] = False
        with pytest.raises(BadRecipe, match="the loss does not count all tokens of an answer"):
            verify_loss_masks(tiny, [TWO_EXCHANGES], Encoded(encoded.ids, mask, encoded.ends))


def test_an_answer_never_changes_the_tokens_of_its_prompt(llama: ChatFormat, tiny: ChatFormat) -> None:
    """Llama's tokenizer joins line breaks at the begin of an answer with those of the header; the tiny one splits the
    header's line breaks before a word. What the model sees when it is asked has neither."""
    for chat in (llama, tiny):
        for answer in ("It is 7.", "7", "\nSeven"):
            row = Conversation((*ROLES, *ROLES), ["What is it?", answer, "Are you sure?", "Yes."])
            prompts = [chat.prompt(row.messages[:turn]) for turn in (1, 3)]
            encoded = list(chat.encode([row]).rows())
            begins = [
                [i for i in range(len(ids)) if labels[i] != -100 and labels[i - 1] == -100] for ids, labels in encoded
            ]
            found = [ids[:i] for (ids, _), at in zip(encoded, begins, strict=True) for i in at]
            assert found == prompts
            if chat is llama:
                assert len(encoded) == (2 if answer == "\nSeven" else 1)


def test_conversations_with_several_sequences_keep_their_place(llama: ChatFormat) -> None:
    several = Conversation((*ROLES, *ROLES), ["What is it?", "\nSeven", "Are you sure?", "\nYes."])
    rows = [TWO_EXCHANGES, several, ROWS[0], several]
    encoded = llama.encode(rows)
    assert encoded.origin.tolist() == [0, 1, 1, 2, 3, 3]
    assert list(encoded.rows()) == [sequence for row in rows for sequence in llama.encode([row]).rows()]


def counts(chat: ChatFormat, conversation: Conversation, ids: list[int], mask: list[bool]) -> dict[str, int]:
    """The rules that fire for one conversation, between two good ones; the good ones must not fire."""
    good = chat.encode([TWO_EXCHANGES])
    encoded = Encoded(
        np.concatenate([good.ids, np.array(ids, np.int32), good.ids]),
        np.concatenate([good.loss_mask, np.array(mask, bool), good.loss_mask]),
        np.cumsum([len(good.ids), len(ids), len(good.ids)]),
    )
    faults = token_faults(chat, encoded, [TWO_EXCHANGES, conversation, TWO_EXCHANGES], max_seq_length=256)
    assert faults.pop("tokens").tolist() == [len(good.ids), len(ids), len(good.ids)]
    assert not any(values[0] or values[2] for values in faults.values())
    return {name: int(values[1]) for name, values in faults.items() if values[1]}


def test_each_rule_of_the_token_contract_fires_on_its_fault_alone(tiny: ChatFormat) -> None:
    (ids, labels), = tiny.encode([TWO_EXCHANGES]).rows()  # fmt: skip
    mask = [label != -100 for label in labels]
    ends = [i for i, id in enumerate(ids) if id == EOT and mask[i]]
    begins = [i for i in range(len(ids)) if mask[i] and not mask[i - 1]]
    assert len(ends) == len(begins) == 2

    def found(ids: list[int], mask: list[bool]) -> dict[str, int]:
        return counts(tiny, TWO_EXCHANGES, ids, mask)

    assert found(ids, mask) == {}
    # the mask
    assert found(ids, [False] * len(ids)) == {"untrained": 1, "mask_errors": 2, "unended_turns": 2}
    no_second = [bit and i < begins[1] for i, bit in enumerate(mask)]
    assert found(ids, no_second) == {"mask_errors": 1, "unended_turns": 1}
    question_in_loss = [bit or ends[0] < i < begins[1] for i, bit in enumerate(mask)]
    assert found(ids, question_in_loss) == {"mask_errors": 1, "unended_turns": 1}, "one segment for two turns"
    gap = [bit and i != begins[1] + 1 for i, bit in enumerate(mask)]
    assert found(ids, gap) == {"mask_errors": 1}, "one turn in two segments"
    everything = [True] * len(ids)
    assert found(ids, everything) == {"mask_errors": 1, "unended_turns": 1}
    # the end of a turn
    end_not_in_loss = [bit and i != ends[1] for i, bit in enumerate(mask)]
    assert found(ids, end_not_in_loss) == {"unended_turns": 1}
    without_end = [i for i in range(len(ids)) if i != ends[0]]
    assert found([ids[i] for i in without_end], [mask[i] for i in without_end]) == {"unended_turns": 1}
    # beginning of text
    assert found([BOS, *ids], [False, *mask]) == {"bos_errors": 1}
    assert found(ids[1:], mask[1:]) == {"bos_errors": 1}
    # length
    assert found([*ids[:1], *[9] * 256, *ids[1:]], [*mask[:1], *[False] * 256, *mask[1:]]) == {"tokens_over": 1}


def test_a_conversation_without_an_answer_is_untrained(tiny: ChatFormat) -> None:
    silent = Conversation(("user",), ["Anyone?"])
    faults = token_faults(tiny, tiny.encode([TWO_EXCHANGES, silent]), [TWO_EXCHANGES, silent], 256)
    assert faults["untrained"].tolist() == [0, 1]


def test_ends_are_not_counted_where_the_vocabulary_lacks_the_templates_tokens(
    stories: Path, chat_format: MakeFormat
) -> None:
    split = chat_format(stories, "chatml", missing_special_tokens="split")
    faults = token_faults(split, split.encode(ROWS), ROWS, 512)
    assert {name: values.tolist() for name, values in faults.items() if name != "tokens" and values.any()} == {}


def test_a_pair_has_one_prompt_whatever_its_answers_begin_with(llama: ChatFormat) -> None:
    rows = [Conversation(ROLES, ["What is it?", answer]) for answer in ("It is 7.", "\nIt is 7.", "It is 7.")]
    rejected = [Conversation(ROLES, ["What is it?", "Who knows?"]) for _ in rows]
    faults = pair_faults(llama, llama.encode(rows), llama.encode(rejected), rows, 256)
    assert not any(values.any() for name, values in faults.items() if name != "tokens")


def test_the_contract_of_a_pair_holds_for_both_answers(tiny: ChatFormat) -> None:
    rows, long = [ROWS[0]], [Conversation(ROLES, ["What is it?", "word " * 100])]
    for chosen, rejected in ((rows, long), (long, rows)):
        faults = pair_faults(tiny, tiny.encode(chosen), tiny.encode(rejected), rows, 128)
        assert faults["tokens_over"].tolist() == [1]
        assert faults["tokens"].tolist() == [len(tiny.encode(long).ids)]


def test_a_long_conversation_is_split_before_user_turns(tiny: ChatFormat) -> None:
    exchanges = [["One?", "A first answer."], ["Two?", "word " * 200], ["Three?", "A third."], ["Four?", "A fourth."]]
    turns = [content for exchange in exchanges for content in exchange]
    whole = Conversation(("system", *ROLES * 4), ["Be brief.", *turns])
    sizes = [len(tiny.encode([Conversation(("system", *ROLES), ["Be brief.", *e])]).ids) for e in exchanges]
    limit = max(sizes[0], sizes[2] + sizes[3])
    parts, lost = split_conversation(tiny, whole, limit)
    assert [part.contents for part in parts] == [
        ["Be brief.", *exchanges[0]],
        ["Be brief.", *exchanges[2], *exchanges[3]],
    ]
    assert lost == [4], "the answer of the exchange that alone is too long"
    assert split_conversation(tiny, Conversation(ROLES, exchanges[1]), max_tokens=64) == ([], [1])
    # masks stay with their turns; a piece without an answer to train on is none, and nothing of it is lost
    parts, lost = split_conversation(tiny, replace(whole, masked=(2, 6)), limit)
    assert [(part.contents, part.masked) for part in parts] == [(["Be brief.", *exchanges[2], *exchanges[3]], (2,))]
    assert lost == [4]
    assert split_conversation(tiny, replace(whole, masked=(2, 4, 6)), limit)[1] == []
    # an answer that alone is trained on, the last one, gets as much before it as fits
    three = Conversation(ROLES * 3, [*exchanges[0], *exchanges[2], *exchanges[3]])
    limit = len(tiny.encode([Conversation(ROLES * 2, three.contents[:4])]).ids)
    assert [part.contents for part in split_conversation(tiny, three, limit)[0]] == [three.contents[:4], exchanges[3]]
    parts, lost = split_conversation(tiny, mask_all_but_last(three), limit)
    assert [(part.contents, part.masked, lost) for part in parts] == [(three.contents[2:], (1,), [])]


def test_masked_turns_are_out_of_the_loss_and_change_no_id(llama: ChatFormat, tiny: ChatFormat) -> None:
    turns = ["Be brief.", "One?", "First.", "Two?", "Second.", "Three?", "Third."]
    plain = Conversation(("system", *ROLES * 3), turns)
    for chat in (llama, tiny):
        (ids, labels), = chat.encode([plain]).rows()  # fmt: skip
        for masked in ((2,), (4,), (2, 6), (4, 6), (2, 4), (2, 4, 6)):
            one = replace(plain, masked=masked)
            encoded = chat.encode([one, plain])
            *of_one, other = encoded.rows()
            assert other == (ids, labels), "the next conversation has its own masks"
            found, found_labels = of_one[0] if of_one else ([], [])
            assert found == ids[: len(found)], "it ends with its last trained answer"
            trained = chat.decode([label for label in found_labels if label != -100])
            answers = [turns[turn] + "<|eot_id|>" for turn in (2, 4, 6) if turn not in masked]
            assert trained == "".join(answers)
            faults = token_faults(chat, encoded, [one, plain], 256)
            assert not faults["mask_errors"].any() and not faults["unended_turns"].any()
            verify_loss_masks(chat, [one, plain], encoded)
            assert token_faults(chat, encoded, [plain, plain], 256)["mask_errors"][0] == len(masked)


def test_of_a_conversation_the_last_answer_alone_is_trained_on() -> None:
    conversation = Conversation((*ROLES, *ROLES), ["One?", "First.", "Two?", "Second."])
    assert mask_all_but_last(conversation).masked == (1,)
    assert trained_turns(mask_all_but_last(conversation)) == [3]
    assert trained_turns(mask_all_but_last(replace(conversation, masked=(3,)))) == []
    assert mask_all_but_last(Conversation(ROLES, ["One?", "First."])).masked == ()


def test_pieces_of_a_long_conversation_keep_their_thoughts(llama: ChatFormat) -> None:
    one = Conversation(ROLES, ["Why? " * 40, "So."], thoughts=((1, "I think."),))
    whole = Conversation(ROLES * 2, one.contents * 2, thoughts=((1, "I think."), (3, "I think.")))
    encoded = llama.encode([one])
    assert "<think>\nI think.\n</think>\n\nSo.<|eot_id|>" in llama.decode(encoded.ids.tolist())
    assert split_conversation(llama, whole, len(encoded.ids)) == ([one, one], [])


def test_pieces_of_a_long_conversation_keep_their_tool_calls(llama: ChatFormat) -> None:
    call = '[{"type":"function","function":{"name":"look","arguments":{"n":7}}}]'
    roles = ("user", "assistant", "tool", "assistant")
    contents = ["What? " * 40, "", "7", "It is 7."]
    whole = Conversation(roles * 2, contents * 2, calls=((1, call), (5, call)))
    one = Conversation(roles, contents, calls=((1, call),))
    longest = len(llama.encode([one]).ids)
    assert split_conversation(llama, whole, longest) == ([one, one], [])
