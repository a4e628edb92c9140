"""The command line: parses, prints, and leaves the work to the package."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from . import options
from .chat_commands import chat, generate, sessions
from .convert_commands import convert, fidelity, plan

app = typer.Typer(
    name="qwen35-mlx",
    no_args_is_help=True,
    add_completion=False,
    # Rich's tables cut the names of options.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for command in (convert, plan, fidelity, generate, chat, sessions):
    app.command()(command)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the report.")] = False,
) -> None:
    """Check and time the Metal kernels; remember which to use.

    Prints what this machine is, and a report to paste into a bug report.
    """
    with options.user_errors():
        import json

        from ..kernels.doctor import run, store
        from .terminal import print_doctor, step_progress

        with step_progress("Checking kernels") as progress:
            report = run(progress)
        if not as_json:
            print_doctor(report)
        print(json.dumps(report), flush=True)
        # Last: a full disk takes nothing from the report.
        store(report)


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        from .. import __version__

        typer.echo(f"qwen35-mlx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run Qwen3.5 on a Mac: convert a checkpoint, then chat with it."""


def main() -> None:
    """Entry point of the qwen35-mlx command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding than UTF-8 shows ? for what it cannot show.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
