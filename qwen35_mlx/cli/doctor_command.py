"""The command doctor: checks and times the Metal kernels on this machine."""

import json
from typing import Annotated, Literal

import typer

from . import completion


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", autocompletion=completion.models)
    ] = None,
    bits: Literal[2, 3, 4, 5, 6, 8] = 4,
    group_size: Literal[32, 64, 128] = 64,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Check and time the Metal kernels on this machine.

    Stores which kernels are correct and faster than MLX's own, for each size and number of tokens;
    --kernels auto uses those. Prints the machine and the results; the last line is a JSON report
    for a bug report.

    Args:
        model: Converted folder, or hub id, whose sizes and bits are measured too. Default: the
            released models alone.
        bits: Bits of each weight to measure.
        group_size: Number of weights that share a scale.
        as_json: Print the JSON report alone. Default: a page before it.
    """
    from ..kernels.doctor import DEFAULT_FORMAT, run, store
    from .progress import step_progress
    from .report import print_doctor

    own = None
    if model is not None:
        from ..model.hub import resolve
        from ..model.loading import open_model

        own = open_model(resolve(model))[0]
    formats = [DEFAULT_FORMAT._replace(bits=bits, group_size=group_size)]
    with step_progress("Checking kernels") as progress:
        report = run(progress, formats, own)
    if not as_json:
        print_doctor(report)
    print(json.dumps(report), flush=True)
    # Last, so that the report is printed even if it cannot be stored.
    store(report)
