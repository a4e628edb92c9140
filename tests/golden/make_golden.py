"""Make the golden files: tiny checkpoints and what transformers computes from them.

Needs torch and transformers, which the tests that read the files do not. Each case is a folder
with a Hugging Face checkpoint in float32 and `golden.npz`:

    ids [T]                    a random prompt, then the tokens that greedy decoding adds to it
    num_prompt_tokens []       where the second part begins
    prefill_logits [T, V]      all of ids in one forward pass
    decode_logits [64, V]      prefill of the prompt, then one token at a time; row i predicts
                               ids[num_prompt_tokens + i]
    batch_ids [3, Tb]          rows of different lengths, padded on the left with token 0
    left_padding [3]           number of pads in each row
    batch_logits [R, V]        the real positions of the padded batch, row after row
    batch_next_ids [3, 2]      two more tokens of each row, decoded one at a time
    batch_next_logits [3, 2, V]

`golden_ops.npz` holds two operations alone: see `gated_delta_rule_case` and `rope_case`. The folder
`vision` has a picture and a video instead: see `vision_case`.
"""

# B batch, T tokens, V vocabulary, Hk/Hv key/value heads, Dk/Dv head dims

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeTextRotaryEmbedding,
    apply_rotary_pos_emb,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

HERE = Path(__file__).parent
NUM_PROMPT, NUM_GREEDY = 70, 64
# A random prompt is drawn again until no decision of the reference is closer than this:
# float32 noise between two correct implementations is about 3e-5.
MIN_TOKEN_MARGIN, MIN_ROUTER_MARGIN = 5e-3, 1e-3
# Moving every weight moves the logits about so many times as far as another order of sums.
JITTER_GAIN = 4

# model_type -> its config class and model class; the flat text-only exports come last.
FAMILY: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3_5_moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
}
FLAT = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")

# Of the folder `vision`: more rows than positions, and placeholders that the vocabulary has.
TOWER = dict(
    depth=2,
    hidden_size=24,
    intermediate_size=40,
    num_heads=1,
    patch_size=2,
    num_position_embeddings=25,
)
VISION = TOWER | dict(depth=1, hidden_size=8, intermediate_size=16, num_position_embeddings=4)
VISION_IDS = dict(
    vision_start_token_id=48, vision_end_token_id=49, image_token_id=50, video_token_id=51
)

COMMON = dict(
    vocab_size=53,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=16,
    max_position_embeddings=512,
)

LINEAR, FULL = "linear_attention", "full_attention"

# folder -> model_type, text config, and whether the experts are fused on disk
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "dense": (
        "qwen3_5",
        COMMON
        | dict(
            num_hidden_layers=4,
            intermediate_size=32,
            tie_word_embeddings=True,
            layer_types=[LINEAR, LINEAR, LINEAR, FULL],
            rope_parameters=dict(
                rope_type="default",
                rope_theta=1e7,
                partial_rotary_factor=0.25,
                mrope_interleaved=True,
                mrope_section=[1, 1, 0],
            ),
        ),
        True,
    ),
    "moe": (
        "qwen3_5_moe",
        COMMON
        | dict(
            num_hidden_layers=3,
            num_key_value_heads=1,
            linear_value_head_dim=8,
            linear_key_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            tie_word_embeddings=False,
            layer_types=[LINEAR, LINEAR, FULL],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
        ),
        True,
    ),
    "yarn": (
        "qwen3_5_moe_text",
        COMMON
        | dict(
            vocab_size=47,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            linear_num_value_heads=6,
            linear_key_head_dim=16,
            linear_value_head_dim=8,
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            tie_word_embeddings=False,
            layer_types=[FULL, LINEAR, FULL, LINEAR],
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                partial_rotary_factor=1.0,
                factor=4.0,
                original_max_position_embeddings=128,
            ),
        ),
        False,
    ),
    "next": (
        "qwen3_next",
        COMMON
        | dict(
            vocab_size=43,
            hidden_size=24,
            num_hidden_layers=4,
            num_key_value_heads=1,
            linear_num_key_heads=3,
            linear_num_value_heads=6,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=20,
            tie_word_embeddings=False,
            layer_types=[LINEAR, LINEAR, LINEAR, FULL],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25),
        ),
        False,
    ),
}


def build(
    model_type: str,
    text_config: dict[str, Any],
    rng: np.random.Generator,
    vision: dict[str, Any] = VISION,
    **ids: int,
) -> Any:
    """The official model in float32 on the CPU, with weights moved off their defaults."""
    config_class, model_class = FAMILY[model_type]
    if model_type in FLAT:
        config = config_class(**text_config)
    else:
        config = config_class(
            text_config=text_config,
            vision_config=vision | {"out_hidden_size": text_config["hidden_size"]},
            tie_word_embeddings=text_config["tie_word_embeddings"],
            **ids,
        )
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    randomize_weights(model, rng)
    return model


@torch.no_grad()
def randomize_weights(model: PreTrainedModel, rng: np.random.Generator) -> None:
    """Draw every weight so that each one matters and the logits have a standard deviation near 1.

    Untouched, a new model has norms at zero, a uniform router and decays that forget at once:
    an implementation that drops any of them would pass.
    """
    for name, parameter in sorted(model.named_parameters()):
        noise = rng.standard_normal(parameter.shape)
        fan_in = parameter.shape[-1]
        if name.endswith("linear_attn.norm.weight"):
            value = 1 + 0.3 * noise
        elif name.endswith(("norm.weight", "layernorm.weight")):
            value = 0.3 * noise
        elif name.endswith("A_log"):
            # Slower than real ones: where a state decays at once, a tiny output is normalised and
            # the reference loses its own last digits.
            value = np.log(rng.uniform(0.02, 1, parameter.shape))
        elif name.endswith("dt_bias"):
            value = noise - 1
        elif name.endswith("conv1d.weight"):
            value = 0.5 * noise
        elif name.endswith("mlp.gate.weight"):
            value = 2 * noise / fan_in**0.5
        else:
            value = noise / fan_in**0.5
        parameter.copy_(torch.from_numpy(value))


@torch.no_grad()
def randomize_tower(model: PreTrainedModel, rng: np.random.Generator) -> None:
    """The same for the vision tower, with features of a standard deviation near 1."""
    for name, parameter in sorted(model.model.visual.named_parameters()):
        noise = rng.standard_normal(parameter.shape)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "pos_embed" in name:
            value = noise
        else:
            value = 1.5 * noise / (noise.size / len(noise)) ** 0.5
        parameter.copy_(torch.from_numpy(value))


def jittered(model: Any, rng: np.random.Generator) -> "Reference":
    """A copy of the model whose weights differ by about one part in 2**23.

    What it moves the logits by, divided by JITTER_GAIN, is what another order of sums may do.
    """
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data *= torch.from_numpy(1 + 2.0**-23 * rng.standard_normal(parameter.shape))
    return Reference(model)


class Reference:
    """The official forward pass; remembers how close its routers came to another choice."""

    def __init__(self, model: Any):
        self.model = model
        self.min_router_margin = float("inf")
        for module in model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._watch_router)

    def _watch_router(self, router: Any, _: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        if router.top_k < router.num_experts:
            ordered = outputs[0].sort(dim=-1, descending=True).values
            margin = ordered[:, router.top_k - 1] - ordered[:, router.top_k]
            self.min_router_margin = min(self.min_router_margin, margin.min().item())

    @torch.no_grad()
    def __call__(self, ids: Any, cache: Any = None, **kwargs: Any) -> tuple[np.ndarray, Any]:
        """Logits [B, T, V] of ids [B, T], and the cache for the next call."""
        out = self.model(
            input_ids=torch.as_tensor(np.asarray(ids)),
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        )
        return out.logits.numpy(), out.past_key_values

    def greedy(self, prompt: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [num_tokens] that follow the prompt, and the logits that chose each of them."""
        logits, cache = self(prompt[None])
        tokens, rows = [], []
        while True:
            rows.append(logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
            if len(tokens) == num_tokens:
                return np.array(tokens, np.int32), np.stack(rows)
            logits, cache = self([[tokens[-1]]], cache)

    def padded_batch(
        self, ids: np.ndarray, left_padding: np.ndarray, next_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits [B, T, V] of a left-padded batch and [B, N, V] of N tokens decoded after it."""
        mask = (np.arange(ids.shape[1]) >= left_padding[:, None]).astype(np.int64)
        logits, cache = self(ids, attention_mask=torch.from_numpy(mask))
        steps = []
        for step in next_ids.T:
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
            row, cache = self(step[:, None], cache, attention_mask=torch.from_numpy(mask))
            steps.append(row)
        return logits, np.concatenate(steps, axis=1)


def token_margin(logits: np.ndarray) -> np.ndarray:
    """Distance between the two largest logits of each row."""
    top = np.sort(logits, axis=-1)
    return top[..., -1] - top[..., -2]


def model_case(model: Any, vocab_size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Everything in golden.npz, from the first prompt without a near tie."""
    while True:
        reference = Reference(model)
        prompt = rng.integers(vocab_size, size=NUM_PROMPT, dtype=np.int32)
        tokens, decode_logits = reference.greedy(prompt, NUM_GREEDY)
        ids = np.concatenate([prompt, tokens])
        prefill_logits = reference(ids[None])[0][0]
        if token_margin(decode_logits).min() < MIN_TOKEN_MARGIN:
            continue
        if reference.min_router_margin > MIN_ROUTER_MARGIN and len(set(tokens)) > NUM_GREEDY // 4:
            break
    left_padding = np.array([0, 62, 34], np.int32)
    batch_ids = rng.integers(vocab_size, size=(3, 67), dtype=np.int32)
    real = np.arange(67) >= left_padding[:, None]
    batch_ids[~real] = 0
    next_ids = rng.integers(vocab_size, size=(3, 2), dtype=np.int32)
    batch_logits, next_logits = reference.padded_batch(batch_ids, left_padding, next_ids)
    return dict(
        ids=ids,
        num_prompt_tokens=np.array(NUM_PROMPT),
        prefill_logits=prefill_logits,
        decode_logits=decode_logits,
        batch_ids=batch_ids,
        left_padding=left_padding,
        batch_logits=batch_logits[real],
        batch_next_ids=next_ids,
        batch_next_logits=next_logits,
    )


def gated_delta_rule_case(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs and outputs of the recurrent and the chunked form, both L2-normalising q and k.

    q, k [B, T, Hk, Dk] are stored before the normalisation and before the Dk**-0.5 on q;
    v [B, T, Hv, Dv]; g (log decay) and beta [B, T, Hv]; states in our order [B, Hv, Dv, Dk]
    (transformers has [B, Hv, Dk, Dv]).
    """
    batch, length, hk, hv, dk, dv = 2, 67, 1, 2, 16, 8
    inputs = dict(
        q=rng.standard_normal((batch, length, hk, dk)),
        k=rng.standard_normal((batch, length, hk, dk)),
        v=rng.standard_normal((batch, length, hv, dv)),
        g=-np.exp(rng.uniform(-5, 1, (batch, length, hv))),
        beta=rng.uniform(0.02, 0.98, (batch, length, hv)),
    )
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    state = 0.5 * rng.standard_normal((batch, hv, dv, dk)).astype(np.float32)
    q, k, v, g, beta = (torch.from_numpy(array) for array in inputs.values())
    result = inputs | {"initial_state": state}
    forms = torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule
    for name, form in zip(("recurrent", "chunk"), forms, strict=True):
        out, final = form(
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=torch.from_numpy(state).transpose(2, 3).contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        result[f"{name}_out"] = out.numpy()
        result[f"{name}_final_state"] = final.transpose(2, 3).contiguous().numpy()
    return result


def rope_case(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rotary embedding with the released models' 64 dims and theta, up to the last positions.

    x [P, 64] turned at positions [P], by the default type and by YaRN to four times 262144.
    """
    positions = np.array([0, 1, 1000, 100_003, 262_143, 1_000_001], np.int32)
    x = rng.standard_normal((len(positions), 64)).astype(np.float32)
    result = {"rope_positions": positions, "rope_x": x}
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=262_144)
    for name, kind in (("default", dict(rope_type="default")), ("yarn", yarn)):
        config = Qwen3_5MoeTextConfig(
            head_dim=64,
            max_position_embeddings=4 * 262_144,
            rope_parameters=kind | dict(rope_theta=1e7, partial_rotary_factor=1.0),
        )
        rows = torch.from_numpy(x)[None, None]
        at = torch.from_numpy(positions)[None, None].expand(3, 1, -1)
        cos, sin = Qwen3_5MoeTextRotaryEmbedding(config)(rows, at)
        result[f"rope_{name}_out"] = apply_rotary_pos_emb(rows, rows, cos, sin)[0][0, 0].numpy()
    return result


def save_checkpoint(model: Any, folder: Path, *, fused_experts: bool, **kwargs: Any) -> None:
    """Write config.json and *.safetensors as `save_pretrained` does, and nothing else."""
    model.save_pretrained(folder, save_original_format=not fused_experts, **kwargs)
    (folder / "generation_config.json").unlink(missing_ok=True)


@torch.no_grad()
def vision_case(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A prompt with a picture of 6 x 4 patches and a video of two frame groups of 2 x 6.

    ids [T], positions [3, T] and logits [T, V]; patches [N, 3 * 2 * p * p], grid [3] and features
    [N / 4, H] of either. Both frames of the picture are equal.
    """

    def patches(num_patches: int, is_picture: bool) -> torch.Tensor:
        pixels = rng.standard_normal((num_patches, 3, 2, 4)).astype(np.float32)
        if is_picture:
            pixels[:, :, 1] = pixels[:, :, 0]
        return torch.from_numpy(pixels.reshape(num_patches, -1))

    start, end, picture, video = VISION_IDS.values()
    text = rng.integers(48, size=(4, 5)).tolist()
    group = [start, *[video] * 3, end]
    ids = [*text[0], start, *[picture] * 6, end, *text[1], *group, *text[2], *group, *text[3]]
    grids = {"picture": [1, 6, 4], "video": [2, 2, 6]}
    shown = {name: patches(int(np.prod(g)), name == "picture") for name, g in grids.items()}
    types = [{picture: 1, video: 2}.get(i, 0) for i in ids]
    inputs = dict(
        input_ids=torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([types], dtype=torch.int32),
        image_grid_thw=torch.tensor([grids["picture"]]),
        video_grid_thw=torch.tensor([grids["video"]]),
    )
    positions, _ = model.model.get_rope_index(**inputs)
    pixels = dict(pixel_values=shown["picture"], pixel_values_videos=shown["video"])
    case = {
        "ids": np.array(ids),
        "positions": positions[:, 0].numpy(),
        "logits": model(**inputs, **pixels).logits[0].numpy(),
    }
    for name, grid in grids.items():
        features = model.model.visual(shown[name], grid_thw=torch.tensor([grid])).pooler_output
        case |= {
            f"{name}_patches": shown[name].numpy(),
            f"{name}_grid": np.array(grid),
            f"{name}_features": features.numpy(),
        }
    return case


def write_vision(rng: np.random.Generator) -> None:
    """The folder `vision`: two layers of text behind a tower, all frequencies rotated."""
    model_type, text_config, fused = CASES["dense"]
    rope = dict(rope_theta=1e4, partial_rotary_factor=1.0, mrope_section=[3, 3, 2])
    text_config = text_config | dict(
        layer_types=[LINEAR, FULL],
        num_hidden_layers=2,
        rope_parameters=text_config["rope_parameters"] | rope,
    )
    model = build(model_type, text_config, rng, TOWER, **VISION_IDS)
    randomize_tower(model, rng)
    save_checkpoint(model, HERE / "vision", fused_experts=fused)
    np.savez(HERE / "vision" / "golden.npz", **vision_case(model, rng))


def main() -> None:
    """Write every case next to this file."""
    # One thread: the order of the sums, and so the last bit, does not depend on the machine.
    torch.set_num_threads(1)
    for seed, (folder, (model_type, text_config, fused)) in enumerate(CASES.items()):
        rng = np.random.default_rng(seed)
        model = build(model_type, text_config, rng)
        save_checkpoint(model, HERE / folder, fused_experts=fused)
        case = model_case(model, text_config["vocab_size"], rng)
        np.savez(HERE / folder / "golden.npz", **case)
        noise = np.abs(case["prefill_logits"][NUM_PROMPT - 1 : -1] - case["decode_logits"]).max()
        files = {path.name: path.stat().st_size for path in sorted((HERE / folder).iterdir())}
        summary = {"case": folder, "logit_std": round(float(case["prefill_logits"].std()), 3)}
        print(json.dumps(summary | {"reference_noise": float(noise), "files": files}))
    write_vision(np.random.default_rng(98))
    rng = np.random.default_rng(99)
    np.savez(HERE / "golden_ops.npz", **gated_delta_rule_case(rng), **rope_case(rng))


if __name__ == "__main__":
    main()
