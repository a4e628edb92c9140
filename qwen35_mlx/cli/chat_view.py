"""The conversation in the terminal: commands, and turns drawn as they come."""

import shlex
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ContextFull, Qwen35Error
from ..sampling import AUTO, CHECKPOINT, PRESETS, SamplingParams
from . import terminal
from .line_input import LineReader, Reader, open_reader, silent_keys
from .markdown import MarkdownStream

if TYPE_CHECKING:
    from ..chat.conversation import Chat, TurnStats
    from ..engine.output import Piece

NEARLY_FULL = 0.8
MAX_FILE_BYTES = 20 * 10**6
NUMBERS: dict[str, Any] = {f.name: f.type for f in fields(SamplingParams)} | {"seed": int}
OPTIONS = (*NUMBERS, "max_tokens", "preset", "on_loop")
WORDS = {
    "/think": ("on", "off", "hide", "budget"),
    "/set": (*OPTIONS, *(f"preset {name}" for name in (*PRESETS, AUTO, CHECKPOINT))),
}


class ChatSession:
    """Draws a conversation: input, thoughts, answers as Markdown, a line of figures."""

    HINT = "/help lists commands, /exit or Ctrl-D leaves; Ctrl-C stops an answer and keeps it"

    def __init__(self, chat: "Chat", markdown: bool = True):
        self.chat = chat
        # The name under which every turn is saved, held against other chats.
        self.session: str | None = None
        self._markdown = markdown
        self._hide_thoughts = False
        self._files: list[str] = []
        self._draft = ""
        self._is_edit = False
        self._reader: Reader = LineReader()
        self._lock = ExitStack()

    def run(self, prompts: Sequence[str] = (), session: str | None = None) -> None:
        """Ask the given prompts in turn, or talk until the user leaves; goes on with `session`."""
        with self._lock:
            if session:
                chat = self.chat
                system, thinking, budget = chat.system, chat.enable_thinking, chat.think_budget
                self._open(session, must_exist=False)
                # What the command line says is not undone by what was saved.
                chat.set_system(system or chat.system)
                chat.enable_thinking = chat.enable_thinking if thinking is None else thinking
                chat.think_budget = budget or chat.think_budget
            try:
                if not prompts:
                    self._talk()
                for prompt in prompts:
                    if len(prompts) > 1:
                        terminal.out.print(f"> {prompt}", style="bold", markup=False)
                    self.turn(self.chat.send, prompt)
            finally:
                if self.session:
                    self.chat.save(self.session)

    def _talk(self) -> None:
        from ..chat.sessions import session_home

        words = {name: WORDS.get(name, ()) for name in self._commands()}
        self._reader = open_reader(words, session_home() / ".history")
        terminal.note(self.HINT)
        is_editor = not isinstance(self._reader, LineReader)
        with silent_keys(raw=True) if is_editor else nullcontext():
            while (text := self._read()) is not None:
                try:
                    if text.startswith("/"):
                        self._command(text)
                    elif text.strip():
                        self._say(text.strip())
                except BrokenPipeError:
                    # Nobody reads on; the command line leaves without a word.
                    raise
                except KeyboardInterrupt:
                    terminal.out.print()
                    terminal.note("stopped")
                    self._saved()
                except EOFError:
                    return
                except (Qwen35Error, OSError) as error:
                    terminal.print_error(error)

    def _read(self) -> str | None:
        """A message or a command; None at the end."""
        terminal.out.print()
        self.chat.start_reading_ahead()
        draft, self._draft = self._draft, ""
        try:
            return self._reader.read(draft).rstrip()
        except EOFError:
            terminal.out.print()
            return None
        except KeyboardInterrupt:
            self._is_edit = False
            terminal.out.print()
            terminal.note(self.HINT)
        except UnicodeDecodeError as error:
            terminal.print_error(error)
        finally:
            try:
                self.chat.stop_reading_ahead()
            except Qwen35Error as error:
                terminal.print_error(error)
        return ""

    def _say(self, text: str) -> None:
        """Send a message, or what becomes of the last one."""
        is_edit, self._is_edit = self._is_edit, False
        message = "\n\n".join([*self._files, text])
        send = self.chat.edit if is_edit else self.chat.send
        try:
            self.turn(send, message)
        except ContextFull as error:
            terminal.print_error(error)
            if not self._make_room():
                self._draft, self._is_edit = text, is_edit
                return
            self.turn(send, message)
        self._files = []

    def _make_room(self) -> bool:
        """Ask what is to go; whether to try again."""
        question = "Drop the (o)ldest turns, (s)tart over, or (k)eep all and change the message? "
        answer = self._reader.ask(question).strip().lower()[:1]
        if answer == "o":
            self.do_trim()
        elif answer == "s":
            self._start_over()
        return answer in ("o", "s")

    def turn(self, reply: Callable[..., Generator["Piece", None, None]], *said: str) -> None:
        """Stream one answer, that of `reply(*said, progress)`."""
        kind, stream = "", None
        is_drawn = self._markdown and terminal.can_draw(terminal.out)
        has_colour = terminal.out.color_system is not None and not terminal.out.no_color
        with ExitStack() as stack:
            if isinstance(self._reader, LineReader):
                stack.enter_context(silent_keys())
            progress = stack.enter_context(terminal.token_progress())
            pieces = stack.enter_context(closing(reply(*said, progress)))
            # Whatever ends the answer, what was held back is drawn.
            ended = stack.enter_context(ExitStack())
            for piece in pieces:
                if piece.kind != kind:
                    ended.close()
                    if kind and not (kind == "thought" and self._hide_thoughts):
                        terminal.out.print("\n" if stream is None else "")
                    kind, stream = piece.kind, None
                    if kind == "thought" and self._hide_thoughts:
                        ended.enter_context(self._folded())
                    elif kind == "thought" and not has_colour:
                        terminal.out.print("(thought) ", end="")
                    elif kind == "answer" and is_drawn:
                        stream = MarkdownStream(terminal.out)
                        ended.callback(stream.finish)
                self._show(piece, stream)
        if stream is None:
            terminal.out.print()
        self._figures(self.chat.stats)
        self._saved()

    def _show(self, piece: "Piece", stream: MarkdownStream | None) -> None:
        if piece.call:
            arguments = ", ".join(f"{k}={v!r}" for k, v in piece.call.arguments.items())
            cut = "" if piece.call.complete else " (cut: not run)"
            terminal.note(f"{piece.call.name}({arguments}){cut}".translate(terminal.CONTROL))
            return
        shown = piece.text.translate(terminal.CONTROL)
        if stream:
            stream.feed(shown)
        elif not (piece.kind == "thought" and self._hide_thoughts):
            style = "dim italic" if piece.kind == "thought" else None
            terminal.out.print(shown, end="", style=style, markup=False)

    @contextmanager
    def _folded(self) -> Iterator[None]:
        """A thought as one line."""
        started = time.perf_counter()
        with terminal.err.status("thinking …", spinner="dots"):
            yield
        seconds = time.perf_counter() - started
        terminal.note(f"thought: {self.chat.stats.thought_tokens} tokens, {seconds:.1f} s")

    def _figures(self, stats: "TurnStats") -> None:
        parts = [
            f"prompt {stats.prefilled_tokens} of {stats.prompt_tokens} tokens read, "
            f"{stats.prefill_tps:,.0f} tok/s",
            f"answer {stats.generation_tokens} tokens, {stats.decode_tps:,.1f} tok/s",
            f"peak memory {_memory(stats.peak_memory_gb)}",
        ]
        length = self.chat.model.config.context_length
        if stats.finish_reason == "loop":
            parts.append("stopped: it repeated itself")
        elif stats.prompt_tokens + stats.generation_tokens >= length:
            parts.append("cut: the context is full")
        elif stats.finish_reason == "length":
            parts.append("cut at the token limit")
        terminal.note(" · ".join(parts))
        used = self.chat.num_context_tokens()
        if used >= NEARLY_FULL * length:
            terminal.note(
                f"context {100 * used // length} % full, {max(0, length - used):,} tokens left: "
                "/trim drops the oldest turns, /clear starts over"
            )

    def _commands(self) -> dict[str, Callable[[str], None]]:
        """Name to method; a method's docstring is its help."""
        found = {
            f"/{name.removeprefix('do_')}": getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }
        return found | {"/quit": self.do_exit}

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        commands = self._commands()
        if name not in commands:
            raise Qwen35Error(
                f"no command {name}",
                hint="/help lists them; with a space before it, it is a message",
            )
        commands[name](rest.strip())

    def do_help(self, rest: str) -> None:
        """list the commands"""
        for name, method in self._commands().items():
            if name != "/quit":
                words, colon, what = (method.__doc__ or "").partition(": ")
                words, what = (words, what) if colon else ("", words)
                terminal.note(f"{f'{name} {words}'.strip():28} {what}")
        terminal.note("Enter sends; Alt-Enter, Ctrl-J or \\ at the end of a line: a new line")

    def do_exit(self, rest: str) -> None:
        """leave; so does Ctrl-D"""
        raise EOFError

    def do_undo(self, rest: str) -> None:
        """take the last message and its answer back"""
        text = self.chat.undo()
        self._saved()
        terminal.note(f"taken back: {_shortened(text)}")

    def do_retry(self, rest: str) -> None:
        """answer the last message again"""
        self.turn(self.chat.regenerate)

    def do_edit(self, rest: str) -> None:
        """[TEXT]: change the last message and send it again"""
        turn = self.chat.last_message()
        if rest:
            self._is_edit = True
            self._say(rest)
        elif isinstance(self._reader, LineReader):
            raise Qwen35Error("nothing to edit with here", hint="/edit TEXT replaces the message")
        else:
            self._draft, self._is_edit = turn, True

    def do_file(self, rest: str) -> None:
        """PATH: put a text file before the next message"""
        if not rest:
            raise Qwen35Error("which file?", expected="/file PATH")
        path = Path(shlex.split(rest)[0] if rest[0] in "'\"" else rest).expanduser()
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Qwen35Error(f"{path} is too large", expected=f"{MAX_FILE_BYTES:,} bytes")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Qwen35Error(f"{path} is not text", got=error, expected="UTF-8") from None
        fence = "```"
        while fence in text:
            fence += "`"
        self._files.append(f"{path.name}:\n{fence}\n{text.rstrip()}\n{fence}")
        count = len(self.chat.tokenizer.encode(text, add_special_tokens=False))
        terminal.note(f"{path.name}, {count:,} tokens, goes with the next message")

    def do_system(self, rest: str) -> None:
        """[TEXT]: show or set the system prompt"""
        if rest:
            self.chat.set_system(rest)
        terminal.note(f"system prompt: {self.chat.system or 'none'}")

    def do_clear(self, rest: str) -> None:
        """start over, with the same system prompt"""
        self._files = []
        self._start_over()

    def _start_over(self) -> None:
        if self.session:
            self.chat.save(self.session)
            terminal.note(f"session {self.session} keeps what was said; this is not saved yet")
            self._lock.close()
            self.session = None
        self.chat.restart(self.chat.system)

    def do_trim(self, rest: str = "") -> None:
        """drop the oldest turns until half of the context is free"""
        terminal.note(f"{terminal.count(self.chat.drop_oldest(), 'turn')} dropped")
        self._saved()

    def do_think(self, rest: str) -> None:
        """on|off|hide|budget N: think and show it, do not, fold it, or close it after N tokens"""
        word, _, number = rest.partition(" ")
        if word in ("on", "off", "hide"):
            self._hide_thoughts = word == "hide"
            self.chat.enable_thinking = word != "off"
        elif word == "budget":
            self.chat.think_budget = _number(number, int) or None
        else:
            raise Qwen35Error("/think what?", got=repr(rest), expected="on, off, hide or budget N")

    def do_set(self, rest: str) -> None:
        """NAME VALUE: temperature, top_p, preset …; without a value: as before"""
        name, _, value = rest.partition(" ")
        if name not in OPTIONS:
            raise Qwen35Error("no such setting", got=repr(name), expected=", ".join(OPTIONS))
        chat, before = self.chat, (self.chat.preset, self.chat.sampling)
        if name == "preset":
            chat.preset = value or CHECKPOINT
        elif name == "on_loop":
            chat.set_on_loop(value or None)
        elif name == "max_tokens":
            chat.max_tokens = _number(value or "0", int) or None
        else:
            number = _number(value, NUMBERS[name]) if value else None
            chat.sampling = {**chat.sampling, name: number}
        try:
            terminal.note(self._settings())
        except Qwen35Error:
            chat.preset, chat.sampling = before
            raise

    def _settings(self) -> str:
        chat = self.chat
        params = ", ".join(f"{k} {v:g}" for k, v in asdict(chat.sampling_params()).items())
        thoughts = "thinks" if chat.thinks() else "does not think"
        budget = f", at most {chat.think_budget:,} tokens" if chat.think_budget else ""
        return f"{thoughts}{budget} · preset {chat.preset}: {params} · on loop: {chat.loop_action}"

    def do_stats(self, rest: str) -> None:
        """figures of the last turn, sampling, context, memory"""
        chat = self.chat
        self._figures(chat.stats)
        terminal.note(self._settings())
        used, length = chat.num_context_tokens(), chat.model.config.context_length
        terminal.note(f"context: {used:,} of {length:,} tokens, {100 * used // length} % full")
        store = chat.prefixes
        terminal.note(
            f"snapshots: {store.num_snapshots}, {store.nbytes / 1e6:,.1f} of "
            f"{store.memory_bytes / 1e6:,.0f} MB · read ahead {chat.stats.read_ahead_tokens} tokens"
            f" · thought {chat.stats.thought_tokens} tokens · session {self.session or 'not saved'}"
        )

    def do_save(self, rest: str) -> None:
        """[NAME]: save the conversation, and every turn from now on"""
        name = rest or self.session
        if not name:
            raise Qwen35Error("save as what?", expected="/save NAME")
        if name != self.session:
            self._hold(name)
        file = self.chat.save(name)
        terminal.note(f"saved: {file}")

    def do_load(self, rest: str) -> None:
        """NAME: save this session and go on with another"""
        if not rest:
            from ..chat.sessions import list_sessions

            names = ", ".join(info.name for info in list_sessions()) or "none"
            raise Qwen35Error("load what?", expected=f"/load NAME, of: {names}")
        if self.session:
            self.chat.save(self.session)
        self._open(rest, must_exist=True)

    def _open(self, name: str, must_exist: bool) -> None:
        from ..chat.sessions import read_conversation, session_file

        exists = session_file(name).exists()
        if must_exist or exists:
            # Before anything of this conversation is let go.
            read_conversation(session_file(name))
        if name != self.session:
            self._hold(name)
        if exists:
            if warning := self.chat.load(name):
                terminal.note(f"warning: {warning}")
            said = [m["content"] for m in self.chat.messages if m["role"] == "user"]
            turns = terminal.count(len(said), "turn")
            last = _shortened(said[-1]) if said else "nothing"
            terminal.note(f"session {name}: {turns}, goes on after: {last}")

    def _hold(self, name: str) -> None:
        """Let no other chat write this session."""
        from ..chat.sessions import hold

        lock = ExitStack()
        lock.enter_context(hold(name))
        self._lock.close()
        self._lock.push(lock)
        self.session = name

    def _saved(self) -> None:
        if self.session:
            self.chat.save(self.session, with_cache=False)


def _number(text: str, kind: Callable[[str], Any]) -> Any:
    with suppress(ValueError):
        if (number := kind(text.replace(",", ""))) >= 0 or kind is float:
            return number
    raise Qwen35Error("not a number", got=repr(text), expected="0 or more" if kind is int else None)


def _shortened(text: str) -> str:
    line = " ".join(text.split()).translate(terminal.CONTROL)
    return line if len(line) <= 60 else line[:59] + "…"


def _memory(gigabytes: float) -> str:
    return f"{gigabytes:,.2f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:,.0f} MB"
