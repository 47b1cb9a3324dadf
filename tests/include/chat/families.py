"""Model families: published tokenizers, templates of TRL with a small tokenizer each, and the cases of the material.

The oracle is transformers' `apply_chat_template` alone: `asked` is what the model sees when it is asked for an answer,
`answered` what it would have to write. Nothing here imports `include.chat`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from include.paths import PROJECT
from tests.conftest import LLAMA_3_SPLIT

Message = dict[str, Any]
TODAY = date(2024, 7, 26)  # for templates that write the date
SHIPPED = PROJECT / "include" / "templates"
TRL = Path(find_spec("trl").origin).parent / "chat_templates"  # type: ignore[union-attr, arg-type]
CORPUS = ["What does Anna of house 0 make on day 0? Anna of house 0 makes bread on day 0, number 0.\n\n"] * 4


@dataclass(frozen=True)
class Family:
    """A tokenizer with a chat template.

    Attributes:
        ends: the texts of the tokens that end an answer, of which the template writes one; the last one that it writes
            counts. None where the template writes no end: the header of the next turn ends the answer.
        template: a template of TRL.
        shipped: a template that Retune ships.
        published: the name of a tokenizer in `fetch.py`.
        case: a folder of the material.
        model_type: for config.json: some published tokenizers name a class that is not theirs, and transformers
            corrects that by the type of the model.
        special: added tokens of the small tokenizer, that are special; `bos`, `eos` and `pad` too.
        plain: its added tokens that are not special.
        gpt2_split: whether the small tokenizer splits texts as GPT-2 does, so that the last line break of a prompt
            depends on what follows it; else as Llama 3 does.
        swallows: whether its special tokens swallow the blanks behind them (rstrip), as Phi-3's do.
    """

    ends: tuple[str, ...] | None
    template: str = ""
    shipped: str = ""
    published: str = ""
    case: str = ""
    model_type: str = "llama"
    special: str = ""
    plain: str = ""
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    swallows: bool = False
    gpt2_split: bool = False


_IM = {"ends": ("<|im_end|>",), "eos": "<|im_end|>", "special": "<|im_start|>"}
_THINK = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
_QWEN = {**_IM, "pad": "<|endoftext|>", "plain": _THINK}
_NEMOTRON = {**_IM, "bos": "<s>", "pad": "<unk>", "plain": _THINK}
_VISION = {**_QWEN, "special": "<|im_start|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"}
_DEEPSEEK = {
    "ends": ("<｜end▁of▁sentence｜>",),
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "plain": "<think> </think> <｜User｜> <｜Assistant｜> <｜tool▁sep｜> "
    + " ".join(
        f"<｜tool▁{what}▁{side}｜>" for what in ("calls", "call", "outputs", "output") for side in ("begin", "end")
    ),
}
_GEMMA = {"ends": ("<end_of_turn>",), "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
_LLAMA = {
    "ends": ("<|eot_id|>", "<|eom_id|>"),
    "bos": "<|begin_of_text|>",
    "eos": "<|eot_id|>",
    "pad": "<|finetune_right_pad_id|>",
    "special": "<|start_header_id|> <|end_header_id|> <|eom_id|> <|python_tag|>",
}
_COHERE = {
    "ends": ("<|END_OF_TURN_TOKEN|>",),
    "bos": "<BOS_TOKEN>",
    "eos": "<|END_OF_TURN_TOKEN|>",
    "pad": "<PAD>",
    "special": "<|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> "
    "<|START_RESPONSE|> <|END_RESPONSE|>",
}
_GPT_OSS = {
    "ends": ("<|return|>", "<|end|>", "<|call|>"),
    "bos": "<|startoftext|>",
    "eos": "<|return|>",
    "pad": "<|endoftext|>",
    "special": "<|start|> <|end|> <|message|> <|channel|> <|call|> <|constrain|>",
}
_LFM = {
    **_IM,
    "bos": "<|startoftext|>",
    "pad": "<|pad|>",
    "special": "<|im_start|> "
    + " ".join(f"<|tool_{w}_{s}|>" for w in ("list", "call", "response") for s in ("start", "end")),
}
_PHI = {
    "ends": ("<|end|>",),
    "bos": "<s>",
    "eos": "<|endoftext|>",
    "pad": "<unk>",
    "special": "<|end|> <|user|> <|assistant|> <|system|>",
}
_SENTENCE = {"ends": ("</s>",), "bos": "<s>", "eos": "</s>", "pad": "<unk>"}

FAMILIES: dict[str, Family] = {
    # the published tokenizers
    "Qwen3": Family(("<|im_end|>",), published="qwen3", model_type="qwen3"),
    "Gemma 3": Family(("<end_of_turn>",), published="gemma3", model_type="gemma3_text"),
    "gpt-oss": Family(_GPT_OSS["ends"], "gptoss", published="gptoss", model_type="gpt_oss"),
    "DeepSeek-V3": Family(_DEEPSEEK["ends"], published="deepseek_v3", model_type="deepseek_v3"),
    "Llama 2": Family(("</s>",), published="llama2", case="cases/30-llama-2-chat/llama2"),
    "SmolLM2": Family(("<|im_end|>",), published="smollm2"),
    # the material
    "Llama 3.2": Family(_LLAMA["ends"], case="tokenizers/llama-3.2"),
    "case 10": Family(("<|im_end|>",), case="cases/10-template-qwen3/qwen3"),
    "case 11": Family(("<end_of_turn>",), case="cases/11-template-gemma3/gemma3"),
    "case 12": Family(("</s>",), case="cases/12-template-mistral_v3/mistral_v3"),
    "case 28": Family(("<|im_end|>",), case="cases/28-bos-is-the-turn-start/smollm2"),
    "case 29": Family(_GPT_OSS["ends"], case="cases/29-gpt-oss-several-turns/gptoss"),
    "case 30": Family(("</s>",), case="cases/30-llama-2-chat/llama2"),
    # TRL's templates, each with a small tokenizer
    **{
        f"trl/{name}": Family(template=name, **fields)  # type: ignore[arg-type]
        for name, fields in {
            "cohere": _COHERE,
            "cohere2": _COHERE,
            "deepseek_r1_distill": _DEEPSEEK,
            "deepseekv3": _DEEPSEEK,
            "diffusion_gemma": {**_GEMMA, "ends": ("<turn|>", "<|tool_response>")},
            "gemma": {**_GEMMA, "special": "<start_of_turn> <end_of_turn>"},
            "gemma3": {**_GEMMA, "special": "<start_of_turn> <end_of_turn> <start_of_image>"},
            "gemma4": {**_GEMMA, "ends": ("<turn|>", "<|tool_response>")},
            "glm4moe": {
                "ends": None,
                "eos": "<|endoftext|>",
                "pad": "<|endoftext|>",
                "special": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>",
                "plain": f"{_THINK} /nothink <arg_key> </arg_key> <arg_value> </arg_value>",
            },
            "gptoss": _GPT_OSS,
            "lfm2": _LFM,
            "lfm2_2_5": {**_LFM, "plain": "<think> </think>"},
            "llama3": _LLAMA,
            "llama3_1": _LLAMA,
            "llama3_2": _LLAMA,
            "muse_glimmer": {
                "ends": ("<|eot|>", "<|eom|>"),
                "bos": "<|begin_of_text|>",
                "eos": "<|eot|>",
                "pad": "<|pad|>",
                "special": "<|start|> <|message|> <|eom|>",
            },
            "nemotron_3_5_lightning": _NEMOTRON,
            "nemotron_3_nano": _NEMOTRON,
            "nemotron_3_super": _NEMOTRON,
            "nemotron_3_ultra": _NEMOTRON,
            "phi3": {**_PHI, "swallows": True},
            "phi3_5": {**_PHI, "swallows": True},
            "qwen2_5": {**_QWEN, "plain": "<tool_call> </tool_call>"},
            "qwen3": _QWEN,
            "qwen3_5_nothink": _VISION,
            "qwen3_5_think": _VISION,
            "qwen3_6": _VISION,
            "qwen3_8": _VISION,
            "qwen3_instruct_2507": _QWEN,
        }.items()
    },
    "trl/llama3, split as GPT-2 does": Family(template="llama3", gpt2_split=True, **_LLAMA),  # type: ignore[arg-type]
    # the templates that Retune ships, for bases without one of their own
    **{
        f"shipped/{name}": Family(shipped=name, **fields)  # type: ignore[arg-type]
        for name, fields in {
            "alpaca": _SENTENCE,
            "chatml": _QWEN,
            "gemma": {**_GEMMA, "special": "<start_of_turn> <end_of_turn>"},
            "llama": _SENTENCE,
            "llama-3": _LLAMA,
            "llama-3.1": _LLAMA,
            "mistral": {**_SENTENCE, "special": "[INST] [/INST]"},
            "phi-3": _PHI,
            "vicuna": _SENTENCE,
            "vicuna_old": _SENTENCE,
            "zephyr": {**_SENTENCE, "special": "<|system|> <|user|> <|assistant|>"},
        }.items()
    },
}
_GEMMA4_TOKENS = "<|turn> <turn|> <|channel> <channel|> <|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> " + (
    '<tool_response|> <|"|> <|think|>'
)


def make_folder(family: Family, folder: Path, material: Path, published: Callable[[str], Path]) -> Path:
    """Make the folder of a family as a repository of the Hub would be, without weights: tokenizer and template.

    Args:
        folder: is made.
        published: returns the folder of a published tokenizer.
    """
    if family.case and not family.published:
        return material / family.case
    folder.mkdir(parents=True)
    if family.published:
        for file in published(family.published).glob("*token*"):
            os.symlink(file, folder / file.name)
        if (template := published(family.published) / "chat_template.jinja").exists():
            os.symlink(template, folder / template.name)
    else:
        _small_tokenizer(family).save_pretrained(folder)
    if family.template or family.case or family.shipped:
        source = TRL / f"{family.template}.jinja" if family.template else material / family.case / "chat_template.jinja"
        source = SHIPPED / f"{family.shipped}.jinja" if family.shipped else source
        (folder / "chat_template.jinja").write_text(source.read_text("utf-8"), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": family.model_type, "transformers_version": "5.17.0"}))
    return folder


def _small_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 400 tokens and add the family's own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([] if family.gpt2_split else [pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.gpt2_split),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    named = {f"{name}_token": getattr(family, name) for name in ("bos", "eos", "pad") if getattr(family, name)}
    special = [*named.values(), *(family.special or (_GEMMA4_TOKENS if "gemma" in family.template else "")).split()]
    bpe.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=family.swallows) for t in dict.fromkeys(special)]
    )
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain.split()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **named)


def load(folder: Path) -> Any:
    """Return the tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(folder)


def text(
    tokenizer: Any, messages: list[Message], tools: list | None = None, prompt: bool = False, **kwargs: Any
) -> str:
    """Return the rendered conversation; with `prompt` as the model sees it when it is asked for the next answer."""
    settings = {"strftime_now": TODAY.strftime, **kwargs}
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **settings
    )


def asked(tokenizer: Any, messages: list[Message], tools: list | None = None, **kwargs: Any) -> list[int]:
    """Return the ids that the model sees when it is asked to answer these turns."""
    settings = {"strftime_now": TODAY.strftime, **kwargs}
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **settings
    )


def asked_whole(tokenizer: Any, messages: list[Message], tools: list | None = None, **kwargs: Any) -> list[int]:
    """Return the ids of the rendered conversation."""
    settings = {"strftime_now": TODAY.strftime, **kwargs}
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False, **settings)


class Rewritten(Exception):
    """The template writes other text before the answer than it shows the model when it asks for the answer."""


def answered(
    family: Family, tokenizer: Any, messages: list[Message], k: int, tools: list | None = None, **kwargs: Any
) -> str:
    """Return what the template writes for turn `k` behind the prompt for it, up to and with the end of the turn.

    Raises:
        Rewritten: the prompt is not how the conversation with the answer begins.
    """
    before = text(tokenizer, messages[:k], tools, prompt=True, **kwargs)
    whole = text(tokenizer, messages[: k + 1], tools, **kwargs)
    asked_last = messages[k - 1]["content"].strip()
    if not whole.startswith(before):  # it rewrites earlier turns: what stands behind the last of them counts
        before, whole = before[before.rindex(asked_last) :], whole[whole.rindex(asked_last) :]
    if not whole.startswith(before) and before.endswith("<think>\n") and whole.startswith(before[:-1]):
        before = before[:-1]  # the prompt opens the thought with a line break, an empty one has none
    if not whole.startswith(before):
        raise Rewritten("the prompt is not how the answered conversation begins")
    answer = whole[len(before) :]
    if family.ends is None:
        return answer.rstrip() + ("<|observation|>" if messages[k].get("tool_calls") else "<|user|>")
    ends = [answer.rfind(end) + len(end) for end in family.ends if end in answer]
    if not ends:
        raise Rewritten("the template writes no end")
    return answer[: max(ends)]


def answer_ids(tokenizer: Any, before: list[int], prompt: str, answer: str) -> list[int]:
    """Return the ids of an answer behind its prompt.

    They are those of prompt and answer tokenized together where these begin with the prompt's own, else those of the
    answer alone: the model's first token cannot change the prompt.
    """
    together = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    if together[: len(before)] == before:
        return together[len(before) :]
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


# the conversations
USER, BOT, SYSTEM, TOOL = ("user", "assistant", "system", "tool")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a town.",
            "parameters": {
                "type": "object",
                "properties": {
                    "town": {"type": "string", "description": "the town"},
                    "days": {"type": "integer", "description": "how many"},
                },
                "required": ["town"],
            },
        },
    }
]


def turns(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn."""
    head = [] if system is None else [{"role": SYSTEM, "content": system}]
    return head + [{"role": (USER, BOT)[i % 2], "content": content} for i, content in enumerate(contents)]


def thought(messages: list[Message], form: str, *thoughts: str | None) -> list[Message]:
    """Give the assistant turns thoughts, one for each: as a field, or in the content where `form` is `content`."""
    given, made = iter(thoughts), []
    for message in messages:
        message = dict(message)
        if message["role"] == BOT and (words := next(given)) is not None:
            if form == "content":
                message["content"] = f"<think>\n{words}\n</think>\n\n{message['content']}"
            else:
                message[form] = words
        made.append(message)
    return made


def calling(arguments_as: str, count: int = 1, content: str | None = "") -> list[Message]:
    """A question, `count` parallel calls, their results and the answer.

    Args:
        arguments_as: `object` or `text`.
        content: the content of the turn that calls.
    """
    towns = ["Oslo", "Rome"][:count]
    calls = []
    for i, town in enumerate(towns):
        arguments: Any = {"town": town, "days": 2}
        arguments = json.dumps(arguments) if arguments_as == "text" else arguments
        function = {"name": "get_weather", "arguments": arguments}
        calls.append({"id": f"call{i:05d}", "type": "function", "function": function})
    results = [
        {"role": TOOL, "name": "get_weather", "tool_call_id": f"call{i:05d}", "content": f"{town}: 3 degrees"}
        for i, town in enumerate(towns)
    ]
    question = {"role": USER, "content": "How is the weather in " + " and ".join(towns) + "?"}
    return [
        question,
        {"role": BOT, "content": content, "tool_calls": calls},
        *results,
        {"role": BOT, "content": "It is 3 degrees."},
    ]


PLAIN = turns("How are you?", "I am fine.")
THREE = turns("One?", "First.", "Two?", "Second.", "Three?", "Third.")
CONVERSATIONS: dict[str, list[Message]] = {
    "plain": PLAIN,
    "system": turns("How are you?", "I am fine.", system="You are kind."),
    "three": THREE,
    "system, three": [{"role": SYSTEM, "content": "You are kind."}, *THREE],
    "unicode": turns("你好, café cafe\u0301 😀?", "Grüße 👩‍👩‍👧 ١٢٣ \u200bz.", "Ω≈ç?", "नमस्ते 🇩🇪"),
    "blanks": turns(" \n How?\n\n", "\n\n Well. \n", "\tAnd? ", "  Good.\n\n\n"),
}
THOUGHTS: dict[str, tuple[list[Message], tuple[str | None, ...]]] = {
    "thought": (PLAIN, ("I feel it.",)),
    "thoughts in all": (THREE, ("T1.", "T2.", "T3.")),
    "thoughts in some": (THREE, ("T1.", None, "T3.")),
    "thought in the first": (THREE, ("T1.", None, None)),
}
