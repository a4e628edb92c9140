"""Load a converted folder into the modules: every name and shape is checked, nothing is dropped."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.adapter import read_adapter
from ..checkpoint.headers import SourceTensor, read_headers
from ..checkpoint.names import OF_EXPERTS
from ..checkpoint.pipeline import Pipeline
from ..checkpoint.quantization import Quantization
from ..checkpoint.resolver import Match, Part, Resolved, refuse_other_head
from ..checkpoint.resolver import resolve as resolve_tensors
from ..checkpoint.sharding import Cut, Sharding
from ..checkpoint.tensor_table import Transform
from ..config import read_config
from ..errors import CheckpointError, ConfigError, MemoryRefused, Qwen35Error, first_line
from ..files import read_object
from ..kernels import choice, tiers
from ..kernels.switch import SwitchGLU
from ..machine import parse_memory
from ..media.settings import VisionSettings, read_settings
from ..memory import AUTO, allow_with_kv, kv_choices, room_for_experts, sweep_bytes, wire
from ..sampling import SamplingParams
from ..text.tokenizer import Tokenizer, read_tokenizer
from .adapters import attach_to_model
from .expert_pool import Experts, part_bytes, stack_bytes
from .hub import not_converted, resolve
from .language import Model
from .ring import agreed, group, in_ring, leader, limits, no_adapter
from .shard import read_cut, shard, taken

log = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
# Qwen3.5 ends a turn with the first and a document with the second; both end an answer.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# Lazy arrays of each open file, by name.
Shards = dict[Path, dict[str, mx.array]]


def load_model(
    folder: str | Path,
    context: int | None = None,
    force: bool = False,
    mtp: bool | None = None,
    adapter: str | Path | None = None,
    kv_bits: str | int = AUTO,
    experts_memory: int | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Build the model in `folder` and load its weights; also returns the parsed config.json.

    On the CPU everything becomes float32, because other types are many times slower there. Raises
    ConfigError, CheckpointError or, before any weight is read, MemoryRefused; see `load` for the
    settings. Each process of a `group` reads its part.
    """
    model, raw_config, num_bytes = open_model(Path(folder), mtp, context, experts_memory, group)
    if adapter is not None:
        found = read_adapter(adapter)
        attach_to_model(model, found)
        num_bytes += found.nbytes
    item_bytes = model.language_model.model.norm.weight.dtype.size
    if model.experts:
        num_bytes += sweep_bytes(model.config, context, item_bytes)
    # Only headers have been read so far: MLX reads weights when it evaluates them.
    try:
        model.config, model.allowance = allow_with_kv(
            kv_choices(model.config, kv_bits),
            num_bytes,
            context=context,
            force=force,
            item_bytes=item_bytes,
        )
    except MemoryRefused as refused:
        if mtp is None and model.mtp is not None:
            loaded = load_model(
                folder, context, force, False, adapter, kv_bits, experts_memory, group
            )
            if not loaded[0].experts:
                log.warning("the MTP layer does not fit in memory: it drafts no tokens")
            return loaded
        # Experts from disk need whole experts in one process.
        if mtp or experts_memory is not None or not model.config.is_moe or group is not None:
            raise
        resident = num_bytes - stack_bytes(model)
        for choice in kv_choices(model.config, kv_bits):
            room = room_for_experts(choice, resident, context, item_bytes)
            try:
                loaded = load_model(folder, context, force, False, adapter, kv_bits, max(room, 0))
                break
            except MemoryRefused as error:
                too_little = error
        else:
            raise MemoryRefused(f"{refused}\nwith experts from disk: {too_little}") from None
        log.warning(
            "the weights do not fit in memory: experts are read from disk, except %s",
            loaded[0].experts,
        )
        return loaded
    is_first = group is None or not group.rank()
    # Only now, because each try of the loop above would print it.
    trained = model.config.max_position_embeddings
    if is_first and context is not None and context > trained:
        log.warning(
            "YaRN stretches the context from %s to %s tokens: answers to short texts get worse",
            f"{trained:,}",
            f"{context:,}",
        )
    model.config = replace(model.config, context_limit=model.allowance.context)
    if group is not None:
        model.config = agreed(model.config)
    wire(model.allowance)
    for layer in [*model.layers, *(model.mtp.layers if model.mtp else [])]:
        if not layer.is_linear:
            layer.self_attn.max_scores_bytes = model.allowance.scores_bytes
    mx.eval(model.parameters())
    return model, raw_config


def open_model(
    folder: Path,
    mtp: bool | None = None,
    context: int | None = None,
    experts_memory: int | None = None,
    group: mx.distributed.Group | None = None,
) -> tuple[Model, dict[str, Any], int]:
    """The model in `folder` with unread weights, its config.json, and the bytes of its weights.

    A `context` that is longer than the trained one is reached by YaRN. With `experts_memory`, in
    bytes, only so much of the experts is in memory, and the MTP layer is left out: drafts would
    need more reads of experts than they save.
    """
    raw_config = read_config(folder)
    headers = read_headers(folder)
    found = resolve_tensors(raw_config, headers)
    check_copies(found)
    if not found.is_converted:
        # Do not send the user to `convert` with a folder that it would refuse.
        read_headers(folder, strict=True)
        raise not_converted(folder)
    matches, config = found.text_matches, found.config.stretched_to(context)
    experts = None
    if experts_memory is not None:
        stacks = [match for match in matches if OF_EXPERTS in match.name]
        experts = Experts(config, stacks, experts_memory)
        experts = None if experts.holds_all else experts
    if experts and mtp:
        raise Qwen35Error(
            "the MTP layer cannot be used with experts from disk",
            got=f"mtp=True and memory for {experts.num_slots} of {experts.num_experts} experts",
            expected="mtp=None or False: drafts would cost more time than they save",
            hint="leave --draft mtp out, or have memory for all experts",
        )
    if not experts and loads_mtp(found, mtp):
        matches += found.mtp_matches
    else:
        config = replace(config, num_mtp_layers=0)
    if group is not None and group.rank():
        config = replace(config, num_mtp_layers=0, vision=None)
    model = Model(config)
    if experts:
        for layer in model.layers:
            layer.mlp.switch_mlp = SwitchGLU(
                config.hidden_size, config.moe_intermediate_size, experts.num_slots
            )
        matches = [match for match in matches if OF_EXPERTS not in match.name]
    quantize_modules(model, found.quantizations)
    sharding = None
    if group is not None:
        # The same on every rank, although only rank 0 has the tower and the MTP layer.
        drafting = found.mtp_matches if loads_mtp(found, None) else []
        held = [*found.text_matches, *found.tower_matches, *drafting]
        nbytes = {part.name: part_bytes(part) for match in held for part in match.parts}
        sharding = shard(model, group, nbytes, *limits())
        if sharding.note and not sharding.rank:
            log.warning(sharding.note)
    weights = read_parameters([*matches, *found.tower_matches], sharding)
    num_bytes = sum(array.nbytes for array in weights.values())
    if experts:
        weights |= experts.attach(model)
        num_bytes += experts.nbytes
    model.experts = experts
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    return model, raw_config, num_bytes


def loads_mtp(found: Resolved, wanted: bool | None) -> bool:
    """Whether to load the MTP layer.

    An unquantized one in a quantized model is large, 13 GB in the 397B: only on request.
    """
    if not found.mtp_matches:
        if wanted:
            log.warning("the model has no MTP layer that could draft tokens")
        return False
    is_small = any(m.quantization for m in found.mtp_matches) or not found.quantizations
    return is_small if wanted is None else wanted


def check_copies(found: Resolved) -> None:
    """Refuse a stored head that is tied but differs from the embedding."""
    for head, embedding in found.copies:
        shards: Shards = {}
        if not mx.array_equal(_stored(head, shards), _stored(embedding, shards)).item():
            raise refuse_other_head(head, embedding)


def read_parameters(
    matches: Iterable[Match], sharding: Sharding | Pipeline | None = None
) -> dict[str, mx.array]:
    """Lazy arrays by their names in the model; on the CPU floats become float32.

    With a split, the part of this process, which is read here.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    shards: Shards = {}
    arrays = {}
    for match in matches:
        for part in match.parts:
            if sharding and not sharding.holds(part.name):
                continue
            cut = sharding.cut(part.name) if sharding else None
            array = _assemble(part, match.transform, shards, cut)
            if on_cpu and mx.issubdtype(array.dtype, mx.floating):
                array = array.astype(mx.float32)
            if sharding:
                # One by one, because a cast holds two copies.
                mx.eval(array)
            arrays[sharding.name_here(part.name) if sharding else part.name] = array
    return arrays


def _assemble(part: Part, transform: Transform, shards: Shards, cut: Cut | None) -> mx.array:
    """The rows of a part, cut for this process, and transformed."""
    first, *others = part.segments
    if not others and first.stop_row - first.start_row == first.tensor.num_rows:
        if cut:
            # The transforms do not move the axis of the cut.
            array, cut = read_cut(first.tensor, cut), None
        else:
            array = _stored(first.tensor, shards)
    else:
        rows = [
            _stored(s.tensor, shards).reshape(s.tensor.num_rows, -1)[s.start_row : s.stop_row]
            for s in part.segments
        ]
        array = mx.concatenate(rows).reshape(part.shape)
        array = array if cut is None else taken(array, cut)
    if transform is Transform.ADD_ONE:
        return (array.astype(mx.float32) + 1).astype(array.dtype)
    is_moved = transform in (Transform.TAPS_FIRST, Transform.CHANNELS_LAST)
    return array.moveaxis(1, -1) if is_moved else array


def _stored(tensor: SourceTensor, shards: Shards) -> mx.array:
    """A lazy tensor of a file; `shards`: the open files."""
    if tensor.file not in shards:
        try:
            shard = mx.load(str(tensor.file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{tensor.file.name} cannot be read", got=first_line(error)
            ) from None
        assert isinstance(shard, dict)
        shards[tensor.file] = shard
    return shards[tensor.file][tensor.name]


def quantize_modules(
    model: nn.Module, quantizations: Mapping[str, Quantization], prefix: str = ""
) -> None:
    """Replace each module that is quantized in the files by its quantized class.

    `prefix`: the name of `model` on disk, with its dot, if it is a part of a model.
    """

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        found = quantizations.get(prefix + path)
        return found._asdict() if found else False

    nn.quantize(model, class_predicate=settings)


def load(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    *,
    kernels: str = "auto",
    context: int | None = None,
    force: bool = False,
    mtp: bool | None = None,
    adapter: str | Path | None = None,
    kv_bits: str | int = AUTO,
    experts_memory: int | str | None = None,
) -> tuple[Model, Any]:
    """Model and tokenizer of a converted folder or hub id, as `mlx_lm.load` returns them.

    `kernels`: "ops" runs portable MLX operations, "mlx" MLX's own kernels for the GPU, "metal" the
    kernels of this package. "auto" is ops without Metal, else mlx, and those kernels that are
    correct and faster on this machine; what is not known yet is measured, within seconds.
    `context`: maximum tokens of a prompt and its answer. Weights and a context of this length, or
    of 32,768 tokens, must fit the GPU's memory, or MemoryRefused is raised with the numbers;
    `force` skips the check. A context of up to four times the trained length is reached by YaRN.
    `mtp`: whether to load the MTP layer, which drafts tokens, as `model.mtp`. None leaves it out
    if it does not fit, or is unquantized in a quantized model.
    `adapter`: a folder with an adapter, of `qwen35-mlx train` or mlx-lm; the matrices that it
    changes run without kernels.
    `kv_bits`: 16, 8 or "k8v4" bits for keys and values in caches; "auto" is 16, or 8 if 16 do not
    fit.
    `experts_memory`: bytes, or a text such as "80GB", for experts; others are read from disk when
    a token needs them. None keeps all experts, or as many as fit.

    `model.sampling_defaults` has the checkpoint's sampling parameters, `tokenizer.eos_token_ids`
    every token that ends a turn.
    """
    choice.require(kernels)
    ring = leader() if in_ring() else None
    if ring is not None:
        if adapter is not None:
            raise no_adapter(adapter)
        if experts_memory is not None:
            raise Qwen35Error(
                "experts from disk do not run on several Macs",
                got=f"experts_memory={experts_memory}",
                hint="leave --experts-memory out, or run on one Mac",
            )
        path = os.path.abspath(path_or_hub_id)
        path = path if os.path.isdir(path) else str(path_or_hub_id)
        options = dict(revision=revision, context=context, force=force, kv_bits=kv_bits)
        ring.load(path, options)
    folder = resolve(path_or_hub_id, revision)
    if isinstance(experts_memory, str):
        experts_memory = parse_memory(experts_memory)
    model, config = load_model(
        folder, context, force, mtp, adapter, kv_bits, experts_memory, ring.group if ring else None
    )
    model.ring, chosen = ring, choose(kernels, model)
    tiers.use(model, chosen)
    if ring is not None:
        ring.tell("kernels", base=chosen.base, kernel_rows=dict(chosen.kernel_rows))
    generation = read_generation_config(folder)
    try:
        model.sampling_defaults = SamplingParams.from_generation_config(generation)
    except Qwen35Error as error:
        raise ConfigError(f"{folder / GENERATION_FILE}: {error}") from None
    tokenizer = load_tokenizer(folder, config, generation)
    tokenizer.vision, tokenizer.no_vision = vision_settings(folder, model)
    return model, tokenizer


def load_part(
    path: str, revision: str | None, context: int | None, force: bool, kv_bits: str | int
) -> Model:
    """The part of a rank above 0 of the model that rank 0 loads."""
    folder = resolve(path, revision)
    return load_model(folder, context, force, False, kv_bits=kv_bits, group=group())[0]


def vision_settings(folder: Path, model: Model) -> tuple[VisionSettings | None, str]:
    """The model's picture settings, or the reason why it reads none; text works in any case."""
    if model.vision_tower is None:
        return None, "the model's folder has no vision tower"
    try:
        settings = read_settings(folder)
    except ConfigError as error:
        return None, first_line(error)
    return settings, "" if settings else f"there is no preprocessor_config.json in {folder}"


def choose(kernels: str, model: Model) -> tiers.Tiers:
    """The tiers of a loaded model; `kernels` is auto, ops, mlx or metal."""
    if kernels != choice.AUTO:
        return choice.named(kernels)
    if choice.unavailable():
        return tiers.PORTABLE
    # Imported here because only machines with Metal need it.
    from ..kernels import first_load

    return first_load.tiers_of(model)


def load_tokenizer(
    folder: Path, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> Tokenizer:
    """The folder's tokenizer, with all tokens that end a turn."""
    ends: set[int] = set()
    for source in (config, config.get("text_config") or {}, generation):
        value = source.get("eos_token_id")
        ends |= {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    try:
        tokenizer = read_tokenizer(folder, config, ends)
    except CheckpointError:
        raise
    # `tokenizers` raises bare Exception, and damaged files may raise anything.
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read",
            got=f"{type(error).__name__}: {first_line(error)}",
            expected="tokenizer.json and tokenizer_config.json as the model's authors made them",
        ) from error
    vocab = tokenizer.get_vocab()
    for name in END_TOKENS:
        if name in vocab:
            tokenizer.add_eos_token(vocab[name])
    return tokenizer


def read_generation_config(folder: Path) -> dict[str, Any]:
    """`generation_config.json` as a dict; empty if there is none."""
    path = folder / GENERATION_FILE
    return read_object(path) if path.exists() else {}
