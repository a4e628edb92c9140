"""The command generate: one answer on standard output, for scripts."""

import json
import shlex
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Qwen35Error
from . import options
from .chat_commands import read_prompts

if TYPE_CHECKING:
    from rich.status import Status

    from ..chat.conversation import Chat
    from ..engine.output import Piece


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p")] = None,
    raw: bool = False,
    file: Annotated[list[str] | None, typer.Option(metavar="PATH")] = None,
    image: options.Images = None,
    video: Annotated[list[str] | None, typer.Option(metavar="FILE")] = None,
    pdf: Annotated[list[str] | None, typer.Option(metavar="FILE")] = None,
    pages: str | None = None,
    allow_url: options.AllowUrl = False,
    system: options.System = None,
    tools: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    schema: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    think: options.Thinking = None,
    show_thoughts: bool = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    stop: list[str] | None = None,
    cache_dir: options.CacheDir = None,
    cache_limit: options.CacheLimit = 50.0,
    *,
    generation: options.Generation,
) -> None:
    """Print one answer to a prompt, for scripts.

    Standard output gets the answer alone; calls of tools follow it, one line of JSON each.
    Sampling options default to the model's generation_config.json.

    Args:
        prompt: The prompt. Default: all of standard input.
        raw: Continue the prompt as it is, without the chat template.
        file: A text file, a PDF with text, a folder, or a pattern in quotes such as 'src/**/*.py',
            whose text comes before the prompt. Repeat the option for several. Default: none.
        video: A video that goes with the prompt, as --image. Default: none.
        pdf: A PDF whose pages go with the prompt, as --image. Default: none.
        pages: Pages of each PDF, such as 1-3,7. Default: all.
        tools: JSON file with a list of tools that the model may call, each as OpenAI's API takes
            it. Default: no tools.
        schema: JSON file with a JSON schema; the answer is JSON that is valid for it, unless it
            calls a tool or is cut. Needs the extra "server". Default: free text.
        show_thoughts: Print the thought before the answer, between <think> and </think>. Default:
            the answer alone.
        as_json: Print one JSON object: text, thought, tool_calls, finish_reason, counts of tokens,
            drafts and pictures, and times. Default: the text, as it is generated.
        stop: End the answer before this text. Repeat the option for several texts. Default: none.
    """
    text = read_prompts([] if prompt is None else [prompt])[0]
    drawn = generation.of_chat()
    functions = read_tools(tools) if tools else []
    form = read_schema(schema) if schema else None
    given = {"image": image, "video": video, "pdf": pdf}
    media = [(kind, source) for kind, sources in given.items() for source in sources or ()]
    from .attachments import Attachments, read_documents
    from .media_input import check_sources, page_numbers

    page_numbers(pages)
    documents = read_documents(" ".join(map(shlex.quote, file))) if file else {}
    check_sources([source for _, source in media], allow_url)
    from ..chat.conversation import Chat
    from ..engine.prefix_store import PrefixStore
    from ..model.loading import load
    from .progress import spinner, token_progress_then
    from .terminal import held_warnings, note

    with spinner(f"Loading {model}"):
        loaded, tokenizer = load(model, **generation.of_load())
    chat = Chat(
        loaded,
        tokenizer,
        system=system,
        tools=functions,
        schema=form,
        enable_thinking=think,
        stop=stop or (),
        on_loop="off",
        # No snapshots: there is no second turn, unless they are saved for another call.
        store=PrefixStore(loaded, None if cache_dir else 0),
        **drawn,
    )
    attached = Attachments(chat, allow_url)
    if media:
        attached.add(media, pages=pages)
    if documents:
        attached.add_texts(documents)
    text = "\n\n".join([*attached.texts, text])
    with ExitStack() as held:
        if cache_dir is not None:
            from ..engine.segments import open_folder

            chat.disk = held.enter_context(open_folder(cache_dir, loaded, cache_limit * 1e9))
            # Also after Ctrl-C.
            held.callback(lambda: list(chat.write_cache(every_point=True)))
        status, progress = held.enter_context(token_progress_then("thinking …"))
        started = time.perf_counter()
        if raw:
            pieces = continue_text(chat, text)
            status.start()
        else:
            pieces = chat.send(text, progress, **attached.options())
        if as_json:
            parts = list(pieces)
            status.stop()
            total_s = time.perf_counter() - started
            print(json.dumps(answer_as_json(parts, chat, total_s) | attached.counts()))
            return
        with held_warnings():
            print_answer(pieces, show_thoughts, status)
    if chat.stats.finish_reason == "length":
        note("the answer was cut: at --max-tokens, or because the context is full")


def continue_text(chat: Any, text: str) -> Generator["Piece", None, None]:
    """Continue `text` without a template; updates `chat.stats`."""
    from ..engine.generate import LONG_ANSWER_TOKENS, stream_generate
    from ..engine.output import Piece

    responses = stream_generate(
        chat.model,
        chat.tokenizer,
        text,
        max_tokens=chat.max_tokens or LONG_ANSWER_TOKENS,
        stop=chat.stop,
        draft=chat.drafter,
        **chat.sampling,
    )
    stats = chat.stats
    for response in responses:
        stats.prompt_tokens = stats.prefilled_tokens = response.prompt_tokens
        stats.prefill_tps = response.prompt_tps
        stats.generation_tokens = response.generation_tokens
        stats.decode_tps = response.generation_tps
        stats.draft_tokens += response.from_draft
        stats.finish_reason = response.finish_reason
        yield Piece("answer", response.text)


def print_answer(
    pieces: Generator["Piece", None, None], show_thoughts: bool, status: "Status"
) -> None:
    """Print pieces as they come; the spinner ends with the first one."""
    from ..engine.turn_prompts import THOUGHT_END
    from .terminal import CONTROL

    is_terminal = bool(sys.stdout) and sys.stdout.isatty()
    kind = ""

    def write(text: str) -> None:
        # Control characters are removed only for a terminal, which would obey them.
        print(text.translate(CONTROL) if is_terminal else text, end="", flush=True)

    with closing(pieces):
        for piece in pieces:
            if piece.kind == "thought" and not show_thoughts:
                continue
            status.stop()
            if piece.kind != kind:
                write({"": "", "thought": THOUGHT_END}.get(kind, "\n"))
                write("<think>\n" if piece.kind == "thought" else "")
                kind = piece.kind
            elif piece.call:
                write("\n")
            write(json.dumps(call_as_json(piece.call)) if piece.call else piece.text)
    write(THOUGHT_END if kind == "thought" else "\n")


def call_as_json(call: Any) -> dict[str, Any]:
    """A tool call as JSON; an incomplete one has `complete: false`."""
    cut = {} if call.complete else {"complete": False}
    return {"name": call.name, "arguments": call.arguments, **cut}


def answer_as_json(parts: Sequence["Piece"], chat: "Chat", total_s: float) -> dict[str, Any]:
    """The object for --json; times in seconds, speeds in tokens per second, drafts by depth."""
    stats, drafts = chat.stats, chat.drafter.stats
    texts = {
        kind: "".join(piece.text for piece in parts if piece.kind == kind)
        for kind in ("answer", "thought")
    }
    return {
        "text": texts["answer"],
        "thought": texts["thought"],
        "tool_calls": [call_as_json(piece.call) for piece in parts if piece.call],
        "finish_reason": stats.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.prompt_tokens - stats.prefilled_tokens,
        "generated_tokens": stats.generation_tokens,
        "thought_tokens": stats.thought_tokens,
        "ttft_s": stats.prefilled_tokens / stats.prefill_tps if stats.prefill_tps else None,
        "prefill_tps": stats.prefill_tps,
        "decode_tps": stats.decode_tps,
        "total_s": total_s,
        "draft_tokens": stats.draft_tokens,
        "tokens_per_pass": drafts.tokens_per_pass,
        "draft_acceptance": drafts.summary,
    }


def read_tools(file: Path) -> list[dict[str, Any]]:
    """A JSON list of tools, each with a name and a JSON schema of its parameters."""
    from ..engine.tool_calls import TOOL_FORM, check_tools

    expected = f"[{TOOL_FORM}, …]"
    tools = read_json(file, expected)
    if not isinstance(tools, list) or not tools:
        got = json.dumps(tools)[:60]
        raise Qwen35Error(f"{file} has no list of tools", got=got, expected=expected)
    check_tools(tools, f" of {file}")
    return tools


def read_schema(file: Path) -> dict[str, Any]:
    """A JSON schema, checked."""
    from ..engine.grammar import schema_part

    expected = '{"type": "object", "properties": {…}}'
    schema = read_json(file, expected)
    if not isinstance(schema, dict):
        got = json.dumps(schema)[:60]
        raise Qwen35Error(f"{file} has no JSON schema", got=got, expected=expected)
    schema_part(schema)
    return schema


def read_json(file: Path, expected: str) -> Any:
    """The content of a JSON file."""
    from ..files import read_text

    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise Qwen35Error(f"{file} is not JSON", got=error, expected=expected) from None
