"""The command line program: all commands, and its entry point."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from ..files import RING_VARIABLE
from .bench_commands import bench, doctor
from .chat_commands import chat, sessions
from .cluster_command import cluster, take_part
from .command import Command, documented
from .convert_commands import convert, plan
from .evaluate_command import evaluate
from .fidelity_command import fidelity
from .generate_command import generate
from .serve_commands import launch, serve
from .train_commands import fuse, train
from .upload_command import upload

app = typer.Typer(
    name="qwen35-mlx",
    no_args_is_help=True,
    # Rich's tables cut the names of options.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(convert, plan, fidelity, upload, generate, chat, sessions),
    *(serve, launch, cluster, train, fuse, evaluate, bench, doctor),
)
for function in COMMANDS:
    app.command(cls=Command)(documented(function))


def version(show: bool) -> None:
    """Print the version and exit."""
    if show:
        from .. import __version__

        typer.echo(f"qwen35-mlx {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 success, 1 an error in the input, 2 an error in the options, "
    "130 Ctrl-C. Completion works in bash, zsh and fish."
)
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Convert Qwen3.5 models to MLX, and run them on a Mac."""


def main() -> None:
    """Entry point of the qwen35-mlx command."""
    for stream in (sys.stdout, sys.stderr):
        # Terminals that are not UTF-8 show ? for unknown characters.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if os.environ.get(RING_VARIABLE):
        take_part(app)
        return
    try:
        app()
    except OSError as error:
        # Of --help on a full disk; commands report their own.
        from .terminal import print_error

        print_error(error)
        sys.exit(1)
