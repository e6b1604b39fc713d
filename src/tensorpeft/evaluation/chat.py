"""``tensorpeft chat``: a person asks, base and adapter answer side by side in a terminal."""

import signal
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tensorpeft.evaluation.conversation import Conversation, Stop
from tensorpeft.loading.adapters import find_base, load_model
from tensorpeft.loading.quiet import quiet

_HELP = "/new forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer, /help says this."
_PROMPT = "you: "


def run_chat(
    adapter: str | Path,  # folder or Hub name of a saved adapter
    base: str | None = None,  # None: the model that the adapter names
    max_new_tokens: int | None = None,  # of an answer, at most; None: 256, or half of what a short model reads
    system: str | None = None,  # first message of every conversation
    dtype: str | None = None,  # of the base's weights; None: as they were saved
    temperature: float | None = None,  # None: the likeliest token always, so that what differs is the adapter's doing
    seed: int = 0,  # of what is drawn at a temperature
    terminal: TextIO | None = None,  # None: standard output
    source: TextIO | None = None,  # of questions, one a line; None: standard input
) -> None:
    """Two answers to every line of the source, until it ends or says /quit.

    On a terminal they grow next to each other. Elsewhere each is printed when it is complete, behind "base: " or
    "adapter: ", further lines of it indented.

    Raises:
        ValueError: no adapter, one that does not write text, or a setting that does not suit the model.
    """
    found, saved = find_base(str(adapter), None) if base is None else find_base(base, adapter)
    if saved is None:
        raise ValueError(f"{adapter}: expected a saved adapter, a folder with adapter_config.json.")
    model: Any
    model, tokenizer = load_model(found, saved, task=None, dtype=dtype)
    with quiet():
        conversation = Conversation(model, tokenizer, system, max_new_tokens, temperature, seed)
    screen = _Screen(Path(saved).resolve().name, terminal or sys.stdout, source or sys.stdin)
    if screen.is_live:
        screen.say(f"{found} with and without {saved}. {_HELP}")
    if not conversation.has_template:
        screen.say("The model has no chat template: it goes on with the text.")
    if not conversation.together:
        screen.say("In one batch this adapter cannot be told from its base: they answer one after the other.")
    try:
        _talk(conversation, screen)
    except KeyboardInterrupt:  # a second one within an answer
        return


def _talk(conversation: Conversation, screen: "_Screen") -> None:
    told_shortened = False
    for line in screen.questions():
        if line == "/quit":
            return
        if line == "/help":
            screen.say(_HELP)
        elif line == "/new":
            conversation.forget()
            screen.say("A new conversation.")
        elif line.startswith("/") and line[1:].isalpha():
            screen.say(f"There is no {line}. {_HELP}")
        elif screen.answer(conversation, line) and not told_shortened:
            screen.say("The conversation is longer than the model reads: from now on its oldest turns are left out.")
            told_shortened = True


class _Screen:
    """Where questions come from and answers go.

    What a model writes is data: no markup or control character of it reaches the terminal.
    """

    def __init__(self, name: str, terminal: TextIO, source: TextIO) -> None:
        self._titles = ("base", name)
        self._terminal, self._source = terminal, source
        self._console = Console(file=terminal)
        self.is_live = terminal.isatty() and source.isatty()

    def say(self, notice: str) -> None:
        """Print a remark of the program itself."""
        self._print(f"({notice})")

    def questions(self) -> Iterator[str]:
        """Lines that are not blank, until the source ends or Ctrl-C is pressed at the prompt."""
        while True:
            try:
                line = self._read()
            except (EOFError, KeyboardInterrupt):
                line = ""
            if not line:
                if self.is_live:
                    self._print("")  # the shell's prompt begins a line
                return
            if line.strip():
                yield line.strip()

    def answer(self, conversation: Conversation, question: str) -> bool:
        """Print the two answers; whether the conversation was shortened for them."""
        texts, shortened = ["", ""], False
        try:
            with quiet(), _stopped_by_interrupt() as stop, self._growing(texts):
                shortened = conversation.ask(question, texts.__setitem__, stop)
        except ValueError as error:
            self.say(str(error))
            return False
        if self.is_live:
            self._console.print(self._columns(texts))
        else:
            for label, text in zip(("base", "adapter"), texts, strict=True):
                self._print(f"{label}: " + text.strip().replace("\n", "\n  "))
            self._terminal.flush()
        if stop.requested:
            self.say("stopped")
        return shortened

    def _read(self) -> str:
        """A line with its end; empty at the end of the source."""
        if self.is_live and self._source is sys.stdin and self._terminal is sys.stdout:
            return input(_PROMPT) + "\n"  # the line can be edited
        if self.is_live:
            self._terminal.write(_PROMPT)
            self._terminal.flush()
        return self._source.readline()

    @contextmanager
    def _growing(self, texts: list[str]) -> Iterator[None]:
        """Show the texts while they are written to, where there is a terminal; then take them away."""
        if not self.is_live:
            yield
            return

        def render() -> Table:
            return self._columns(texts, height=max(self._console.height - 4, 1))

        with Live(console=self._console, get_renderable=render, refresh_per_second=8, transient=True):
            yield

    def _columns(self, texts: list[str], height: int | None = None) -> Table:
        """The texts next to each other, each wrapped; of a limited height their ends."""
        width = max((self._console.width - 5) // 2, 1)  # less a space at each side of both, and one between
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
        cells = []
        for title, text in zip(self._titles, texts, strict=True):
            table.add_column(Text(self._clean(title)), width=width, overflow="fold")
            lines = Text(self._clean(text.strip())).wrap(self._console, width, overflow="fold")
            cells.append(Text("\n").join(lines if height is None else lines[-height:]))
        table.add_row(*cells)
        return table

    def _print(self, text: str) -> None:
        self._console.print(Text(self._clean(text)), soft_wrap=not self.is_live)

    def _clean(self, text: str) -> str:
        """The text with signs for its control characters, and without what the terminal's encoding lacks."""
        visible = "".join(map(_visible, text.replace("\r\n", "\n")))
        return visible.encode(self._console.encoding, "replace").decode(self._console.encoding)


def _visible(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's picture of it: ␛
    # Others of them, and what turns the direction of a line around.
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return "\ufffd" if turns or unicodedata.category(character) == "Cc" else character


@contextmanager
def _stopped_by_interrupt() -> Iterator[Stop]:
    """What Ctrl-C requests: generation ends between two tokens, and PEFT takes its hooks away. A second one raises."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread only
        return

    def request(*_: Any) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
