"""The command doctor: whether the Metal kernels are right and fast on this machine."""

import json
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the JSON report alone. Default: a page before it.")
    ] = False,
) -> None:
    """Check and time the Metal kernels on this machine.

    Stores which kernels are correct and faster; --kernels auto uses those. Prints the machine and
    the results; the last line is a JSON report for a bug report.
    """
    from ..kernels.doctor import run, store
    from .progress import step_progress
    from .report import print_doctor

    with step_progress("Checking kernels") as progress:
        report = run(progress)
    if not as_json:
        print_doctor(report)
    print(json.dumps(report), flush=True)
    # Last: if the result cannot be stored, the report is printed all the same.
    store(report)
