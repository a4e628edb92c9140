"""Read a converted folder into the modules: every name and shape checked, nothing dropped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config import ModelConfig, read_config, read_object
from ..errors import CheckpointError, ConfigError
from ..headers import INDEX_FILE, check_present, gather, read_header, read_index, some, weight_files
from ..kernels import choice, metal
from ..kernels.matrix import BITS, GROUP_SIZES
from ..memory import allow, wire
from ..sampling import SamplingParams
from .language import Model

# Parts that a folder may carry and the text model does not run.
CARRIED = ("vision_tower.", "visual.", "mtp.", "language_model.mtp.")
CONVERT_HINT = "run: qwen35-mlx convert {folder} OUT"
# Mode -> the bits and group sizes that MLX has for it; others divide by zero inside of it.
MODES = {
    "affine": (BITS, GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# Qwen3.5 ends a turn with the first and a document with the second; both stop an answer.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Not *.py: nothing that comes with a checkpoint is run.
SMALL_FILES = ("*.json", "*.jinja", "*.txt")


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; anything shaped like `owner/name` from the hub or its cache.

    What does not run here is refused by its small files, before its weights are fetched.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise CheckpointError(
            f"no model at {name}",
            got="a file" if folder.exists() else "no such folder",
            expected="a converted folder, or a hub id such as owner/name",
        )
    folder = _download(name, revision, SMALL_FILES)
    ModelConfig.from_hf(read_config(folder))
    if (folder / INDEX_FILE).exists():
        _refuse_unconverted(read_index(folder / INDEX_FILE), name)
    return _download(name, revision, (*SMALL_FILES, "model*.safetensors"))


def _download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    # Whatever goes wrong between here and the hub has its own class.
    except Exception as error:
        raise CheckpointError(
            f"cannot get {name} from the hub",
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="a folder on this machine, or a hub id that it can reach",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def load_model(
    folder: str | Path, context: int | None = None, force: bool = False
) -> tuple[Model, dict[str, Any]]:
    """Build the model in `folder` and load its weights; also returns the parsed config.json.

    On the CPU everything is float32, whatever the files hold: other types are many times
    slower there. Raises ConfigError, CheckpointError or, before any weight is read, MemoryRefused;
    see `load` for `context` and `force`.
    """
    folder = Path(folder)
    raw_config = read_config(folder)
    config = ModelConfig.from_hf(raw_config)
    weights = _read_shards(folder)
    weights = {k: v for k, v in weights.items() if not k.startswith(CARRIED)}
    _refuse_unconverted(weights, folder)
    if config.tie_word_embeddings:
        _drop_copied_head(weights)
    model = Model(config)
    quantize_modules(model, raw_config, weights)
    _check_names_and_shapes(model, weights, folder)
    if mx.default_device() == mx.Device(mx.cpu):
        weights = {
            k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v
            for k, v in weights.items()
        }
    # Until here nothing but headers is read: MLX loads when it evaluates.
    model.allowance = allow(
        config,
        sum(array.nbytes for array in weights.values()),
        context=context,
        force=force,
        item_bytes=weights["language_model.model.norm.weight"].dtype.size,
    )
    model.config = replace(config, context_limit=model.allowance.context)
    wire(model.allowance)
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model, raw_config


def _refuse_unconverted(names: Iterable[str], origin: str | Path) -> None:
    if any(name.startswith("model.") or name == "lm_head.weight" for name in names):
        raise CheckpointError(
            f"{origin} holds a checkpoint that is not converted",
            got="tensor names as Hugging Face has them",
            expected="names that begin with language_model.",
            hint=CONVERT_HINT.format(folder=origin),
        )


def _drop_copied_head(weights: dict[str, mx.array]) -> None:
    """Of tied embeddings a file may hold both; a head of its own stays, and is refused."""
    for name in [name for name in weights if name.startswith("language_model.lm_head.")]:
        kept = weights.get(name.replace("lm_head", "model.embed_tokens"))
        if kept is not None and mx.array_equal(weights[name], kept).item():
            del weights[name]


def _read_shards(folder: Path) -> dict[str, mx.array]:
    """All tensors of `model*.safetensors`; shards and index must agree."""
    present, index = weight_files(folder), folder / INDEX_FILE
    weight_map = read_index(index) if index.exists() else {}
    check_present(weight_map.values(), present)
    files = sorted(set(weight_map.values())) or [f for f in present if f.startswith("model")]
    if not files:
        raise CheckpointError(
            f"no weights in {folder}", got="no model*.safetensors", expected="a converted folder"
        )
    # MLX reads files whose tensors overlap, or begin a byte too early.
    headers = gather(read_header(folder / file) for file in files)
    if lost := weight_map.keys() - headers:
        raise CheckpointError(
            f"{len(lost)} tensor(s) that the index of {folder} names are in no shard",
            got=some(sorted(lost)),
            hint="download or convert the folder again",
        )
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            shard = mx.load(str(folder / file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read", got=_first_line(error)) from None
        assert isinstance(shard, dict)
        weights |= shard
    return weights


def quantize_modules(
    model: nn.Module, config: Mapping[str, Any], weights: Mapping[str, mx.array], prefix: str = ""
) -> None:
    """Swap in a quantized module wherever the files hold scales.

    `prefix` is the name on disk of `model`, up to and with its dot, if it is a part of one.
    """
    default = config.get("quantization") or config.get("quantization_config")
    if not any(name.endswith(".scales") for name in weights):
        return
    if not isinstance(default, dict) or "bits" not in default or "group_size" not in default:
        raise ConfigError(
            "the weights are quantized but config.json does not say how",
            got=f"quantization={default!r}",
            expected="an object with bits and group_size",
        )

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        path = prefix + path
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            return False
        # Some programs leave the first component out.
        own = default.get(path, default.get(path.removeprefix("language_model.")))
        # As mlx-lm reads it: an entry of its own without a mode is affine whatever the rest is.
        chosen = default | {"mode": "affine"} | own if isinstance(own, dict) else default
        bits, group_size, mode = chosen["bits"], chosen["group_size"], chosen.get("mode", "affine")
        known = MODES.get(mode) if isinstance(mode, str) else None
        if known is None:
            raise ConfigError(
                f"quantization mode {mode!r} of {path} is not supported",
                got=repr(mode),
                expected=", ".join(MODES),
            )
        if not (isinstance(bits, int) and bits in known[0] and group_size in known[1]):
            raise ConfigError(
                f"the quantization block of config.json has no usable setting for {path}",
                got=f"bits={bits!r}, group_size={group_size!r}",
                expected=f"bits of {known[0]}, a group_size of {known[1]} for mode {mode}",
            )
        return {"bits": bits, "group_size": group_size, "mode": mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(
            "the quantization block of config.json does not fit the model", got=_first_line(error)
        ) from None


def _check_names_and_shapes(model: Model, weights: Mapping[str, mx.array], folder: Path) -> None:
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"missing: {k} {expected[k].shape}" for k in sorted(expected.keys() - weights)]
    problems += [f"unknown: {k} {weights[k].shape}" for k in sorted(weights.keys() - expected)]
    pairs = [(k, weights[k], expected[k]) for k in sorted(expected.keys() & weights)]
    problems += [
        f"wrong shape: {k} is {got.shape}, expected {wanted.shape}"
        for k, got, wanted in pairs
        if got.shape != wanted.shape
    ]
    problems += [
        f"wrong type: {k} is {got.dtype}, expected {wanted.dtype}"
        for k, got, wanted in pairs
        if not _same_kind(got.dtype, wanted.dtype)
    ]
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json:\n    " + "\n    ".join(shown),
            hint="the folder may be incomplete, or of another model",
        )


def _same_kind(got: mx.Dtype, expected: mx.Dtype) -> bool:
    """Any float for a float, but packed integers exactly: other bytes would load as noise."""
    if mx.issubdtype(expected, mx.floating):
        return mx.issubdtype(got, mx.floating)
    return got == expected


def load(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    kernels: str = "auto",
    context: int | None = None,
    force: bool = False,
) -> tuple[Model, Any]:
    """Model and tokenizer of a converted folder or hub id, as `mlx_lm.load` returns them.

    `kernels`: "auto" runs those Metal kernels that `qwen35-mlx doctor` found right and faster on
    this machine, "metal" all of them, "ops" none.
    `context`: most tokens of a prompt and its answer. Weights and a context of this length, or of
    32,768 tokens, must fit the GPU's memory: MemoryRefused says what would; `force` skips that.

    The model carries the checkpoint's sampling defaults as `model.sampling_defaults`; the
    tokenizer knows every token that ends a turn as `tokenizer.eos_token_ids`.
    """
    choice.require(kernels)
    folder = resolve(path_or_hub_id, revision)
    model, config = load_model(folder, context, force)
    metal.use(model, choice.choose(kernels, model.config))
    generation = read_generation_config(folder)
    model.sampling_defaults = SamplingParams.from_generation_config(generation)
    return model, load_tokenizer(folder, config, generation)


def load_tokenizer(folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Any:
    """mlx-lm's wrapper around the folder's tokenizer, with every end-of-turn token in it."""
    from mlx_lm.tokenizer_utils import load as load_wrapped

    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(
            f"no tokenizer in {folder}", got="no tokenizer.json", expected="tokenizer.json"
        )
    ends: set[int] = set()
    for source in (config, config.get("text_config") or {}, generation):
        value = source.get("eos_token_id")
        ends |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    try:
        tokenizer = load_wrapped(folder, {"trust_remote_code": False}, eos_token_ids=sorted(ends))
    # tokenizers raises bare Exception, transformers whatever the damage leads to.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read",
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="tokenizer.json and tokenizer_config.json as the model's authors made them",
        ) from error
    vocab = tokenizer.get_vocab()
    for name in END_TOKENS:
        if name in vocab:
            tokenizer.add_eos_token(str(vocab[name]))
    return tokenizer


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json` as a dict; empty when there is none."""
    path = folder / "generation_config.json"
    return read_object(path) if path.exists() else {}
