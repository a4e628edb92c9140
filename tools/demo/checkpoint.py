"""The demo model's configuration, and its folder in the layout of the Qwen3.5 releases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration


def demo_config(
    token_id: Callable[[str], int], vocab_size: int, num_layers: int = 4, hidden: int = 256
) -> Qwen3_5MoeConfig:
    """A configuration with every kind of layer in the 3:1 layout.

    Its dimensions suit groups of 64 and the kernels.
    """
    text = dict(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=32, linear_value_head_dim=64, linear_conv_kernel_dim=4,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, max_position_embeddings=4096,
        eos_token_id=token_id("<|im_end|>"), pad_token_id=token_id("<|endoftext|>"),
        tie_word_embeddings=False, mtp_num_hidden_layers=1,
        rope_parameters=dict(
            rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25,
            mrope_section=[3, 3, 2], mrope_interleaved=True,
        ),
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=8,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=hidden,
        num_position_embeddings=36,
    )  # fmt: skip
    return Qwen3_5MoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=token_id("<|image_pad|>"), video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )  # fmt: skip


def plot(history: list[dict[str, float]], path: Path) -> None:
    """Plot the losses, on a logarithmic axis, over tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not history:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    colours = iter(plt.get_cmap("tab20").colors)
    for key in [k for k in history[-1] if k != "tokens"]:
        seen = [h for h in history if key in h]
        # A point has few answers of each skill, so plot the mean of five points.
        runs = [seen[max(0, i - 4) : i + 1] for i in range(len(seen))]
        losses = [max(sum(h[key] for h in run) / len(run), 1e-5) for run in runs]
        width, colour = (2.2, "black") if key == "loss" else (1.0, next(colours))
        axes.semilogy([h["tokens"] / 1e6 for h in seen], losses, lw=width, color=colour, label=key)
    axes.set(xlabel="tokens seen (millions)", ylabel="answer loss (nats)", title="Demo checkpoint")
    axes.legend(fontsize=7, ncol=2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def mtp_tensors(mtp: torch.nn.Module) -> dict[str, Tensor]:
    """The MTP layer's bf16 tensors, named as in Qwen3.5 releases, one tensor per expert."""
    tensors = {}
    for name, tensor in mtp.state_dict().items():
        tensor = tensor.to(torch.bfloat16)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"mtp.{name}"] = tensor
            continue
        stem = f"mtp.{name.rpartition('.')[0]}"
        for i, expert in enumerate(tensor):
            if name.endswith("down_proj"):
                tensors[f"{stem}.{i}.down_proj.weight"] = expert.clone()
                continue
            for part, half in zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True):
                tensors[f"{stem}.{i}.{part}.weight"] = half.clone()
    return tensors


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def save(model: Any, mtp: torch.nn.Module, out: Path, token_id: Callable[[str], int]) -> None:
    """Write the bf16 checkpoint in the layout of the Qwen3.5 releases (trunk experts fused)."""
    copy = Qwen3_5MoeForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out, save_original_format=False)
    tensors = load_file(out / "model.safetensors") | mtp_tensors(mtp)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "generation_config.json", {
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95,
        "eos_token_id": [token_id("<|im_end|>"), token_id("<|endoftext|>")],
        "pad_token_id": token_id("<|endoftext|>"),
    })  # fmt: skip
    # Every picture is resized to about 48 x 48 pixels: 9 tokens.
    _write(out / "preprocessor_config.json", {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": 48 * 48, "longest_edge": 48 * 48},
        "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    })  # fmt: skip
