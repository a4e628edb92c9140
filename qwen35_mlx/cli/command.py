"""The base of all commands: refuses options without effect, reports errors without a traceback."""

import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from ..errors import Qwen35Error

# Arguments and options that are paths, by the placeholder that the help shows.
PATHS = ("MODEL", "SRC", "OUT", "FILE", "DIR")
# An empty prompt has an error of its own.
MAY_BE_EMPTY = ("system", "prompt")
BITS = ("--bits", "--recipe", "--fit", "--bits-per-weight")
MEDIA = ("--image", "--video", "--pdf")
BUDGETS = ("--fit", "--bits-per-weight")

# Options given together, and the options one of which must then be given too. Without any, the
# options exclude each other. Each rule prevents that an option is ignored.
Rule = tuple[tuple[str, ...], tuple[str, ...]]
QUANTIZATION: list[Rule] = [
    *(((a, b), ()) for i, a in enumerate(BITS) for b in BITS[i + 1 :]),
    *((("--group-size", way), ()) for way in BITS[1:]),
    (("--dtype", "--group-size"), ("--bits",)),
    (("--prefer",), BUDGETS),
]
DRAFTS: Rule = (("--draft off", "--num-draft-tokens"), ())
RULES: dict[str, list[Rule]] = {
    "convert": [
        *QUANTIZATION,
        *((("--dtype", name), BITS) for name in ("--method", "--calibration", "--calibrate")),
        (("--method minmax", "--calibration"), BUDGETS),
        (("--context",), ("--fit",)),
        (("--kv-bits",), ("--fit",)),
    ],
    "fuse": [*QUANTIZATION, (("--context",), ("--fit",))],
    "train": [(("--dora", "--experts"), ())],
    "upload": [(("--card", name), ()) for name in ("--public", "--yes")],
    "evaluate": [
        *((("--tasks", name), ()) for name in ("--text", "--window", "--stride")),
        *(((name,), ("--tasks",)) for name in ("--include-path", "--limit", "--num-fewshot")),
        *(((name,), ("--tasks",)) for name in ("--batch-size", "--chat-template")),
        *(((name,), ("--chat-template",)) for name in ("--think", "--no-think")),
    ],
    "plan": [*QUANTIZATION, (("--calibration",), BUDGETS), (("--fit", "--macs"), ())],
    "generate": [
        *((("--raw", name), ()) for name in MEDIA),
        *(((f"{name} -",), ("--prompt",)) for name in MEDIA),
        (("--allow-url",), MEDIA),
        (("--pages",), ("--pdf",)),
        *((("--raw", name), ()) for name in ("--system", "--tools", "--think", "--no-think")),
        *((("--raw", name), ()) for name in ("--schema", "--cache-dir")),
        (("--cache-limit",), ("--cache-dir",)),
        (("--raw", "--show-thoughts"), ()),
        (("--no-think", "--show-thoughts"), ()),
        (("--json", "--show-thoughts"), ()),
        DRAFTS,
    ],
    "chat": [
        (("--demo", "MODEL"), ()),
        (("--no-think", "--think-budget"), ()),
        (("--image -",), ("--prompt",)),
        (("--allow-url", "--prompt"), ("--image",)),
        DRAFTS,
    ],
    "sessions": [(("--remove", "NAME"), ())],
    "serve": [(("--demo", "MODEL"), ()), (("--cache-limit",), ("--cache-dir",))],
    "cluster": [(("--hosts", "--hostfile"), ())],
    "bench": [
        (("--recall", name), ()) for name in ("--max-context", "--runs", "--vs-mlx-lm", "--png")
    ],
}
# Without SRC, plan shows the whole family: --fit then finds the bits for a memory.
NEEDS_SOURCE = ("--prefer", "--calibration", "--revision", "--png")
RULES["plan"] += [((name,), ("SRC",)) for name in NEEDS_SOURCE]
RULES["plan"] += [(("--fit", name), ("SRC",)) for name in ("--mac", "--dtype")]


def described(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text of a docstring before its list of names, and the entries of the list."""
    text, *listed = re.split(r"\n\n(?:Args|Attributes):\n", inspect.cleandoc(docstring or ""))
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", "".join(listed), re.MULTILINE)
    return text, {name: " ".join(help.split()) for name, help in entries}


def documented(function: Any) -> Any:
    """The function with the help of its parameters, taken from its docstring, for typer.

    A parameter of type bool becomes a switch, and a dataclass becomes one option per field.
    """
    function.__doc__, helps = described(function.__doc__)
    signature = inspect.signature(function)
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            parameters |= inspect.signature(group).parameters
            helps |= described(group.__doc__)[1]
        else:
            parameters[name] = parameter
    for name, text in helps.items():
        kind = parameters[name].annotation
        info = typer.Option(f"--{name.replace('_', '-')}") if kind is bool else typer.Option()
        if get_origin(kind) is Annotated:
            kind, info = get_args(kind)
        info = copy(info)
        info.help = text
        parameters[name] = parameters[name].replace(annotation=Annotated[kind, info])

    @wraps(function)
    def run(**given: Any) -> Any:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return function(**given)

    run.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
    return run


class Command(TyperCommand):
    """A command of the program, run with its checks."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # As typed: the path of no characters would become the current folder.
        typed = self.make_parser(ctx).parse_args(args=[*args])[0]
        for parameter in () if ctx.resilient_parsing else self.params:
            if parameter.name not in MAY_BE_EMPTY and "" in as_list(typed.get(parameter.name)):
                ctx.fail(f"{shown_name(parameter)} is empty.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with user_errors(), shown_warnings():
            refuse_unused(ctx)
            for parameter in self.params:
                for each in as_list(ctx.params.get(parameter.name)):
                    if parameter.metavar in PATHS and each is not None:
                        check_path(os.fspath(each))
            result = super().invoke(ctx)
            # Flush here, so that a full disk is reported as an error.
            if sys.stdout:
                sys.stdout.flush()
            return result


class Remarks(logging.Handler):
    """Prints the package's log messages."""

    def emit(self, record: logging.LogRecord) -> None:
        from .terminal import warn

        with suppress(OSError):
            warn(record.getMessage())


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print warnings of the package during the block."""
    handler, log = Remarks(logging.WARNING), logging.getLogger(__package__.partition(".")[0])
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def user_errors() -> Iterator[None]:
    """Report a mistake in the input without a traceback and exit 1; Ctrl-C exits 130."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        # For a broken pipe, typer exits without a message.
        raise
    # MLX raises RuntimeError if memory is short.
    except (Qwen35Error, OSError, RuntimeError, MemoryError, UnicodeError) as error:
        from .terminal import print_error

        with suppress(OSError):
            print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def given_options(ctx: Any) -> set[str]:
    """Names of the options and arguments of this call, also with their values."""
    given = set()
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name)
        source = ctx.get_parameter_source(parameter.name)
        if source is None or source.name != "COMMANDLINE":
            continue
        name = shown_name(parameter)
        given.add(parameter.secondary_opts[0] if value is False else name)
        given |= {f"{name} {each}" for each in as_list(value)}
    return given


def shown_name(parameter: Any) -> str:
    """What the help calls an option or an argument."""
    is_argument = parameter.param_type_name == "argument"
    return str(parameter.metavar if is_argument else parameter.opts[0])


def as_list(value: Any) -> list[Any]:
    """The values of an option as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def refuse_unused(ctx: Any) -> None:
    """Raise a usage error if an option would have no effect."""
    given = given_options(ctx)
    for together, needed in RULES.get(ctx.command.name, ()):
        if given.issuperset(together) and not given.intersection(needed):
            if needed:
                ctx.fail(f"{' with '.join(together)} needs {' or '.join(needed)}.")
            ctx.fail(f"{' and '.join(together)} exclude each other.")


def check_path(path: str) -> None:
    """Raise if no file can have this name."""
    if "\0" in path:
        raise Qwen35Error("not a path", got=repr(path), expected="no NUL character")
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise Qwen35Error(f"no home folder of {path.partition('/')[0]}", got=path)
