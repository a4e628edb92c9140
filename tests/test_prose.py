"""tools/prose/corpus.py: documents of one share only, clean prose, and checked downloads."""

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools" / "prose"))
import corpus as collecting

LONG = "It was a paragraph of more than sixty characters, as prose has them, about number "


def write_tar(path: Path, files: dict[str, str]) -> bytes:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path.read_bytes()


def package(path: Path, content: bytes, documents: str = "txt$") -> collecting.Package:
    return collecting.Package(path.name, hashlib.sha256(content).hexdigest(), documents)


@pytest.fixture
def one_package(tmp_path, monkeypatch):
    files = {f"d/{i}.txt": f"{LONG}{i // 2}.\n\nshort\n\n{LONG}{i}!" for i in range(200)}
    content = write_tar(tmp_path / "texts-1.0.tar.gz", files | {"d/readme.md": LONG + "readme"})
    found = package(tmp_path / "texts-1.0.tar.gz", content)
    monkeypatch.setattr(collecting, "PACKAGES", (found,))
    return tmp_path


def test_no_paragraph_is_in_two_shares(one_package):
    shares = collecting.corpus(one_package)
    blocks = {
        share: [block for text in texts for block in text.split("\n\n")]
        for share, texts in shares.items()
    }
    everything = [block for found in blocks.values() for block in found]
    assert len(everything) == len(set(everything)) == 300
    assert "readme" not in "".join(everything) and "short" not in everything
    # 5 % each, of 200 documents.
    assert 3 <= len(shares["judged"]) <= 20 and 3 <= len(shares["calibration"]) <= 20


def test_a_changed_package_is_refused(one_package):
    (one_package / "texts-1.0.tar.gz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="SHA-256"):
        collecting.corpus(one_package)


def test_code_and_tables_are_no_prose():
    html = f"<head><title>{LONG}</title></head><p>{LONG}\n<b>1</b>.</p><pre>{LONG}</pre>"
    assert collecting.paragraphs("a.html", html + f"<table><tr><td>{LONG}</table>") == [f"{LONG}1."]
    pod = f"=head1 {LONG}\n\n{LONG}C<1> and L<2|perlop>.\n\n  {LONG}"
    assert collecting.paragraphs("a.pod", pod) == [f"{LONG}1 and 2."]


def test_members_of_a_debian_package_are_read(tmp_path):
    data = write_tar(tmp_path / "data.tar", {"usr/a.txt": LONG})

    def entry(name: str, content: bytes) -> bytes:
        return f"{name:<48}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)

    parts = (
        entry("debian-binary", b"2.0\n")
        + entry("control.tar.xz", b"odd")
        + entry("data.tar.xz", data)
    )
    (tmp_path / "a_1_all.deb").write_bytes(b"!<arch>\n" + parts)
    assert list(collecting.members(tmp_path / "a_1_all.deb")) == [("usr/a.txt", LONG.encode())]
