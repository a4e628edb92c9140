"""The model card of a converted folder; all its numbers are read from the folder's files."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen35_mlx.checkpoint.headers import read_headers
from qwen35_mlx.checkpoint.resolver import Match, resolve
from qwen35_mlx.config import ModelConfig, read_config
from qwen35_mlx.errors import CheckpointError
from qwen35_mlx.files import read_object
from qwen35_mlx.machine import GIB, default_limit_bytes
from qwen35_mlx.memory import DEFAULT_CONTEXT, count

from .hub import is_repository
from .source import companion_name

FIDELITY_FILE = "fidelity.json"
# Parts of a model, and what the names of their tensors contain; the first match counts.
KINDS = {
    "vision tower": ("vision_tower.",),
    "MTP layer": ("mtp.",),
    "routed experts": (".switch_mlp.",),
    "shared expert": (".shared_expert",),
    "router": (".mlp.gate.",),
    "feed-forward": (".mlp.",),
    "attention": (".self_attn.",),
    "linear attention": (".linear_attn.",),
    "embedding and head": ("embed_tokens.", "lm_head."),
    "norms": ("norm",),
}
# Optional figures of `fidelity`, shown in percent.
SHARES = {
    "calibration_overlap": "overlap of that text with the calibration text",
    "same_tokens": "tokens of an answer before the first difference",
    "identical_answers": "identical answers",
    "valid_tool_calls": "valid tool calls",
    "valid_json": "valid JSON",
}
MAC_GIB = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit"}


def kind_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    return next(kind for kind, parts in KINDS.items() if any(part in name for part in parts))


def sizes_by_kind(matches: Sequence[Match]) -> dict[str, tuple[int, int]]:
    """The number of weights and bytes of each part of the model."""
    sizes = dict.fromkeys(KINDS, (0, 0))
    for match in matches:
        num_weights, num_bytes = sizes[kind := kind_of(match.name)]
        num_bytes += sum(segment.nbytes for part in match.parts for segment in part.segments)
        sizes[kind] = num_weights + math.prod(match.shape), num_bytes
    return {kind: found for kind, found in sizes.items() if found[0]}


def model_card(folder: Path, repo: str, licence: str | None = None) -> str:
    """The card, as Markdown, of a converted folder for the repository `repo`.

    licence: the licence on the hub, for a folder without a licence file. Raises CheckpointError if
    the folder was not written by `convert`.
    """
    config = read_config(folder)
    facts = config.get("qwen35_mlx")
    if not isinstance(facts, dict) or not facts.get("sha256"):
        raise CheckpointError(
            f"{folder} has no record of a conversion", expected="a folder of qwen35-mlx convert"
        )
    found = resolve(config, read_headers(folder))
    sizes = sizes_by_kind(found.matches)
    source = str(facts["source"])
    name = repo.rpartition("/")[2]
    at = f" at revision `{facts['source_revision']}`" if facts.get("source_revision") else ""
    lines = [
        *_front(folder, source, licence, sees="vision tower" in sizes),
        f"# {name}",
        "",
        f"{source}{at}, converted to MLX with qwen35-mlx {facts['version']}.",
        "",
        _settings(facts["settings"], "adapter" in facts),
        "",
        "## Sizes",
        "",
        *_sizes(sizes),
        "",
        *_fidelity(folder),
        "## Requirements",
        "",
        *_needs(found.config, sum(nbytes for _, nbytes in sizes.values())),
        "",
        *_usage(repo),
        "",
        "## Checksums",
        "",
        *table(
            ("file", "SHA-256"), sorted((f"`{n}`", f"`{d}`") for n, d in facts["sha256"].items())
        ),
    ]
    return "\n".join(lines) + "\n"


def _front(folder: Path, source: str, licence: str | None, sees: bool) -> list[str]:
    """The YAML header for the hub."""
    files = sorted(folder.glob("LICENSE*"))
    if files:
        head = files[0].read_text(errors="replace")[:400]
        licence = next((key for text, key in LICENCES.items() if text in head), licence or "other")
    values: dict[str, Any] = {
        "license": licence,
        "license_link": files[0].name if files and licence == "other" else None,
        "base_model": source if is_repository(source) else None,
        "base_model_relation": "quantized" if is_repository(source) else None,
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["mlx", "qwen35-mlx"],
    }
    # JSON strings are valid YAML, whatever they contain.
    given = [f"{key}: {json.dumps(value)}" for key, value in values.items() if value]
    return ["---", *given, "---", ""]


def _settings(settings: Mapping[str, Any], has_adapter: bool) -> str:
    given = ", ".join(f"{k} {v}" for k, v in settings.items() if isinstance(v, str | int | float))
    adapter = " A trained adapter was added to the weights." if has_adapter else ""
    mixed = " The bits differ by tensor: see the sizes." if settings.get("recipe") else ""
    return f"Settings: {given}.{mixed}{adapter}"


def _sizes(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    total = tuple(map(sum, zip(*sizes.values(), strict=True)))
    rows = [
        (kind, f"{num:,}", f"{8 * nbytes / num:.2f}", f"{nbytes / 1e9:.3f}")
        for kind, (num, nbytes) in [*sizes.items(), ("**all**", total)]
    ]
    return table(("part", "weights", "bits per weight", "GB"), rows)


def _fidelity(folder: Path) -> list[str]:
    """The section with the figures of `fidelity --save`; empty without its file."""
    if not (folder / FIDELITY_FILE).exists():
        return []
    found = read_object(folder / FIDELITY_FILE)
    try:
        figures = [
            ("KL(source \\|\\| this), mean of all tokens, nats", f"{found['mean_kl_nats']:.5f}"),
            ("99 % of tokens below, nats", f"{found['p99_kl_nats']:.5f}"),
            ("same most likely token", f"{found['top1_agreement']:.2%}"),
            ("perplexity of the source", f"{found['reference_perplexity']:.4f}"),
            ("perplexity", f"{found['quantized_perplexity']:.4f}"),
        ]
        shares = {label: found.get(key) for key, label in SHARES.items()}
        figures += [(label, f"{share:.1%}") for label, share in shares.items() if share is not None]
        if limit := found["bandwidth_limit_tps"]:
            figures.append((f"bandwidth limit on {found['mac']}, tokens/s", f"{limit:,.0f}"))
        on = f"on {found['num_tokens']:,} tokens of {found['text']}"
        head = f"Compared with {found['reference']} {on}."
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{FIDELITY_FILE} was not written by `fidelity --save`", got=repr(error)
        ) from None
    return ["## Fidelity", "", head, "", *table(("figure", "value"), figures), ""]


def _needs(config: ModelConfig, weight_bytes: int) -> list[str]:
    """The smallest Mac that runs the model within macOS's default GPU limit, and the memory."""
    context = min(DEFAULT_CONTEXT, config.context_length)
    fitting = [
        (size, needed)
        for size in MAC_GIB
        if (needed := count(config, weight_bytes, context, default_limit_bytes(size * GIB)).total)
        <= default_limit_bytes(size * GIB)
    ]
    if not fitting:
        return [f"More memory than the GPU limit of a Mac with {MAC_GIB[-1]} GB."]
    size, needed = fitting[0]
    return [
        f"A Mac with Apple silicon and {size} GB of memory. With a context of {context:,} tokens, "
        f"the model takes {needed / 1e9:.1f} GB (computed, not measured)."
    ]


def _usage(repo: str) -> list[str]:
    return [
        "## How to run it",
        "",
        "With qwen35-mlx, including pictures and speculative decoding if the model has them:",
        "",
        *_code(f"qwen35-mlx chat {repo}", f"qwen35-mlx serve {repo}"),
        "",
        "With mlx-lm, text only:",
        "",
        *_code("pip install mlx-lm", f"mlx_lm.chat --model {repo}"),
        "",
        f"In LM Studio: search for `{repo}` and choose the MLX model, or `lms get {repo}`.",
    ]


def _code(*lines: str) -> list[str]:
    return ["```", *lines, "```"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def files_of(folder: Path) -> dict[str, str]:
    """The files of a converted folder by name, with their SHA-256 if known, otherwise ""."""
    listed = read_config(folder).get("qwen35_mlx", {}).get("sha256", {})
    # The names come from a file: companion_name keeps them inside the folder.
    checksums = {companion_name(Path(name)): digest for name, digest in listed.items()}
    names = sorted({*checksums, "config.json", FIDELITY_FILE})
    return {name: checksums.get(name, "") for name in names if (folder / name).is_file()}
