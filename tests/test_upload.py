"""Sent to the hub: bit-identical whatever the network does; the card's numbers are the files'."""

import importlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import write_checkpoint
from everyday import everyday
from fake_hub import REPO, FakeHub, serving

from qwen35_mlx.convert import card, convert, upload
from qwen35_mlx.convert.hub import retry
from qwen35_mlx.errors import CheckpointError, Qwen35Error

plan_module = importlib.import_module("qwen35_mlx.convert.plan")

# Of huggingface_hub's way to send a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("upload")
    write_checkpoint(home / "src", moe=True, mtp=True, vision=True, tokenizer=True, num_shards=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "MAX_SHARD_BYTES", 200_000)
        return convert(home / "src", home / "out", bits=4)


@pytest.fixture
def out(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "remote").mkdir()
    with serving(tmp_path / "remote", tmp_path / "cache", monkeypatch) as server:
        yield server


def is_private(created: dict[str, object]) -> bool:
    """Of either of huggingface_hub's ways to say it."""
    return bool(created.get("private")) or created.get("visibility") == "private"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "faults",
    everyday(
        [
            [],
            ["cut", None, "cut", 500, None, 503],
            [429, "cut", "cut", None, 500, "cut", 503],
        ],
        1,
    ),
)
def test_what_is_sent_is_bit_identical_whatever_the_network_does(out, fake, faults):
    (out / "token.txt").write_text("nothing of the model")
    fake.upload_faults = list(faults)
    steps: list[tuple[int, str]] = []
    given = upload.prepare(out, REPO)
    url = upload.upload(given, progress=lambda done, _, tensor, file: steps.append((done, file)))
    assert fake.num_faults == len([f for f in faults if f]) and url.endswith(REPO)
    there = files(fake.folder)
    mine = files(out)
    del mine["token.txt"]
    assert there.pop("README.md").decode() == card.model_card(out, REPO)
    assert there == mine
    assert all(is_private(entry) for entry in fake.created)
    # The files that make a repository complete come behind all weights.
    assert len(fake.commits) > 2 and "README.md" in fake.commits[-1]
    assert "config.json" in fake.commits[-1]
    # Behind the check of the folder, each file with the bytes of those before it.
    steps = steps[-len(fake.commits) :]
    sizes = [(out / file).stat().st_size for _, file in steps[:-1]]
    assert [done for done, _ in steps] == list(itertools.accumulate(sizes, initial=0))


def test_a_stopped_upload_sends_only_what_is_missing(out, fake, monkeypatch):
    given = upload.prepare(out, REPO)
    sent = []

    def stopping(repo, action, waits_s, what):
        if len(sent) == 4:
            raise KeyboardInterrupt
        sent.append(action)
        return retry(repo, action, waits_s, what=what)

    with monkeypatch.context() as patch:
        patch.setattr(upload, "retry", stopping)
        with pytest.raises(KeyboardInterrupt):
            upload.upload(given)
    assert len(fake.commits) == 2 and "config.json" not in files(fake.folder)
    before = dict(fake.received)
    upload.upload(given)
    assert {name: fake.received[name] for name in before} == before
    assert files(fake.folder).keys() == files(out).keys() | {"README.md"}


def test_a_damaged_folder_is_not_sent(out, fake):
    (file,) = sorted(out.glob("*.safetensors"))[:1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="differs from what was converted"):
        upload.upload(upload.prepare(out, REPO))
    assert not fake.created and not fake.commits


def test_a_config_names_no_file_outside_of_its_folder(out, fake):
    (out.parent / "secret").write_text("of someone else")
    config = json.loads((out / "config.json").read_text())
    config["qwen35_mlx"]["sha256"] |= {"../secret": "0" * 64}
    (out / "config.json").write_text(json.dumps(config))
    given = upload.prepare(out, REPO)
    assert not any("secret" in name for name in given.files)
    with pytest.raises(CheckpointError, match="secret is missing"):
        upload.upload(given)
    assert not fake.commits


def test_a_hub_that_keeps_other_bytes_is_noticed(out, fake, monkeypatch):
    upload.upload(given := upload.prepare(out, REPO))
    (file,) = sorted(fake.folder.glob("*.safetensors"))[:1]
    file.write_bytes(b"else")
    monkeypatch.setattr(fake, "objects", {})
    fake.upload_faults = [None, 403]
    with pytest.raises(CheckpointError, match=f"cannot send {REPO} to the hub"):
        upload.upload(given)


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip().replace(",", "") for cell in line.strip("|").split("|")][1:]


def test_the_numbers_of_the_card_are_those_of_the_files(converted_demo, tmp_path, run_cli):
    out = Path(shutil.copytree(converted_demo, tmp_path / "out"))
    (out / "LICENSE").write_text("                Apache License\n")
    saved = run_cli("fidelity", out, out, "--save", "--tokens", 64)
    assert saved.exit_code == 0, saved.stderr
    text = card.model_card(out, "me/Tiny-4bit")
    arrays = {}
    for file in out.glob("*.safetensors"):
        arrays |= mx.load(str(file))
    of = dict.fromkeys(card.KINDS, 0)
    for name, array in arrays.items():
        of[card.kind_of(name)] += array.nbytes
    for kind, num_bytes in of.items():
        if num_bytes:
            num_weights, bits, gb = row(text, kind)
            assert gb == f"{num_bytes / 1e9:.3f}"
            assert float(bits) == pytest.approx(8 * num_bytes / int(num_weights), abs=0.01)
    assert row(text, "**all**")[2] == f"{sum(of.values()) / 1e9:.3f}"
    names = [n for n in arrays if n.endswith("switch_mlp.up_proj.scales") and "mtp" not in n]
    num_weights = 3 * 64 * sum(math.prod(arrays[name].shape) for name in names)
    assert names and int(row(text, "routed experts")[0]) == num_weights
    figures = json.loads((out / "fidelity.json").read_text())
    assert "| figure | value |" in text
    assert row(text, "perplexity") == [f"{figures['quantized_perplexity']:.4f}"]
    assert figures.items() <= json.loads(saved.stdout.splitlines()[-1]).items()
    assert "valid JSON" not in text
    (out / "fidelity.json").write_text(json.dumps(figures | {"valid_json": 0, "same_tokens": 0.5}))
    answers = card.model_card(out, "me/Tiny-4bit")
    assert row(answers, "valid JSON") == ["0.0%"]
    assert row(answers, "tokens of an answer before the first difference") == ["50.0%"]
    facts = json.loads((out / "config.json").read_text())["qwen35_mlx"]
    for name, digest in facts["sha256"].items():
        assert f"| `{name}` | `{digest}` |" in text
    assert 'license: "apache-2.0"' in text and 'pipeline_tag: "image-text-to-text"' in text
    assert "bits 4" in text
    assert "qwen35-mlx chat me/Tiny-4bit" in text and "mlx_lm.chat --model me/Tiny-4bit" in text
    assert re.search(r"and 8 GB of memory. With a context of [\d,]+ tokens, the model", text)


def test_the_licence_of_a_source_on_the_hub_is_kept(out, fake, monkeypatch):
    """No file tells it: its card does."""
    facts = json.loads((out / "config.json").read_text())
    facts["qwen35_mlx"] |= {"source": REPO, "source_revision": "abc"}
    (out / "config.json").write_text(json.dumps(facts))
    monkeypatch.setattr(fake, "listing", lambda: {"id": REPO, "cardData": {"license": "mit"}})
    text = upload.prepare(out, "me/Tiny").card
    _, front, _ = text.split("---\n", 2)
    assert {key: json.loads(value) for key, value in re.findall("(.+?): (.+)", front)} == {
        "license": "mit",
        "base_model": REPO,
        "base_model_relation": "quantized",
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mlx", "qwen35-mlx"],
    }
    assert f"{REPO} at revision `abc`" in text


@pytest.mark.parametrize("repo", ["Tiny", "a/b/c", "../x", "a b/c"])
def test_a_repository_has_an_owner_and_a_name(out, repo):
    with pytest.raises(Qwen35Error, match="not the name of a repository"):
        upload.prepare(out, repo)


def test_the_command_asks_before_it_sends(run_cli, out, fake):
    shown = run_cli("upload", out, REPO, "--card")
    assert shown.exit_code == 0 and shown.stdout == card.model_card(out, REPO)
    asked = run_cli("upload", out, REPO)
    assert asked.exit_code == 1 and "private" in asked.stderr and not fake.created
    sent = run_cli("upload", out, REPO, "--public", "--yes")
    assert sent.exit_code == 0 and sent.stdout.strip() == f"{fake.url}/{REPO}"
    assert [is_private(entry) for entry in fake.created] == [False]
