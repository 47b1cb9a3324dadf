"""Print what the template of each family does: `python -m tests.include.chat.families_table [FAMILY ...]`."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, meta
from jinja2.ext import loopcontrols

from tests.include.chat import families as f
from tests.services.published import published

MATERIAL = Path(__file__).resolve().parents[4] / "shared" / "material"
GIVEN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "strftime_now", "range"}
GIVEN |= {"raise_exception", "namespace", "documents", "dict", "unk_token"}
SWITCHES = {"enable_thinking": (True, False), "thinking": (True, False), "reasoning_effort": ("low", "high")}
SWITCHES_SET = {"enable_thinking", "reasoning_effort", "preserve_thinking"}  # a template may set its own default
FORMS = ("reasoning_content", "thinking", "reasoning", "content")
THINK = re.compile(r"<think>\n?(.*?)</think>", re.DOTALL)


def same(one: Any, two: Any) -> int:
    """Return how much two texts or lists share at their beginning."""
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def part(one: str, two: str, size: int = 48) -> str:
    """Show two texts around the point where they part."""
    at = same(one, two)
    return f"{one[max(0, at - size) : at]!r} | {one[at : at + size]!r} <> {two[at : at + size]!r}"


def look(name: str, family: f.Family, tokenizer: Any) -> list[str]:
    """Return the lines of one family."""
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    lines = [
        f"bos={tokenizer.bos_token} eos={tokenizer.eos_token} pad={tokenizer.pad_token} {type(tokenizer).__name__}"
    ]
    source = tokenizer.chat_template
    names = meta.find_undeclared_variables(
        Environment(extensions=[loopcontrols]).parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source))
    )
    names -= set(re.findall(r"{%-?\s*set\s+(\w+)", source)) - {
        "enable_thinking",
        "reasoning_effort",
        "preserve_thinking",
    }
    read = ", ".join(sorted(names - GIVEN)) or "none"
    lines.append(f"kwargs read: {read}; generation tags: {'endgeneration' in source}")

    def text(messages: list, tools: Any = None, prompt: bool = False, **more: Any) -> str:
        return f.text(tokenizer, messages, tools, prompt, **more)

    prompt = text(f.PLAIN[:1], prompt=True)
    lines.append(f"prompt tail: {prompt[-40:]!r}")
    for switch, values in SWITCHES.items():
        if switch in names:
            shown = []
            for value in values:
                try:
                    shown.append(f"{value}: {text(f.PLAIN[:1], prompt=True, **{switch: value})[-40:]!r}")
                except Exception as error:
                    shown.append(f"{value}: REFUSED {str(error)[:80]}")
            lines.append(f"  {switch}=" + "; ".join(shown))
    whole, three = text(f.PLAIN), text(f.THREE)
    lines.append(f"after the last answer: {show(whole.split('I am fine.')[-1], special)}")
    lines.append(
        f"after an earlier one, to the next content: {show(three.split('First.')[1].split('Two?')[0], special)}"
    )
    if tokenizer.bos_token:
        count = [t.count(tokenizer.bos_token) for t in (text(f.PLAIN), text(f.THREE))]
        ids = f.asked(tokenizer, f.PLAIN[:1])
        lines.append(f"BOS in text, 1 and 3 exchanges: {count}; ids of the prompt: {ids.count(tokenizer.bos_token_id)}")
    for role, messages, at in (
        ("user", f.turns(' \n "a<&\n\n', "x"), 0),
        ("assistant", f.turns("x", ' \n "a<&\n\n'), 1),
        ("system", f.turns("x", "y", system=' \n "a<&\n\n'), 0),
    ):
        try:
            content, found = messages[at]["content"], text(messages)
            done = "unchanged" if content in found else "trimmed" if content.strip() in found else "other"
            if done == "trimmed":
                around = re.search(rf"\s*{re.escape(content.strip())}\s*", found)[0]  # type: ignore[index]
                done += f" {around!r}"
            lines.append(f"content of {role}: {done}")
        except Exception as error:
            lines.append(f"content of {role}: REFUSED {str(error)[:120]}")
    seen: list[tuple[str, str, str]] = []
    for case, messages in f.CONVERSATIONS.items():
        seen += compare(case, tokenizer, messages, None)
    form_shown = None
    for form in FORMS:
        messages = f.thought(f.PLAIN, form, "I feel it.")
        try:
            found = text(messages)
        except Exception as error:
            lines.append(f"thought as {form}: REFUSED {str(error)[:100]}")
            continue
        state = "shown" if "I feel it." in found else "dropped"
        form_shown = form_shown or (form if state == "shown" else None)
        tail = found[max(0, same(found, whole) - 20) :]
        lines.append(f"thought as {form}: {state} {tail!r}" if state == "shown" else f"thought as {form}: dropped")
    for case, (messages, thoughts) in f.THOUGHTS.items():
        if form_shown:
            seen += compare(f"{case} ({form_shown})", tokenizer, f.thought(messages, form_shown, *thoughts), None)
    for count in (1, 2):
        rendered = {}
        for arguments in ("object", "text"):
            for content in ("", None, "Let me look."):
                messages = f.calling(arguments, count, content)
                try:
                    rendered[arguments, content] = text(messages, f.TOOLS)
                except Exception as error:
                    rendered[arguments, content] = f"REFUSED {type(error).__name__} {str(error)[:90]}"
        states = {}
        for key, found in rendered.items():
            shown = (
                found
                if found.startswith("REFUSED")
                else (
                    "calls shown"
                    if all(t in found.split("get_weather")[-1] + found for t in ("Oslo",))
                    and found.count("get_weather") > text(f.PLAIN, f.TOOLS).count("get_weather")
                    else "calls dropped"
                )
            )
            states.setdefault((shown, found if shown == "calls shown" and key[1] != "Let me look." else ""), []).append(
                f"{key[0]}/{key[1]!r}"
            )
        for (shown, _), keys in states.items():
            lines.append(f"{count} call(s), arguments/content {', '.join(keys)}: {shown}")
        bare = text(f.PLAIN, f.TOOLS).count("get_weather") if not refused(text, f.PLAIN, f.TOOLS) else 0
        good = next(
            (k for k, v in rendered.items() if not v.startswith("REFUSED") and v.count("get_weather") > bare), None
        )
        if good:
            messages = f.calling(good[0], count, good[1])
            begin = same(rendered[good], text(messages[:1], f.TOOLS))
            lines.append(f"  written: {rendered[good][begin:][:420]!r}")
            seen += compare(f"{count} call(s) {good[0]}/{good[1]!r}", tokenizer, messages, f.TOOLS)
    groups: dict[str, list[tuple[str, str]]] = {}
    for case, kind, excerpt in seen:
        groups.setdefault(kind, []).append((case, excerpt))
    for kind, found in groups.items():
        cases = "; ".join(dict.fromkeys(case for case, _ in found))
        lines.append(f"{kind}: {cases}")
        differ = {re.sub(r"^.*? \| ", "", excerpt)[:14]: excerpt for _, excerpt in reversed(found) if excerpt}
        lines += [f"  e.g. {excerpt}" for excerpt in list(differ.values())[::-1][:3]]
    lines.append(training(family, tokenizer))
    return lines


def refused(render: Any, *arguments: Any) -> bool:
    """Return whether a template refuses a conversation."""
    try:
        render(*arguments)
    except Exception:
        return True
    return False


def show(found: str, special: set[str]) -> str:
    """Show a text with its special tokens marked by a star."""
    pieces = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", found)
    return " ".join(("*" if piece in special else "") + repr(piece) for piece in pieces if piece) or "nothing"


def compare(case: str, tokenizer: Any, messages: list, tools: Any) -> list[tuple[str, str, str]]:
    """Say whether prompts are prefixes of the answered conversation, and that one of the next prompt."""
    lines, answers = [], [k for k, message in enumerate(messages) if message["role"] == f.BOT]
    try:
        for n, k in enumerate(answers):
            prompt = f.text(tokenizer, messages[:k], tools, True)
            whole = f.text(tokenizer, messages[: k + 1], tools)
            if not whole.startswith(prompt):
                lines.append((case, "PROMPT IS NO PREFIX of the answered conversation", part(prompt, whole)))
            else:
                ids, full = f.asked(tokenizer, messages[:k], tools), f.asked_whole(tokenizer, messages[: k + 1], tools)
                if full[: len(ids)] != ids:
                    at = same(ids, full)
                    pair = [tokenizer.convert_ids_to_tokens(x[max(0, at - 1) : at + 2]) for x in (ids, full)]
                    lines.append((case, "IDS differ though the prompt's text is a prefix", f"{pair[0]} <> {pair[1]}"))
            if n + 1 < len(answers):
                after = f.text(tokenizer, messages[: answers[n + 1]], tools, True)
                if not after.startswith(whole):
                    lines.append((case, "ONE SEQUENCE CANNOT HOLD the answer and the next prompt", part(whole, after)))
    except Exception as error:
        lines.append((case, "REFUSED", f"{type(error).__name__}: {str(error)[:140]}"))
    return lines or [(case, "ok", "")]


def training(family: f.Family, tokenizer: Any) -> str:
    """Say whether TRL's training variant of the template renders the same."""
    file = f.TRL / f"{family.template}_training.jinja"
    if family.template.startswith("llama3_") or not family.template or not file.exists():
        return "TRL training variant: none"
    plain, differ = tokenizer.chat_template, []
    cases = {case: (messages, None) for case, messages in f.CONVERSATIONS.items()}
    for form in FORMS:
        cases |= {f"{case} {form}": (f.thought(m, form, *t), None) for case, (m, t) in f.THOUGHTS.items()}
    cases |= {
        f"{n} calls {a}": (f.calling(a, n, c), f.TOOLS) for n in (1, 2) for a in ("object", "text") for c in ("", None)
    }
    masks = "masks ok"
    for case, (messages, tools) in cases.items():
        pair = []
        for source in (plain, file.read_text("utf-8")):
            try:
                pair.append(f.text(tokenizer, messages, tools, chat_template=source))
            except Exception as error:
                pair.append(f"REFUSED {str(error)[:50]}")
        if pair[0] != pair[1]:
            differ.append(case)
            if len(differ) == 1:
                differ[0] += f" ({part(*pair)})"
    try:
        made = tokenizer.apply_chat_template(
            f.THREE,
            chat_template=file.read_text("utf-8"),
            return_dict=True,
            return_assistant_tokens_mask=True,
            strftime_now=f.TODAY.strftime,
        )
        trained = [i for i, m in zip(made["input_ids"], made["assistant_masks"], strict=True) if m]
        masks = f"its mask trains {tokenizer.decode(trained)!r}"
    except Exception as error:
        masks = f"its mask fails: {str(error)[:80]}"
    return f"TRL training variant: {'differs: ' + '; '.join(differ) if differ else 'renders all the same'}; {masks}"


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as work:
        for name in names or f.FAMILIES:
            family = f.FAMILIES[name]
            print(f"\n## {name}", flush=True)
            try:
                folder = f.make_folder(family, Path(work, name), MATERIAL, lambda n: published(MATERIAL, n))
                tokenizer = f.load(folder)
                print("\n".join(look(name, family, tokenizer)), flush=True)
            except Exception as error:
                print(f"FAILS {type(error).__name__}: {error}", flush=True)
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
