"""What loads, and what is refused with which words; nothing in a folder is run or followed."""

import json
import pickle
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from mlx.utils import tree_flatten

import qwen35_mlx
from qwen35_mlx.convert import convert
from qwen35_mlx.errors import CheckpointError, ConfigError, Qwen35Error
from qwen35_mlx.model.hub import resolve
from qwen35_mlx.model.loading import load_model

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "src"
    write_checkpoint(folder, moe=True, num_shards=2, vision=True, mtp=True, tokenizer=True)
    return folder


@pytest.fixture(scope="module")
def pristine(source: Path) -> Path:
    """Converted to 4 bits; MAX_SHARD_BYTES leaves it in one file."""
    return convert(source, source.with_name("out"), bits=4, dtype="bfloat16")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    # Square brackets are special to glob, and nothing to us.
    return Path(shutil.copytree(pristine, tmp_path / "[4-bit] model"))


def tensors(folder: Path, file: str = "model.safetensors") -> dict[str, mx.array]:
    loaded = mx.load(str(folder / file))
    assert isinstance(loaded, dict)
    return {name: mx.array(np.array(a)) if a.dtype != mx.bfloat16 else a + 0
            for name, a in loaded.items()}  # fmt: skip


def rewrite(change: Callable[[dict[str, mx.array]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        held = tensors(folder)
        mx.eval(held)
        change(held)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), held)

    return edit


def edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def test_a_folder_loads_with_carried_tensors_set_aside(folder: Path) -> None:
    model, tokenizer = qwen35_mlx.load(folder)
    held = tensors(folder)
    assert any(name.startswith("vision_tower.") for name in held)
    names = {name for name, _ in tree_flatten(model.parameters())}
    assert names == {n for n in held if not n.startswith("vision_tower.")}
    # On the CPU all floats are float32.
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32, mx.uint32}
    assert not model.training
    # The <end> of the tokenizer in checkpoints.py.
    assert VOCAB - 1 in tokenizer.eos_token_ids


def test_shards_named_by_an_index_load(folder: Path) -> None:
    expected = logits(folder)
    split(folder)
    np.testing.assert_array_equal(logits(folder), expected)


def test_a_folder_without_index_loads(folder: Path) -> None:
    expected = logits(folder)
    (folder / "model.safetensors.index.json").unlink()
    np.testing.assert_array_equal(logits(folder), expected)


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.arange(12)[None] * 5 % VOCAB))


def split(folder: Path) -> None:
    """The one file in two, with an index."""
    held = tensors(folder)
    mx.eval(held)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, parity in enumerate((0, 1), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        part = {n: held[n] for j, n in enumerate(sorted(held)) if j % 2 == parity}
        mx.save_safetensors(str(folder / file), part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(num_bytes: int) -> Edit:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-num_bytes] if num_bytes else b"")

    return edit


def move_tensor(num_bytes: int) -> Edit:
    """The last tensor elsewhere in the file: MLX reads other numbers and says nothing."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        last = max(header, key=lambda n: header[n].get("data_offsets", [0])[0])
        header[last]["data_offsets"] = [n + num_bytes for n in header[last]["data_offsets"]]
        new = json.dumps(header).encode()
        data = raw[start:] + bytes(max(num_bytes, 0))
        file.write_bytes(len(new).to_bytes(8, "little") + new + data)

    return edit


def insert_a_byte(folder: Path) -> None:
    """Between header and data, so that all data begin a byte too early."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(raw[:start] + b" " + raw[start:])


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def name_outside(folder: Path) -> None:
    outside = folder.parent / "model-outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    change = edit_json(
        "model.safetensors.index.json",
        lambda c: c.update(weight_map=dict.fromkeys(c["weight_map"], f"../{outside.name}")),
    )
    change(folder)


NORM = "language_model.model.norm.weight"
SCALES = "language_model.lm_head.scales"
WEIGHT = "language_model.lm_head.weight"


def test_a_copy_of_the_embedding_beside_tied_embeddings_is_dropped(folder: Path) -> None:
    def copy_head(held: dict[str, mx.array]) -> None:
        for name in [n for n in held if "lm_head" in n]:
            held[name] = held[name.replace("lm_head", "model.embed_tokens")]

    rewrite(copy_head)(folder)
    edit_json("config.json", lambda c: c.update(tie_word_embeddings=True))(folder)
    model, _ = load_model(folder)
    ids = mx.array([[1, 2]])
    hidden = model.language_model.model(ids)
    assert mx.array_equal(model(ids), model.language_model.model.embed_tokens.as_linear(hidden))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (truncate(1), ["model.safetensors is truncated", "expected: at least", "hint"]),
        (truncate(100_000), ["is truncated"]),
        (truncate(0), ["is truncated", "0 bytes"]),
        (move_tensor(2), ["model.safetensors is damaged", "tensor", "leaves a gap"]),
        (move_tensor(-2), ["model.safetensors is damaged", "tensor", "overlaps"]),
        (insert_a_byte, ["bytes after the last tensor"]),
        (lose_a_shard, ["model-00002-of-00002.safetensors", "1 missing of 2 files", "hint"]),
        (name_outside, ["outside the folder", "../model-outside.safetensors"]),
        (pickled, ["no weights", "model.safetensors"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["cannot be read"]),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["no weight_map"]),
        (
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
            ["no weight_map"],
        ),
        (
            edit_json("model.safetensors.index.json",
                      lambda c: c["weight_map"].update(extra="model.safetensors")),
            ["1 tensor(s)", "extra"],
        ),
        (rewrite(lambda t: t.pop(NORM)), [f"missing  {NORM}"]),
        (rewrite(lambda t: t.update(other=t[NORM])), ["unknown  other"]),
        (
            rewrite(lambda t: t.update({NORM: t[NORM][:64]})),
            [f"shape    {NORM}: [64], expected [128]"],
        ),
        (
            rewrite(lambda t: t.update({NORM: t[NORM].astype(mx.uint32)})),
            [f"dtype    {NORM}: U32, expected F32"],
        ),
        (
            rewrite(lambda t: t.update({WEIGHT: t[WEIGHT].astype(mx.float32)})),
            [f"dtype    {WEIGHT}: F32, expected U32"],
        ),
        (
            rewrite(lambda t: t.pop(SCALES)),
            [f"unknown  {SCALES[:-6]}biases", f"shape    {WEIGHT}: [96, 16]"],
        ),
        (lambda f: (f / "config.json").unlink(), ["no config.json"]),
        (lambda f: (f / "config.json").write_text("[]"), ["not a JSON object"]),
        (lambda f: (f / "config.json").write_text("{"), ["is not JSON"]),
        (edit_json("config.json", lambda c: c.update(model_type="llama")), ["llama", "qwen3_5"]),
        (
            edit_json("config.json", lambda c: c["text_config"].update(num_hidden_layers=2,
                      layer_types=c["text_config"]["layer_types"][:2])),
            ["unknown  language_model.model.layers.*", "more kinds", "the same checkpoint"],
        ),
        (
            edit_json("config.json", lambda c: c.update(tie_word_embeddings=True)),
            ["lm_head.", "is not the embedding", "tie_word_embeddings to false"],
        ),
        (
            edit_json("config.json", lambda c: c["quantization"].update(mode="exl3")),
            ["'exl3'", "affine, mxfp4"],
        ),
        (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer", "tokenizer.json"]),
        (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer", "cannot be read"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer", "cannot be read"]),
        (
            edit_json("tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"1": 2})),
            ["tokenizer", "cannot be read"],
        ),
        (lambda f: (f / "generation_config.json").write_text("{"), ["is not JSON"]),
        (lambda f: (f / "generation_config.json").write_text("[" * 100_000), ["is not JSON"]),
        (lambda f: (f / "generation_config.json").write_text("[]"), ["not a JSON object"]),
        *(
            (
                lambda f, text=text: (f / "generation_config.json").write_text(text),
                ["generation_config.json: ", *words],
            )
            for text, *words in (
                ('{"do_sample": true, "temperature": "warm"}', "temperature is not", "'warm'"),
                # Without do_sample it was not looked at.
                ('{"temperature": -5}', "temperature is not usable", "got: -5"),
                ('{"temperature": NaN}', "temperature is not usable", "got: nan"),
                ('{"top_k": true}', "top_k is not usable", "got: True"),
                ('{"do_sample": "no"}', "do_sample is not usable", "got: 'no'"),
            )
        ),
    ],
)  # fmt: skip
def test_what_is_refused_and_how(folder: Path, edit: Edit, words: list[str]) -> None:
    edit(folder)
    with pytest.raises(Qwen35Error) as caught:
        qwen35_mlx.load(folder)
    assert isinstance(caught.value, CheckpointError | ConfigError)
    for word in words:
        assert word in str(caught.value)


def test_an_unconverted_checkpoint_is_told_what_to_do(source: Path) -> None:
    with pytest.raises(CheckpointError, match="not converted") as caught:
        qwen35_mlx.load(source)
    assert f"hint: run: qwen35-mlx convert {source} OUT" in str(caught.value)


def test_no_code_comes_out_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n"
    for name in ("tokenization.py", "modeling.py"):
        (folder / name).write_text(code)
    auto = {"AutoTokenizer": ["tokenization.T", "tokenization.T"], "AutoModel": "modeling.T"}
    edit_json("tokenizer_config.json", lambda c: c.update(auto_map=auto))(folder)
    edit_json("config.json", lambda c: c.update(auto_map=auto))(folder)
    try:
        qwen35_mlx.load(folder)
    except Qwen35Error as error:
        assert "cannot be read" in str(error)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_path_in_a_file_is_not_followed(converted_demo: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(converted_demo, tmp_path / "demo"))
    expected = qwen35_mlx.load(folder)[1].encode("Blue")
    other = json.loads((folder / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    other["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    (tmp_path / "other.json").write_text(json.dumps(other))
    change = {"tokenizer_file": str(tmp_path / "other.json"), "vocab_file": "/etc/passwd"}
    edit_json("tokenizer_config.json", lambda c: c.update(change))(folder)
    assert qwen35_mlx.load(folder)[1].encode("Blue") == expected


def test_both_end_tokens_are_known_even_if_the_files_name_one(
    converted_demo: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(converted_demo, tmp_path / "demo"))
    (folder / "generation_config.json").unlink()
    _, tokenizer = qwen35_mlx.load(folder)
    ends = {tokenizer.decode([i]) for i in tokenizer.eos_token_ids}
    assert ends == {"<|im_end|>", "<|endoftext|>"}


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "nothing", "a/b/c", "../up", "owner/..", "", "owner/na me"]
)
def test_names_that_are_neither_folder_nor_hub_id(name: str, tmp_path: Path) -> None:
    if not name:
        (tmp_path / "file").touch()
        name = str(tmp_path / "file")
    with pytest.raises(CheckpointError, match="no model at"):
        resolve(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A hub that serves `hub.folder`, and keeps the calls."""

    class Hub:
        folder = Path()
        error: Exception | None = None

        def __init__(self) -> None:
            self.calls: list[tuple[str, str | None, list[str]]] = []

        def download(
            self, repo: str, *, revision: str | None = None, allow_patterns: list[str]
        ) -> str:
            self.calls.append((repo, revision, allow_patterns))
            if self.error:
                raise self.error
            snapshot = tmp_path / "snapshot"
            for file in self.folder.iterdir():
                if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                    snapshot.mkdir(exist_ok=True)
                    shutil.copy(file, snapshot)
            return str(snapshot)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_hub_id_is_downloaded_and_loaded(hub: Any, folder: Path) -> None:
    (folder / "code.py").write_text("")
    hub.folder = folder
    model, _ = qwen35_mlx.load("owner/name-4bit", revision="abc")
    assert model.config.num_experts == 3
    assert {call[:2] for call in hub.calls} == {("owner/name-4bit", "abc")}
    snapshot = resolve("owner/name-4bit")
    assert (snapshot / "model.safetensors").exists() and (snapshot / "tokenizer.json").exists()
    assert not list(snapshot.glob("*.py"))


def test_files_that_the_index_names_are_fetched_whatever_their_names(
    hub: Any, folder: Path
) -> None:
    """A pattern of model*.safetensors left out mtp.safetensors, and load found it missing."""
    split(folder)
    held = tensors(folder, "model-00002-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    mx.save_safetensors(str(folder / "weights [2].safetensors"), held)
    mx.save_safetensors(str(folder / "mtp.safetensors"), {"mtp.y.weight": mx.zeros((2, 2))})
    mx.save_safetensors(str(folder / "model-old.safetensors"), {"mtp.x.weight": mx.zeros((2, 2))})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(held, "weights [2].safetensors")
    content["weight_map"]["mtp.y.weight"] = "mtp.safetensors"
    index.write_text(json.dumps(content))
    hub.folder = folder
    qwen35_mlx.load("owner/name-4bit")
    fetched = {path.name for path in resolve("owner/name-4bit").glob("*.safetensors")}
    assert fetched == {"model-00001-of-00002.safetensors", "weights [2].safetensors",
                       "mtp.safetensors"}  # fmt: skip


def test_a_repository_without_index_and_model_files_is_fetched_whole(
    hub: Any, folder: Path
) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    hub.folder = folder
    assert qwen35_mlx.load("owner/name-4bit")[0].config.num_experts == 3


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_an_index_of_the_hub_names_no_file_elsewhere(hub: Any, folder: Path, file: str) -> None:
    edit_json("model.safetensors.index.json", lambda c: c["weight_map"].update(w=file))(folder)
    hub.folder = folder
    with pytest.raises(CheckpointError, match="outside the folder"):
        qwen35_mlx.load("owner/name-4bit")
    assert all("safetensors" not in "".join(patterns) for _, _, patterns in hub.calls)


@pytest.mark.parametrize("problem", ["unconverted", "llama"])
def test_a_hub_model_that_does_not_run_is_refused_before_its_weights_are_fetched(
    hub: Any, source: Path, tmp_path: Path, problem: str
) -> None:
    hub.folder = Path(shutil.copytree(source, tmp_path / "copy"))
    if problem == "llama":
        edit_json("config.json", lambda c: c.update(model_type="llama"))(hub.folder)
    with pytest.raises(Qwen35Error, match="not converted" if problem != "llama" else "llama"):
        qwen35_mlx.load("owner/name")
    assert not list((tmp_path / "snapshot").glob("*.safetensors"))


@pytest.mark.parametrize("error", [RuntimeError(), ValueError("one\ntwo"), OSError("offline")])
def test_a_hub_that_fails_is_reported_in_one_line(hub: Any, error: Exception) -> None:
    hub.error = error
    with pytest.raises(CheckpointError, match="cannot get owner/name from the hub") as caught:
        qwen35_mlx.load("owner/name")
    assert type(error).__name__ in str(caught.value) and "two" not in str(caught.value)


def test_a_folder_here_comes_before_the_hub(hub: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "owner" / "name")
    qwen35_mlx.load("owner/name")
    assert hub.calls == []
