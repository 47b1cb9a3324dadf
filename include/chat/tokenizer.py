"""The tokenizer of a base model: its files, its special tokens, its own encoding."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from include.errors import NotFound

# how the model families of the shipped templates write special tokens: finds those that a vocabulary lacks
LIKE_CONTROL_TOKEN = r"<\|[^|<>\s]+\|>|</?s>|<(?:start|end)_of_turn>"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# what transformers writes into tokenizer_config.json about the machine and the class that wrote it
ABOUT_THE_WRITER = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # what `ChatTokenizer.save` writes


@dataclass(frozen=True)
class AddedTokens:
    """The added tokens of a vocabulary, by their texts.

    Attributes:
        ids: the id of each.
        special: those that are special tokens.
        left, right: those that swallow the blanks before or behind them.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    right: frozenset[str] = frozenset()

    @classmethod
    def of(cls, backend: Any) -> AddedTokens:
        """Return the added tokens of a `tokenizers.Tokenizer`."""
        tokens = dict(sorted(backend.get_added_tokens_decoder().items()))

        def those(name: str) -> frozenset[str]:
            return frozenset(str(token.content) for token in tokens.values() if getattr(token, name))

        ids = {str(token.content): id for id, token in tokens.items()}
        return cls(ids, those("special"), those("lstrip"), those("rstrip"))


class ChatTokenizer:
    """A tokenizer, read from the files that transformers writes.

    Args:
        folder: the folder with `tokenizer.json`, `tokenizer_config.json` and, in older models,
            `special_tokens_map.json`.
        base_name: the base model's name in messages.

    Attributes:
        backend: the `tokenizers.Tokenizer`. It does not look for special tokens: in a text they stay text.
        added: the added tokens, special and others.
        named_tokens: the texts of `bos_token`, `eos_token` and so on, by these names.

    Raises:
        NotFound: the folder has no `tokenizer.json`.
    """

    def __init__(self, folder: Path, base_name: str):
        from tokenizers import Tokenizer

        self.folder, self.file = folder, folder / "tokenizer.json"
        self._content: bytes | None = None  # with tokens that the file lacks
        if not self.file.is_file():
            raise NotFound(
                f"field 'base_model': {base_name} has no tokenizer.json",
                "Choose a base model with a tokenizer.json file",
            )
        self._load(Tokenizer.from_file(str(self.file)))
        self.named_tokens = named_tokens(folder)
        if self.id_of("pad_token") is None:
            reserved = next((token for token in self.added.ids if "finetune_right_pad" in token), None)
            self.named_tokens["pad_token"] = reserved or self.named_tokens["eos_token"]

    def _load(self, backend: Any) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.added = backend, AddedTokens.of(backend)
        self.backend.encode_special_tokens = True  # True: special tokens in a text are encoded as ordinary text

    @property
    def content(self) -> bytes:
        """Return the content of `tokenizer.json`, with the tokens that `add` has added."""
        return self._content or self.file.read_bytes()

    def add(self, tokens: Sequence[str]) -> dict[str, int]:
        """Add special tokens to the vocabulary, behind all others; return their ids by their texts."""
        from tokenizers import Tokenizer

        counted = Tokenizer.from_str(self.content.decode())
        counted.add_special_tokens(list(tokens))
        known = counted.get_vocab()
        ids = {token: known[token] for token in tokens}
        settings = orjson.loads(self.content)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        settings["added_tokens"] += [{"id": id, "content": token, **flags} for token, id in ids.items()]
        self._content = orjson.dumps(settings)
        self._load(Tokenizer.from_str(self._content.decode()))
        return ids

    @property
    def keeps_text(self) -> bool:
        """Return whether decoding gives back the encoded text: the tokenizer has no normalizer."""
        return self.backend.normalizer is None

    def id_of(self, name: str) -> int | None:
        """Return the id of `bos_token`, `eos_token` or another of `NAMED_TOKENS`, or None."""
        return self.backend.token_to_id(self.named_tokens[name]) if self.named_tokens.get(name) else None

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of a rendered conversation, as `apply_chat_template(tokenize=True)` computes them.

        The special tokens in the text get their own ids.
        """
        self.backend.encode_special_tokens = False
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        finally:
            self.backend.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, with special tokens."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def special_in(self, ids: list[int]) -> list[str]:
        """Return the special tokens among ids, and texts that have the form of special tokens, each once."""
        texts = {id: text for text, id in self.added.ids.items() if text in self.added.special}
        tokens = [texts[id] for id in ids if id in texts]
        return list(dict.fromkeys([*tokens, *re.findall(LIKE_CONTROL_TOKEN, self.decode(ids))]))

    def keep_as_text(self, tokens: Iterable[str]) -> None:
        """Encode these added tokens as ordinary text where a text has them, as special tokens are encoded."""
        from tokenizers import Tokenizer

        others = {*tokens} - self.added.special
        if not others & self.added.ids.keys():
            return
        settings = orjson.loads(self.backend.to_str())
        for token in settings["added_tokens"]:
            token["special"] = token["special"] or token["content"] in others
        self.backend = Tokenizer.from_str(orjson.dumps(settings).decode())
        self.backend.encode_special_tokens = True

    def save(self, folder: Path, template_source: str) -> None:
        """Write the tokenizer with a chat template, so that transformers 4.57 and 5 load exactly these two.

        Args:
            folder: created if it does not exist.
            template_source: the jinja source of the chat template.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.content)
        (folder / "chat_template.jinja").write_text(template_source, encoding="utf-8")
        dropped = ("chat_template", *ABOUT_THE_WRITER, *NAMED_TOKENS)
        config = {name: value for name, value in tokenizer_config(self.folder).items() if name not in dropped}
        # this class uses tokenizer.json unchanged; the classes of some models build another tokenizer from it
        config.update(tokenizer_class="PreTrainedTokenizerFast", **self.named_tokens)
        # transformers 4.57 would take the space before a full stop from the decoded text, version 5 refuses to
        config["clean_up_tokenization_spaces"] = False
        # transformers 4.57 gives a tokenizer of this class `token_type_ids` otherwise, which causal models refuse
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(extra := config.get("extra_special_tokens"), list):
            # transformers 4.57 stops at a list under this name; version 5 reads the older name, too
            del config["extra_special_tokens"]
            older = config.get("additional_special_tokens") or []
            config["additional_special_tokens"] = older + [token for token in extra if token not in older]
        (folder / "tokenizer_config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


def copy_tokenizer(saved: Path, folder: Path) -> None:
    """Copy the files of a tokenizer that `ChatTokenizer.save` wrote, beside a model or an adapter.

    `save_pretrained` of transformers 5 would write them in a form that transformers 4.57 does not load.
    """
    for name in FILES:
        shutil.copyfile(saved / name, folder / name)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`; empty if the folder has no such file."""
    file = folder / "tokenizer_config.json"
    return orjson.loads(file.read_bytes()) if file.is_file() else {}


def named_tokens(folder: Path) -> dict[str, Any]:
    """Return the texts of `bos_token`, `eos_token` and so on, by these names.

    `tokenizer_config.json` takes precedence over `special_tokens_map.json`.
    """
    older = folder / "special_tokens_map.json"
    settings = {**(orjson.loads(older.read_bytes()) if older.is_file() else {}), **tokenizer_config(folder)}
    found = {name: settings[name] for name in NAMED_TOKENS if settings.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}
