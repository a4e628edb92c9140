"""The conversation in the terminal: reads messages, prints the turns, saves the session."""

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ContextFull, Qwen35Error
from ..text.media_parts import text_of
from . import terminal
from .attachments import Attachments
from .line_input import LineReader, Reader, open_reader, silent_keys
from .markdown import MarkdownStream
from .progress import spinner, token_progress
from .slash_commands import COMMANDS, is_dropped, run_command, shortened

if TYPE_CHECKING:
    from ..chat.conversation import Chat
    from ..engine.output import Piece

NEARLY_FULL = 0.8
HINT = "/help lists commands, /exit or Ctrl-D leaves; Ctrl-C stops an answer and keeps it"


class ChatView:
    """A chat on the terminal, with a line of statistics after each turn.

    An error of a turn or a command is printed, and the chat continues. If the view itself fails, an
    unsaved conversation is written to a temporary file.
    """

    def __init__(
        self,
        chat: "Chat",
        markdown: bool = True,
        allow_url: bool = False,
        autosave: bool = False,
        cache_limit_bytes: float = float("inf"),
        default_preset: str = "auto",
    ):
        self.chat = chat
        self.is_open = True
        self.reader: Reader = LineReader()
        self.attached = Attachments(chat, allow_url)
        # Asks the user; None if there is no user.
        self.ask: Callable[[str], str] | None = None
        # A message that was refused because it names a missing file; if repeated, it is sent as is.
        self._refused = ""
        # Initial text of the next line, and whether that line replaces the last message.
        self.draft, self.is_edit = "", False
        self.hide_thoughts = False
        self.default_preset = default_preset
        # The name under which every turn is saved, locked against other chats.
        self.session: str | None = None
        self._markdown, self._autosave = markdown, autosave
        self._cache_limit_bytes = cache_limit_bytes
        self._lock = ExitStack()

    def run(self, prompts: Sequence[str] = (), session: str | None = None) -> None:
        """Send the prompts, or chat until the user leaves; continues `session`."""
        with self._lock:
            if session:
                self._continue(session)
            try:
                if prompts:
                    self._ask(prompts)
                else:
                    self._talk()
            except BaseException:
                self._save_at_end(rescue=not prompts)
                raise
            if error := self._save_at_end():
                raise error

    def _ask(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if len(prompts) > 1:
                terminal.out.print(f"> {prompt}", style="bold", markup=False)
            self._send(self.chat.send, prompt)

    def _talk(self) -> None:
        from ..files import session_home

        words = {name: command.words for name, command in COMMANDS.items()}
        history = None
        # Without a home folder, lines are kept for this chat only.
        with suppress(Qwen35Error):
            history = session_home() / ".history"
        self.reader = open_reader(words, history)
        terminal.note(HINT)
        self.ask = self._ask_user
        is_editor = not isinstance(self.reader, LineReader)
        num_failures = 0
        with silent_keys(raw=True) if is_editor else nullcontext():
            while self.is_open:
                # Two try blocks, because an exception handler may be interrupted too.
                try:
                    text = self._read()
                    num_failures = 0
                except KeyboardInterrupt:
                    continue
                except Exception as error:
                    num_failures += 1
                    # The input is broken.
                    if num_failures > 1:
                        raise
                    terminal.print_error(error)
                    continue
                try:
                    self._handle(text)
                except KeyboardInterrupt:
                    continue

    def _read(self) -> str:
        """Read a message or a command; at the end of input, close the chat and return ''."""
        terminal.out.print()
        self._guard(self.chat.start_reading_ahead)
        draft, self.draft = self.draft, ""
        try:
            return self.reader.read(draft).rstrip()
        except EOFError:
            terminal.out.print()
            self.is_open = False
        except KeyboardInterrupt:
            self.is_edit = False
            terminal.out.print()
            terminal.note(HINT)
        except UnicodeDecodeError as error:
            terminal.print_error(error)
        finally:
            self._guard(self.chat.stop_reading_ahead)
        return ""

    def _handle(self, text: str) -> None:
        """Run a command or send a message; no error ends the chat."""
        try:
            if text.startswith("/") and not is_dropped(text):
                run_command(self, text)
            elif text.strip():
                self.say(text.strip())
        except BrokenPipeError:
            # The reader of stdout is gone.
            raise
        except KeyboardInterrupt:
            terminal.note("stopped")
            self._guard(self.save_turn)
        except Exception as error:
            terminal.print_error(error)

    def _guard(self, action: Callable[[], object]) -> None:
        """Run an optional action; print its error."""
        try:
            action()
        except Exception as error:
            terminal.print_error(error)

    def say(self, text: str) -> None:
        """Attach the files that a message names, and send it, or replace the last message."""
        try:
            message = text if text == self._refused else self.attached.add_named(text, self.ask)
        except Qwen35Error:
            self.draft = self._refused = text
            raise
        self._refused = ""
        # Only files: wait for the question.
        if not message:
            return
        is_edit, self.is_edit = self.is_edit, False
        send = self.chat.edit if is_edit else self.chat.send
        try:
            self._send(send, message)
        except ContextFull as error:
            terminal.print_error(error)
            if not self._make_room():
                self.draft, self.is_edit = message, is_edit
                return
            self._send(send, message)

    def _send(self, send: Callable[..., Generator["Piece", None, None]], text: str) -> None:
        """One turn, with all attachments."""
        options = self.attached.options()
        message = "\n\n".join([*self.attached.texts, text])
        self.turn(partial(send, **options) if options else send, message)
        self.attached.clear()

    def _make_room(self) -> bool:
        """Ask what to drop; returns whether to try again."""
        question = "Drop the (o)ldest turns, (s)tart over, or (k)eep all and change the message? "
        answer = self._ask_user(question)
        if answer == "o":
            run_command(self, "/trim")
        elif answer == "s":
            self.start_over()
        return answer in ("o", "s")

    def _ask_user(self, question: str) -> str:
        """The first letter of the answer; empty after Ctrl-C or at the end of input."""
        try:
            return self.reader.ask(question).strip().lower()[:1]
        except (EOFError, KeyboardInterrupt):
            return ""

    def turn(self, reply: Callable[..., Generator["Piece", None, None]], *message: str) -> None:
        """Stream one answer, that of `reply(*message, progress)`."""
        with ExitStack() as stack:
            stack.enter_context(terminal.held_warnings())
            if isinstance(self.reader, LineReader):
                stack.enter_context(silent_keys())
            progress = stack.enter_context(token_progress())
            pieces = stack.enter_context(closing(reply(*message, progress)))
            is_first = True
            for kind, group in groupby(pieces, key=lambda piece: piece.kind):
                if kind == "thought" and self.hide_thoughts:
                    self._fold(group)
                    continue
                if kind != "tool_call" and not is_first:
                    terminal.out.print()
                is_first = False
                if kind == "tool_call":
                    self._show_calls(group)
                else:
                    self._show_text(kind, group)
        self.show_figures()
        self.save_turn()

    def _show_text(self, kind: str, pieces: Iterator["Piece"]) -> None:
        """Print a thought, or an answer as Markdown; always ends the last line."""
        out = terminal.out
        style = "dim italic" if kind == "thought" else None
        if kind == "answer" and self._markdown and terminal.can_draw(out):
            stream = MarkdownStream(out)
            write, end = stream.feed, stream.finish
        else:
            if kind == "thought" and (out.color_system is None or out.no_color):
                out.print("(thought) ", end="")

            def write(text: str) -> None:
                out.print(text, end="", style=style, markup=False)

            end = out.print
        try:
            for piece in pieces:
                write(piece.text.translate(terminal.CONTROL))
        finally:
            end()

    def _fold(self, pieces: Iterator["Piece"]) -> None:
        """Print a thought as one line."""
        started = time.perf_counter()
        with spinner("thinking …"):
            for _ in pieces:
                pass
        seconds = time.perf_counter() - started
        terminal.note(f"thought: {self.chat.stats.thought_tokens} tokens, {seconds:.1f} s")

    def _show_calls(self, pieces: Iterator["Piece"]) -> None:
        for piece in pieces:
            assert piece.call
            arguments = ", ".join(f"{k}={v!r}" for k, v in piece.call.arguments.items())
            cut = "" if piece.call.complete else " (cut: not run)"
            terminal.note(f"{piece.call.name}({arguments}){cut}".translate(terminal.CONTROL))

    def show_figures(self) -> None:
        """Print statistics of the last turn, and a warning if the context is almost full."""
        stats, length = self.chat.stats, self.chat.model.config.context_length
        gigabytes = stats.peak_memory_gb
        memory = f"{gigabytes:,.2f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:,.0f} MB"
        parts = [
            f"prompt {stats.prefilled_tokens} of {stats.prompt_tokens} tokens read, "
            f"{stats.prefill_tps:,.0f} tok/s",
            f"answer {stats.generation_tokens} tokens, {stats.decode_tps:,.1f} tok/s",
            f"peak memory {memory}",
        ]
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

    def start_over(self) -> None:
        """Start a new, unsaved conversation; a session keeps the old one."""
        if self.session:
            self.chat.save(self.session)
            terminal.note(
                f"session {self.session} keeps the conversation; the new one is not saved yet"
            )
            self._lock.close()
            self.session = None
        self.chat.restart(self.chat.system)

    def save_as(self, name: str) -> Path:
        """Save under a name, and every turn from now on."""
        if name != self.session:
            self._hold(name)
        return self.chat.save(name)

    def save_turn(self) -> None:
        """Save the messages of a session; its cache is written in the background."""
        from ..chat.sessions import session_file, trim_caches

        if self._autosave and not self.session:
            name = time.strftime("%Y-%m-%d-%H%M%S")
            while session_file(name).exists():
                name += "-b"
            self._hold(name)
            terminal.note(f"saved as session {name}")
        if self.session:
            self.chat.save(self.session, with_cache=False)
            trim_caches(self._cache_limit_bytes)

    def load(self, name: str, must_exist: bool = True) -> None:
        """Save this session, and continue another."""
        from ..chat.sessions import read_conversation, session_file

        has_turns = any(message["role"] != "system" for message in self.chat.messages)
        if has_turns and not self.session:
            hint = "/save NAME keeps it, /clear drops it"
            raise Qwen35Error("this conversation is not saved", hint=hint)
        exists = session_file(name).exists()
        if must_exist or exists:
            # Raises before this conversation is given up.
            read_conversation(session_file(name))
        if self.session:
            self.chat.save(self.session)
        if name != self.session:
            self._hold(name)
        if exists:
            if warning := self.chat.load(name):
                terminal.note(f"warning: {warning}")
            messages = [text_of(m["content"]) for m in self.chat.messages if m["role"] == "user"]
            last = shortened(messages[-1]) if messages else "nothing"
            turns = terminal.count(len(messages), "turn")
            terminal.note(f"session {name}: {turns}, goes on after: {last}")

    def _continue(self, session: str) -> None:
        """Continue a session; options of the command line override its settings."""
        chat = self.chat
        system, thinking, budget = chat.system, chat.enable_thinking, chat.think_budget
        self.load(session, must_exist=False)
        chat.set_system(system or chat.system)
        chat.enable_thinking = chat.enable_thinking if thinking is None else thinking
        chat.think_budget = budget or chat.think_budget

    def _hold(self, name: str) -> None:
        """Lock a session against other chats."""
        from ..chat.sessions import hold

        lock = ExitStack()
        lock.enter_context(hold(name))
        self._lock.close()
        self._lock.push(lock)
        self.session = name

    def _save_at_end(self, rescue: bool = False) -> Exception | None:
        """Save the session with its cache; returns the error if that fails.

        A conversation that cannot be saved, or with `rescue` one without a session, goes to a
        temporary file.
        """
        failure = None
        if self.session:
            try:
                self.chat.save(self.session)
                return None
            except Exception as error:
                failure = error
        elif not rescue or not self.chat.messages:
            return None
        try:
            folder = Path(tempfile.mkdtemp(prefix="qwen35-mlx-"))
            file = self.chat.save(folder / "conversation", with_cache=False)
            terminal.note(f"the conversation is in {file}; /load {file} continues it")
        except Exception as error:
            failure = failure or error
        return failure
