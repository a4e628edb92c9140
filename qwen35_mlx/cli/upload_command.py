"""The command upload: a converted folder to a repository on the hub."""

from pathlib import Path
from typing import Annotated

import typer


def upload(
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    public: bool = False,
    card: bool = False,
    yes: bool = False,
) -> None:
    """Send a converted model to the hub, with a model card.

    The card is made from the folder's files, which are checked first. A stopped upload continues
    with the same command: what the hub has with the same checksum is not sent again. `fidelity
    --save` adds its figures to the card.

    Args:
        out: Folder that convert wrote.
        repo: Repository on the hub.
        public: Make a new repository public. Default: private.
        card: Print the model card and send nothing. Default: send.
        yes: Send without a question. Default: ask first.
    """
    from ..convert import upload as sending
    from .progress import byte_progress
    from .terminal import note

    given = sending.prepare(out, repo)
    if card:
        print(given.card, end="")
        return
    kind = "public" if public else "private"
    note(f"{len(given.files)} files, {given.num_bytes / 1e9:,.3f} GB, and a model card")
    if "\nlicense:" not in given.card:
        note("the licence of the source is not known: add it to the card on the hub")
    if not yes:
        question = f"Send them to {repo}, a {kind} repository if it is new? (--yes: no question)"
        typer.confirm(question, abort=True, err=True)
    with byte_progress(f"Sending {out.name}") as progress:
        url = sending.upload(given, private=not public, progress=progress)
    print(url)
