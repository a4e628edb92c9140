"""Read a converted folder into the modules: every name and shape checked, nothing dropped."""

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .config import ModelConfig, read_config
from .errors import CheckpointError, ConfigError
from .model import Model
from .sampling import SamplingParams

# Parts that a folder may carry and the text model does not run.
CARRIED = ("vision_tower.", "visual.", "mtp.", "language_model.mtp.")
CONVERT_HINT = "run: qwen35-mlx convert {folder} OUT"
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
# Qwen3.5 ends a turn with the first and a document with the second; both stop an answer.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
HUB_PATTERNS = ("*.json", "model*.safetensors", "*.jinja", "*.txt")


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; anything shaped like `owner/name` from the hub or its cache."""
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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"cannot get {name} from the hub",
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="a local folder, or a hub id that this machine can reach",
        ) from error


def load_model(folder: str | Path) -> tuple[Model, dict[str, Any]]:
    """Build the model in `folder` and load its weights; also returns the parsed config.json.

    On the CPU everything is float32, whatever the files hold: other types are many times
    slower there. Raises ConfigError or CheckpointError.
    """
    folder = Path(folder)
    raw_config = read_config(folder)
    config = ModelConfig.from_hf(raw_config)
    weights = _read_shards(folder)
    weights = {k: v for k, v in weights.items() if not k.startswith(CARRIED)}
    if any(k.startswith("model.") for k in weights) or "lm_head.weight" in weights:
        raise CheckpointError(
            f"{folder} holds a checkpoint that is not converted",
            got="tensor names as Hugging Face has them",
            expected="names that begin with language_model.",
            hint=CONVERT_HINT.format(folder=folder),
        )
    if config.tie_word_embeddings:
        weights = {k: v for k, v in weights.items() if not k.startswith("language_model.lm_head.")}
    model = Model(config)
    _quantize_modules(model, raw_config, weights)
    _check_names_and_shapes(model, weights, folder)
    if mx.default_device() == mx.Device(mx.cpu):
        weights = {
            k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v
            for k, v in weights.items()
        }
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model, raw_config


def _read_shards(folder: Path) -> dict[str, mx.array]:
    """All tensors of `model*.safetensors`; shards and index must agree."""
    files = sorted(Path(f) for f in glob.glob(str(folder / "model*.safetensors")))
    index = folder / "model.safetensors.index.json"
    weight_map: Mapping[str, str] | None = None
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged", got=repr(error)) from None
        absent = sorted(named - {f.name for f in files})
        if absent:
            raise CheckpointError(
                f"{len(absent)} shard(s) of {folder} are missing",
                got=", ".join(f.name for f in files) or "no shard",
                expected=", ".join(absent),
                hint="download or convert the folder again",
            )
        files = [f for f in files if f.name in named]
    if not files:
        raise CheckpointError(
            f"no weights in {folder}", got="no model*.safetensors", expected="a converted folder"
        )
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            shard = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read",
                got=str(error).splitlines()[0],
                expected="a complete safetensors file",
                hint="the file is probably truncated; download or convert it again",
            ) from None
        assert isinstance(shard, dict)
        weights |= shard
    if weight_map is not None and (lost := sorted(set(weight_map) - set(weights))):
        raise CheckpointError(
            f"{len(lost)} tensor(s) that the index names are in no shard", got=", ".join(lost[:8])
        )
    return weights


def _quantize_modules(
    model: Model, config: Mapping[str, Any], weights: Mapping[str, mx.array]
) -> None:
    """Swap in a quantized module wherever the files hold scales."""
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
        if f"{path}.scales" not in weights or not hasattr(module, "to_quantized"):
            return False
        own = default.get(path)
        chosen = default | own if isinstance(own, dict) else default
        mode = chosen.get("mode", "affine")
        if mode not in MODES:
            raise ConfigError(
                f"quantization mode {mode!r} of {path} is not supported",
                got=repr(mode),
                expected=", ".join(MODES),
            )
        return {"bits": chosen["bits"], "group_size": chosen["group_size"], "mode": mode}

    try:
        nn.quantize(
            model,
            group_size=default["group_size"],
            bits=default["bits"],
            class_predicate=settings,
        )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("quantization settings do not fit the model", got=str(error)) from None


def _check_names_and_shapes(model: Model, weights: Mapping[str, mx.array], folder: Path) -> None:
    expected = dict(tree_flatten(model.parameters()))
    problems = [f"missing: {k} {expected[k].shape}" for k in sorted(expected.keys() - weights)]
    problems += [f"unknown: {k} {weights[k].shape}" for k in sorted(weights.keys() - expected)]
    problems += [
        f"wrong shape: {k} is {weights[k].shape}, expected {v.shape}"
        for k, v in sorted(expected.items())
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        shown = problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json:\n    " + "\n    ".join(shown),
            hint="the folder may be incomplete, or of another model",
        )


def load(path_or_hub_id: str | Path, revision: str | None = None) -> tuple[Model, Any]:
    """Model and tokenizer of a converted folder or hub id, as `mlx_lm.load` returns them.

    The model carries the checkpoint's sampling defaults as `model.sampling_defaults`; the
    tokenizer knows every token that ends a turn as `tokenizer.eos_token_ids`.
    """
    folder = resolve(path_or_hub_id, revision)
    model, config = load_model(folder)
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
        ends |= {int(i) for i in (value if isinstance(value, list) else [value]) if i is not None}
    tokenizer = load_wrapped(folder, {"trust_remote_code": False}, eos_token_ids=sorted(ends))
    vocab = tokenizer.get_vocab()
    for name in END_TOKENS:
        if name in vocab:
            tokenizer.add_eos_token(str(vocab[name]))
    return tokenizer


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json` as a dict; empty when there is none."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON", got=error, expected="a JSON object") from None
    return parsed if isinstance(parsed, dict) else {}
