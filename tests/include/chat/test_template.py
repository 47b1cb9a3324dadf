"""Chat templates: their pieces for an order of roles, and the templates that cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from include.chat.chat_format import ChatFormat
from include.chat.conversation_encoder import ConversationEncoder
from include.chat.template import renders_tools, template_source
from include.errors import BadData, BadRecipe
from tests.include.chat.conftest import HELLO, MakeFormat, rows_of, trained_text

HEADER = "<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
PROMPT = "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"


def test_the_date_of_a_run_is_not_in_its_ids(llama_encode: Callable[..., ConversationEncoder]) -> None:
    official = llama_encode("tokenizer").template
    assert "strftime_now" in official.source
    assert "Today Date: 26 Jul 2024" in official.render(HELLO)


def test_only_templates_that_render_tools_take_them(llama_folder: Path) -> None:
    names = ("llama-3.1", "llama-3", "alpaca", "vicuna")
    found = {name: renders_tools(template_source(llama_folder, name, "tests/base")) for name in names}
    assert found == {"llama-3.1": True, "llama-3": False, "alpaca": False, "vicuna": False}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{{ m['content'] }}", " ho "),
        ("{{ m['content'] | trim }}", "ho"),
        ("{{ m['content'] | tojson }}", '" ho "'),
    ],
)
def test_contents_are_encoded_as_the_template_writes_them(
    base_with: Callable[..., Path], content: str, expected: str
) -> None:
    template = f"{{{{ bos_token }}}}{{% for m in messages %}}{HEADER}{content}<|eot_id|>{{% endfor %}}{PROMPT}"
    chat = ChatFormat(base_with(template), chat_template="tokenizer")
    ((ids, labels),) = rows_of(chat, HELLO)
    assert chat.decode(ids) == chat.template.render(HELLO)
    assert trained_text(chat, labels) == f"{expected}<|eot_id|>"


@pytest.mark.parametrize(
    ("turn", "error", "message"),
    [
        (f"{HEADER}{{{{ m['content'] | upper }}}}<|eot_id|>", BadRecipe, "drops or changes parts of the turns"),
        (f"{HEADER}{{{{ m['content'] }}}}", BadRecipe, "no token at the end of an assistant turn"),
        (f"{HEADER}{{{{ m['content'] }}}} over <|eot_id|>", BadRecipe, "no token at the end of an assistant turn"),
        (f"{HEADER}{{{{ m['content'] }}}}{{{{ m['content'] }}}}<|eot_id|>", BadData, "user, assistant once each"),
        (f"{HEADER}<|eot_id|>", BadData, "does not write the turns user, assistant once each and in order"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(
    base_with: Callable[..., Path], turn: str, error: type[Exception], message: str
) -> None:
    folder = base_with(f"{{{{ bos_token }}}}{{% for m in messages %}}{turn}{{% endfor %}}{PROMPT}")
    with pytest.raises(error, match=message):
        rows_of(ChatFormat(folder, chat_template="tokenizer"), HELLO)


def test_an_order_of_roles_that_the_template_refuses_is_named(stories: Path, chat_format: MakeFormat) -> None:
    turns = [*HELLO, {"role": "tool", "content": "7"}, HELLO[1]]
    with pytest.raises(BadData, match=r"vicuna does not accept a conversation with the roles user, assistant, tool"):
        rows_of(chat_format(stories, "vicuna"), turns)
