"""Uploads a converted folder to the hub, one commit for each file of weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qwen35_mlx.errors import CheckpointError, Qwen35Error
from qwen35_mlx.progress import ByteProgress

from . import hub
from .card import files_of, model_card
from .hub import HubFile, checksum, is_repository, listing_of, retry
from .job import verify

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """A folder to upload, with its model card."""

    folder: Path
    repo: str
    card: str
    # File names, with their SHA-256 if config.json has it, otherwise "".
    files: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files except the card."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def prepare(folder: Path, repo: str) -> Upload:
    """Prepare the upload of `folder` to the repository `repo`, without sending anything.

    The licence is from the folder, or from the source's card on the hub. Raises Qwen35Error.
    """
    if not is_repository(repo):
        raise Qwen35Error("not the name of a repository", got=repr(repo), expected="OWNER/NAME")
    card = model_card(folder, repo)
    if "\nlicense:" not in card and "\nbase_model: " in card:
        card = model_card(folder, repo, _licence_of_source(card))
    return Upload(folder, repo, card, files_of(folder))


def _licence_of_source(card: str) -> str | None:
    """The licence in the card of the source on the hub."""
    from huggingface_hub import HfApi

    source = card.partition('\nbase_model: "')[2].partition('"')[0]
    info = retry(source, lambda: HfApi().model_info(source))
    found = getattr(info.card_data, "license", None)
    return found if isinstance(found, str) else None


def upload(given: Upload, private: bool = True, progress: ByteProgress | None = None) -> str:
    """Send the files that the hub does not have, and compare all checksums; returns the URL.

    First verifies the folder. The card and the small files are sent last, so that a repository
    with a card is complete. Raises CheckpointError if files are damaged or cannot be sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    # Our own progress bar is shown.
    disable_progress_bars()
    verify(given.folder, progress)
    api, repo = HfApi(), given.repo

    def call(action: Any) -> Any:
        return retry(repo, partial(_unwrapped, action), hub.WAITS_S, what="send {} to")

    url = call(partial(api.create_repo, repo, private=private, exist_ok=True))
    listing = partial(api.model_info, repo, files_metadata=True)
    missing = _missing(given, listing_of(call(listing)))
    weights = [name for name in missing if name.endswith(".safetensors")]
    small = [name for name in missing if name not in weights]
    commits: list[list[Any]] = [[(name, given.folder / name)] for name in weights]
    commits.append([*((name, given.folder / name) for name in small), (CARD, given.card.encode())])
    done = 0
    for files in commits:
        if progress:
            progress(done, given.num_bytes, "", files[0][0])

        def send(files: list[Any] = files) -> None:
            # Created for each attempt: a CommitOperationAdd can be sent only once.
            additions = [CommitOperationAdd(name, content) for name, content in files]
            names = files[0][0] if len(files) == 1 else "configuration and card"
            api.create_commit(repo, additions, commit_message=f"Upload {names}")

        call(send)
        done += sum(path.stat().st_size for _, path in files if isinstance(path, Path))
    if wrong := _missing(given, listing_of(call(listing))):
        raise CheckpointError(
            f"the files in {repo} differ from those in {given.folder}",
            got=", ".join(wrong[:5]),
            expected="equal checksums",
            hint="repeat the command",
        )
    return str(url)


def _unwrapped(action: Any) -> Any:
    """Call `action`; raises the cause of an error that a thread of huggingface_hub wrapped."""
    try:
        return action()
    except RuntimeError as error:
        raise error.__cause__ or error from None


def _missing(given: Upload, there: Mapping[str, HubFile]) -> list[str]:
    """Names of the files that the hub does not have, or has with another checksum."""

    def differs(name: str, known: str) -> bool:
        if (found := there.get(name)) is None:
            return True
        # Known checksums were verified: these files need not be read again.
        own = known if found.in_lfs and known else checksum(given.folder / name, found.in_lfs)
        return own != found.checksum

    return [name for name, known in given.files.items() if differs(name, known)]
