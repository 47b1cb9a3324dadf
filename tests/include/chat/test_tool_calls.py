"""Calls of tools: ids and loss masks as the template writes the calls, or a sentence about what it does not write."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from include.chat.chat_format import ChatFormat
from include.chat.template import call_problem, template_source
from include.chat.tokenized import IGNORED
from include.chat.verification import verify_encoding
from include.data.conversation import Conversation

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "a\nb", "n": [1, None]}}}
TOOLS = '[{"type":"function","function":{"name":"look","parameters":{}}}]'
MESSAGES = [
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "here"},
    {"role": "assistant", "content": "It is here."},
]


def called(text: str = "", *calls: dict) -> Conversation:
    messages = [MESSAGES[0], {"role": "assistant", "content": text, "tool_calls": [*calls] or [CALL]}, *MESSAGES[2:]]
    return Conversation.of(messages)


def test_calls_have_the_ids_of_the_template_and_count_in_the_loss(llama: ChatFormat, llama_folder: Path) -> None:
    conversation = called()
    conversation.tools = TOOLS
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama_folder)
    tokenizer.chat_template = llama.template.source
    ((ids, labels),) = llama.encode([conversation]).rows()
    theirs = tokenizer.apply_chat_template(
        MESSAGES, tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}], return_dict=False
    )
    assert list(ids) == list(theirs)
    trained = llama.decode([label for label in labels if label != IGNORED])
    call = '{"name": "look", "parameters": {"at": "a\\nb", "n": [1, null]}}'
    assert trained == f"{call}<|eot_id|>It is here.<|eot_id|>"
    assert verify_encoding(llama, [conversation]) == 1


def test_special_tokens_in_arguments_are_text_and_masked_calls_do_not_train(llama: ChatFormat) -> None:
    quoted = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|eot_id|>"}}}
    conversation = called("", quoted)
    conversation.masked = (1,)
    ((ids, labels),) = llama.encode([conversation]).rows()
    assert list(ids).count(llama.tokenizer.special_ids["<|eot_id|>"]) == 5  # the template's system turn, and four turns
    assert llama.decode([label for label in labels if label != IGNORED]) == "It is here.<|eot_id|>"


def test_what_a_template_does_not_write_is_said(llama_folder: Path) -> None:
    source = template_source(llama_folder, "llama-3.1", "tests/base")
    assert call_problem(source, "llama-3.1", called()) is None
    assert "text beside them" in (call_problem(source, "llama-3.1", called("I look.")) or "")
    assert "single tool-calls" in (call_problem(source, "llama-3.1", called("", CALL, CALL)) or "")
    import trl

    qwen = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    assert call_problem(qwen, "qwen", called("I look.", CALL, CALL)) is None
    assert call_problem(qwen, "qwen", called()) is None
