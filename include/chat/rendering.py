"""Render chat templates with transformers: those that ship with Retune in this process, all others in a process of
their own with limits.

Jinja's sandbox keeps a template from the files and the network, but not from endless loops and huge strings, and
Python cannot stop either of them from within.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from include.errors import BadRecipe, TooCostly
from include.paths import PROJECT

RENDERING_DATE = date(2024, 7, 26)  # for templates that write the date: ids must not depend on the day of the run
CPU_SECONDS = 5.0  # for one rendering; templates of the Hub need milliseconds
MEMORY_BYTES = 2**29  # beside Python, jinja and transformers
LARGEST_TEXT = 2**20  # characters that a template writes itself
LARGEST_GROWTH = 20  # how many times it may write the conversation
LONGEST_PROBLEM = 300
REFUSALS = (TypeError, ValueError, KeyError, IndexError, AttributeError)  # of a template, beside its own exceptions
COSTLY = (MemoryError, RecursionError, OverflowError)  # OverflowError: `range` of more than the sandbox allows


class Refused(ValueError):
    """The template does not accept the conversation."""


def render(name: str, source: str, arguments: Mapping[str, Any]) -> str:
    """Return a conversation as text, rendered in this process.

    Args:
        name: the template's name in messages.
        source: the jinja source.
        arguments: `conversations`, `tools`, `add_generation_prompt`, and the variables of the template.

    Raises:
        Refused: the template does not accept the conversation.
        BadRecipe: it is no jinja.
    """
    return _text(name, _reply(source, arguments))


def render_limited(name: str, source: str, arguments: Mapping[str, Any]) -> str:
    """Return a conversation as text, rendered in another process; see `render`.

    Raises:
        Refused, BadRecipe: see `render`.
        TooCostly: the template needs too much time or memory, or writes too much.
    """
    return _text(name, _process().ask({"source": source, "arguments": arguments}))


def _text(name: str, reply: dict[str, Any]) -> str:
    if "line" in reply:
        raise BadRecipe(
            f"field 'chat_template': {name} is not a jinja template: line {reply['line']}: {reply['problem']}",
            "Correct that line",
        )
    if reply.get("costly"):
        raise TooCostly(
            f"field 'chat_template': {name} cannot be used: {reply['problem']}",
            "Look for loops and texts in the template that grow without a limit",
        )
    if "problem" in reply:
        raise Refused(reply["problem"])
    return str(reply["text"])


def _reply(source: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `text`; or `problem`, with `line` or `costly` where they apply."""
    from jinja2 import TemplateError, TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered = render_jinja_template(chat_template=source, **{"strftime_now": RENDERING_DATE.strftime, **arguments})
        return {"text": rendered[0][0]}
    except TemplateSyntaxError as error:
        return {"line": error.lineno, "problem": _problem(error)}
    except COSTLY as error:
        return {"costly": True, "problem": _problem(error)}
    except (TemplateError, ArithmeticError, *REFUSALS) as error:
        return {"problem": _problem(error)}


def _problem(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return str(error)[:LONGEST_PROBLEM] or type(error).__name__


class _Process:
    """The process that renders; it ends with this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "include.chat.rendering"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT, text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the processes that ask
        )  # fmt: skip

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(question, default=str) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer.endswith("\n"):
            return json.loads(answer)
        code = process.wait()
        if code == -signal.SIGPROF:
            return {"costly": True, "problem": f"one conversation takes more than {CPU_SECONDS:g} seconds"}
        return {"costly": True, "problem": f"the process that renders it ended ({code})"}

    def end(self) -> None:
        """End the process, if it is this one's: it ends when nobody can ask it any more."""
        if self.owner == os.getpid():
            self._process.communicate()


_running: list[_Process] = []


def _process() -> _Process:
    """Return the rendering process of this process; a fork needs one of its own."""
    if not (_running and _running[0].usable):
        for process in _running:
            process.end()
        _running[:] = [_Process()]
    return _running[0]


@atexit.register
def _end() -> None:
    for process in _running:
        process.end()


def _serve() -> None:
    """Answer the questions on standard input, one JSON document a line."""
    import resource

    import transformers.utils.chat_template_utils  # noqa: F401  (before the limit)

    answers, sys.stdout = sys.stdout, sys.stderr
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process, also within C code
        try:
            question = json.loads(line)
            reply = _reply(question["source"], question["arguments"])
            if len(reply.get("text", "")) > LARGEST_TEXT + LARGEST_GROWTH * len(line):
                reply = {"costly": True, "problem": f"it writes {len(reply['text']):,} characters"}
            answer = json.dumps(reply)
        except MemoryError as error:
            answer = json.dumps({"costly": True, "problem": _problem(error)})
        answers.write(answer + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _serve()
