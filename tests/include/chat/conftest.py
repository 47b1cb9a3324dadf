"""Chat formats for the tests of this room. Loading the real tokenizer takes seconds, so tests share each format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from include.chat.chat_format import ChatFormat
from include.chat.conversation_encoder import ConversationEncoder
from include.chat.encoder import TokenizersEncoder
from include.chat.template import ChatTemplate, template_source
from include.chat.tokenized import IGNORED
from include.data.conversation import Conversation
from include.data.sharegpt import parse_row

HELLO = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": " ho "}]
MakeFormat = Callable[..., ChatFormat]


@pytest.fixture(scope="session")
def llama_folder(material: Path) -> Path:
    """The published tokenizer of Llama 3.2."""
    return material / "tokenizers" / "llama-3.2"


@pytest.fixture(scope="session")
def stories(material: Path) -> Path:
    """A real small Llama whose vocabulary has no special tokens of the chat templates."""
    return material / "models" / "stories260K"


@pytest.fixture(scope="session")
def chat_format() -> MakeFormat:
    """Returns the chat format of a folder and a template, one object for all tests. Tests must not change it."""
    formats: dict[tuple[Any, ...], ChatFormat] = {}

    def make(folder: Path, template: str = "llama-3.1", **options: str) -> ChatFormat:
        key = (folder, template, *sorted(options.items()))
        if key not in formats:
            formats[key] = ChatFormat(folder, chat_template=template, base_name="tests/base", **options)
        return formats[key]

    return make


@pytest.fixture(scope="session")
def llama(llama_folder: Path, chat_format: MakeFormat) -> ChatFormat:
    return chat_format(llama_folder)


@pytest.fixture(scope="session")
def llama3(llama_folder: Path, chat_format: MakeFormat) -> ChatFormat:
    return chat_format(llama_folder, "llama-3")


@pytest.fixture(scope="session")
def llama_encode(llama: ChatFormat, llama_folder: Path) -> Callable[..., ConversationEncoder]:
    """Returns the encoder of a chat template over the one loaded tokenizer of Llama."""
    encoders: dict[tuple[str, bool], ConversationEncoder] = {}

    def make(template: str, parse: bool = False) -> ConversationEncoder:
        if (template, parse) not in encoders:
            tokenizer, source = llama.tokenizer, template_source(llama_folder, template, "tests/base")
            encoders[template, parse] = ConversationEncoder(
                ChatTemplate(template, source, tokenizer.named_tokens, tokenizer.added),
                llama.encoder,
                parsed_tokens=tokenizer.added.ids if parse else {},
            )
        return encoders[template, parse]

    return make


@pytest.fixture(scope="session")
def llama_encoder(llama_folder: Path) -> TokenizersEncoder:
    """The encoder of the published tokenizer, without Retune's fast one."""
    backend = Tokenizer.from_file(str(llama_folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    return TokenizersEncoder(backend)


@pytest.fixture(scope="session")
def published_tokenizer(llama_folder: Path) -> Any:
    """The published tokenizer as transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(llama_folder)


@pytest.fixture(scope="session")
def tool_rows(material: Path) -> list[Conversation]:
    rows = json.loads((material / "datasets" / "glaive_toolcall_en_demo.json").read_text("utf-8"))
    return [parse_row(json.dumps(row).encode()).conversation for row in rows]


@pytest.fixture
def base_with(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Returns a copy of the tiny base's tokenizer with a chat template, and with changed fields of special tokens."""

    def make(template: str, **special_token_fields: dict[str, Any]) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base / name, folder)
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        for token in tokenizer["added_tokens"]:
            token.update(special_token_fields.get(token["content"].strip("<|>"), {}))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
        return folder

    return make


def rows_of(
    chat: ChatFormat | ConversationEncoder, *conversations: list[dict[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of conversations of role/content messages."""
    return list(chat.encode([Conversation.of(messages) for messages in conversations]).rows())


def trained_text(chat: ChatFormat, labels: list[int]) -> str:
    """The text of the tokens in the loss."""
    return chat.decode([label for label in labels if label != IGNORED])
