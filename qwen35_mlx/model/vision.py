"""The vision tower: patches of a picture or video to features, one per placeholder token.

F frame groups (1 for a picture), P patches of a group, N = F * P, h x w their grid, p side of a
patch, V hidden size, D head dim, H hidden size of the text model. Patches that are merged are
adjacent: the order is (h / m, w / m, m, m).
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import VisionConfig
from ..errors import Qwen35Error
from ..memory import VISION_CHUNK_BYTES
from .attention import attend

# Of the reference, for every size; it is not in config.json.
NORM_EPS = 1e-6
# Head dims for which MLX's attention on the GPU is fused, for any number of queries.
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)


class VisionTower(nn.Module):
    """Patch embedding, blocks of attention within a frame group, and a merger of m x m patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    def __call__(self, patches: mx.array, grid: tuple[int, int, int]) -> mx.array:
        """Patches `[N, C * p * p]` of a picture, `[N, C * T * p * p]` of a video -> `[N / m^2, H]`.

        `grid` is (F, h, w). A group has T frames of a video; a picture counts as T equal frames.
        """
        num_groups, height, width = grid
        merge = self.config.spatial_merge_size
        if len(patches) != num_groups * height * width or height % merge or width % merge:
            raise Qwen35Error(
                "the patches do not fit their grid",
                got=f"{len(patches)} patches for {grid}",
                expected=f"rows and columns that are multiples of {merge}, a patch for each cell",
            )
        x = self.patch_embed(patches).reshape(num_groups, height * width, -1)
        x = (x + self._positions(height, width)).astype(self.patch_embed.proj.weight.dtype)
        # Otherwise MLX holds the inputs of x until the first block ends.
        mx.eval(x)
        angles = rotary_angles(height, width, self.config)
        tables = mx.cos(angles), mx.sin(angles)
        for block in self.blocks:
            x = block(x, tables)
            # Block by block: this bounds the memory, and Ctrl-C works.
            mx.eval(x)
        return self.merger(x.reshape(len(patches), -1))

    def _positions(self, height: int, width: int) -> mx.array:
        """The square of embeddings, interpolated bilinearly to the grid, `[P, V]` fp32."""
        taps, weights = interpolation(height, width, self.config)
        return sum(
            self.pos_embed(mx.array(tap)).astype(mx.float32) * mx.array(weight)[:, None]
            for tap, weight in zip(taps, weights, strict=True)
        )


class PatchEmbed(nn.Module):
    """A convolution with stride = kernel size, computed as a matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        # Holds the weight `[V, T, p, p, C]` as it is on disk.
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, size, size)

    def __call__(self, patches: mx.array) -> mx.array:
        """`[N, C * p * p]` or `[N, C * T * p * p]` -> `[N, V]` in float32."""
        # float32: bfloat16 would round pixels, and the sum of weights below.
        weight = self.proj.weight.astype(mx.float32).transpose(0, 4, 1, 2, 3)
        if patches.shape[1] * weight.shape[2] == weight[0].size:
            # All frames of a picture are equal: one product with the sum of their weights.
            weight = weight.sum(axis=2)
        weight = weight.reshape(len(weight), -1)
        if patches.shape[1] != weight.shape[1]:
            raise Qwen35Error(
                "the patches do not fit the vision tower",
                got=f"{patches.shape[1]} numbers a patch",
                expected=f"{self.proj.weight[0].size}, or those of one frame",
            )
        return mx.addmm(self.proj.bias.astype(mx.float32), patches, weight.T)


class VisionBlock(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual; all with bias."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, tables: tuple[mx.array, mx.array]) -> mx.array:
        """`[F, P, V]` -> the same."""
        x = x + self.attn(self.norm1(x), tables)
        # In chunks of rows, to bound the wide activations.
        rows = x.reshape(-1, x.shape[-1])
        chunk = max(1, VISION_CHUNK_BYTES // (self.mlp.width * x.itemsize))
        if len(rows) <= chunk:
            return x + self.mlp(self.norm2(x))
        chunks = []
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            chunks.append(part + self.mlp(self.norm2(part)))
            mx.eval(chunks[-1])
        return mx.concatenate(chunks).reshape(x.shape)


class VisionAttention(nn.Module):
    """Attention between all patches of a picture, or of a frame group."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self._num_heads, self._head_dim = config.num_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, tables: tuple[mx.array, mx.array]) -> mx.array:
        """`[F, P, V]`, rotated by cosines and sines `[P, D / 2]` -> `[F, P, V]`."""
        num_groups, num_patches, width = x.shape
        heads = self.qkv(x).reshape(num_groups, num_patches, 3, self._num_heads, -1)
        # [3, F, heads, P, D]
        heads = heads.transpose(2, 0, 3, 1, 4)
        q, k = rotated(heads[:2], *tables)
        v, scale = heads[2], self._head_dim**-0.5
        if makes_no_scores(self._head_dim):
            out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            # Otherwise every block of queries copies the values.
            v = mx.contiguous(v)
            out = attend(q, k, v, scale, None, VISION_CHUNK_BYTES)
        return self.proj(out.swapaxes(1, 2).reshape(num_groups, num_patches, width))


def makes_no_scores(head_dim: int) -> bool:
    """Whether MLX has a fused kernel for heads of this size, on the device in use."""
    return mx.default_device() == mx.Device(mx.gpu) and head_dim in FUSED_HEAD_DIMS


def rotated(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotate x `[..., P, D]` by cosines and sines `[P, D / 2]`; dim i pairs with i + D / 2."""
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate(_rotated_halves(first, second, cosines, sines), axis=-1)


@partial(mx.compile, shapeless=True)
def _rotated_halves(
    first: mx.array, second: mx.array, cosines: mx.array, sines: mx.array
) -> list[mx.array]:
    """Rotate in float32, without keeping float32 copies."""
    a, b = first.astype(mx.float32), second.astype(mx.float32)
    turned = a * cosines - b * sines, b * cosines + a * sines
    return [half.astype(first.dtype) for half in turned]


class VisionMLP(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.width = width
        self.linear_fc1 = nn.Linear(hidden_size, width)
        self.linear_fc2 = nn.Linear(width, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """`[..., V]` -> the same."""
        return self.linear_fc2(nn.gelu_approx(self.linear_fc1(x)))


class PatchMerger(nn.Module):
    """Merges m x m neighbouring patches into the feature of one token; with the exact GELU."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self._width = config.hidden_size * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.linear_fc1 = nn.Linear(self._width, self._width)
        self.linear_fc2 = nn.Linear(self._width, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """`[N, V]` -> `[N / m^2, H]`."""
        x = self.norm(x).reshape(-1, self._width)
        return self.linear_fc2(nn.gelu(self.linear_fc1(x)))


def interpolation(height: int, width: int, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Four rows of the embedding square per patch `[4, P]` and their weights `[4, P]`, fp32.

    The corners of the square are aligned with those of the grid.
    """

    def axis(num_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        last = config.grid_size - 1
        at = np.arange(num_cells, dtype=np.float32) * np.float32(last / max(num_cells - 1, 1))
        # Rounding may move the last one out of the square.
        low = np.minimum(np.floor(at).astype(np.int32), last)
        return low, np.minimum(low + 1, last), at - low

    (top, bottom, down), (left, right, across) = axis(height), axis(width)
    rows = [(top, 1 - down), (bottom, down)]
    columns = [(left, 1 - across), (right, across)]
    taps = [row[:, None] * config.grid_size + column for row, _ in rows for column, _ in columns]
    weights = [a[:, None] * b for _, a in rows for _, b in columns]
    order = block_order(height, width, config.spatial_merge_size)
    return (
        np.stack([tap.reshape(-1)[order] for tap in taps]),
        np.stack([weight.reshape(-1)[order] for weight in weights]),
    )


def rotary_angles(height: int, width: int, config: VisionConfig) -> mx.array:
    """Angles `[P, D / 2]` in fp32: one half of the frequencies for the row, one for the column."""
    order = block_order(height, width, config.spatial_merge_size)
    exponents = np.arange(0, config.head_dim // 2, 2) / (config.head_dim // 2)
    frequencies = (1 / config.rope_theta**exponents).astype(np.float32)
    row, column = order // width, order % width
    angles = [axis[:, None].astype(np.float32) * frequencies for axis in (row, column)]
    return mx.array(np.concatenate(angles, axis=1))


def block_order(height: int, width: int, merge: int) -> np.ndarray:
    """Row-major indices of the grid, in the order of the patches."""
    places = np.arange(height * width).reshape(height // merge, merge, width // merge, merge)
    return places.swapaxes(1, 2).reshape(-1)
