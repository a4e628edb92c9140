"""A faster forward pass for training with the weights of transformers' model, and its MTP layer.

The module has the parameters under transformers' names. The functions here compute the same
numbers, with optional matmuls in bfloat16, tokens sorted by expert, and the last operations only in
rows that have a label.
"""

# B batch, T tokens, Hk/Hv key/value heads, Dk/Dv head dims, E experts, R labelled rows

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5MoeConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeRMSNorm,
)

CHUNK = 16
IGNORE = -100


class Batch(NamedTuple):
    """`ids` and `labels` `[B, T]`, mRoPE `positions` `[3, B, T]`, `skills` `[B]` by number.

    `pixels` holds the patches of all pictures in order, and `grid` `[n, 3]` their sizes, or None.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    skills: Tensor
    pixels: Tensor | None = None
    grid: Tensor | None = None


class MTP(nn.Module):
    """The layer that drafts the token after next; its tensors are named as `mtp.*` on disk."""

    def __init__(self, config: Qwen3_5MoeConfig):
        super().__init__()
        text = config.text_config
        hidden, eps = text.hidden_size, text.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        last = text.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(text, last)])
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps=eps)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=text.initializer_range)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + weight, eps)


class _Inverse(torch.autograd.Function):
    """(I + a)^-1 for strictly lower triangular `a` `[..., C, C]`, by squaring."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        power, result, reach = a, torch.eye(CHUNK) - a, 2
        while reach < CHUNK:
            power = power @ power
            result = torch.baddbmm(
                result.flatten(0, -3), result.flatten(0, -3), power.flatten(0, -3)
            )
            result, reach = result.reshape(a.shape), 2 * reach
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return -(result.mT @ grad @ result.mT)


class _ShortConv(torch.autograd.Function):
    """Causal depthwise convolution `[B, T, C]` with `taps` `[4, C]`."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps)
        out = x * taps[3]
        for i in (1, 2, 3):
            out[:, i:].addcmul_(x[:, :-i], taps[3 - i])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, taps = ctx.saved_tensors
        dx = grad * taps[3]
        dtaps = [(grad * x).flatten(0, 1).sum(0)]
        for i in (1, 2, 3):
            dx[:, :-i].addcmul_(grad[:, i:], taps[3 - i])
            dtaps.insert(0, (grad[:, i:] * x[:, :-i]).flatten(0, 1).sum(0))
        return dx, torch.stack(dtaps)


UPPER = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)


def chunk_gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """q, k `[B, T, Hv, Dk]` normalised, v `[B, T, Hv, Dv]`, g, beta `[B, T, Hv]`; T % 16 == 0."""
    B, T, H, _ = v.shape
    q, k, v = (x.reshape(B, T // CHUNK, CHUNK, H, -1).transpose(2, 3) for x in (q, k, v))
    g, beta = (x.reshape(B, T // CHUNK, CHUNK, H).transpose(2, 3) for x in (g, beta))
    cum = g.cumsum(-1)  # [B, N, H, C]
    decay = (cum[..., None] - cum[..., None, :]).masked_fill(UPPER, float("-inf")).exp()
    k_beta, kt = k * beta[..., None], k.transpose(-1, -2)
    inverse = _Inverse.apply(((k_beta @ kt) * decay).tril(-1))
    u = inverse @ (v * beta[..., None])
    w = inverse @ (k_beta * cum.exp()[..., None])
    inner = (q @ kt) * decay
    q = q * cum.exp()[..., None]
    kt = (k * (cum[..., -1:] - cum).exp()[..., None]).transpose(-1, -2)
    last = cum[..., -1].exp()[..., None, None]
    state, outputs = None, []
    # unbind, because the gradient of an index is a whole tensor of zeros
    parts = (x.unbind(1) for x in (q, kt, u, w, inner, last))
    for q_i, kt_i, u_i, w_i, inner_i, last_i in zip(*parts, strict=True):
        if state is None:
            fresh, out = u_i, inner_i @ u_i
            state = kt_i @ fresh
        else:
            fresh = u_i - w_i @ state
            out = q_i @ state + inner_i @ fresh
            state = state * last_i + kt_i @ fresh
        outputs.append(out)
    return torch.stack(outputs, 1).transpose(2, 3).reshape(B, T, H, -1)


class Forward:
    """Computes the losses of a batch; `dtype` is that of matmuls and of wide activations."""

    def __init__(self, model: nn.Module, mtp: MTP, dtype: torch.dtype = torch.bfloat16):
        self.model, self.mtp, self.dtype = model, mtp, dtype
        self.eps = model.config.text_config.rms_norm_eps
        self.top_k = getattr(model.config.text_config, "num_experts_per_tok", 0)
        self.balance: list[Tensor] = []

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), weight.to(self.dtype))

    def _delta_net(self, layer: nn.Module, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        x = x.to(self.dtype)
        Hk, Hv, Dk, Dv = layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
        mixed = self._linear(x, layer.in_proj_qkv.weight)
        z = self._linear(x, layer.in_proj_z.weight)
        gates = torch.cat((layer.in_proj_b.weight, layer.in_proj_a.weight))
        b, a = self._linear(x, gates).float().chunk(2, -1)
        mixed = F.silu(_ShortConv.apply(mixed.float(), layer.conv1d.weight.squeeze(1).T))
        q, k, v = mixed.split((Hk * Dk, Hk * Dk, Hv * Dv), -1)
        q, k = (t.reshape(B, T, Hk, Dk) for t in (q, k))
        q = q * (torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * Dk**-0.5)
        k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
        q, k = (t.repeat_interleave(Hv // Hk, 2) for t in (q, k))
        g = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
        out = chunk_gated_delta_rule(q, k, v.reshape(B, T, Hv, Dv), g, b.sigmoid())
        out = F.rms_norm(out, (Dv,), layer.norm.weight, self.eps).reshape(B, T, -1)
        return self._linear(out.to(self.dtype) * F.silu(z), layer.out_proj.weight)

    def _attention(self, layer: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, T, Hq * D]` times its gate, before the output projection."""
        B, T, _ = x.shape
        x, D = x.to(self.dtype), layer.head_dim
        q, gate = self._linear(x, layer.q_proj.weight).reshape(B, T, -1, 2 * D).chunk(2, -1)
        k = self._linear(x, layer.k_proj.weight).reshape(B, T, -1, D)
        v = self._linear(x, layer.v_proj.weight).reshape(B, T, -1, D).transpose(1, 2)
        q = _norm(q, layer.q_norm.weight, self.eps).transpose(1, 2)
        k = _norm(k, layer.k_norm.weight, self.eps).transpose(1, 2)
        cos, sin = (t.unsqueeze(1) for t in rope)  # [B, 1, T, rotary]
        R = cos.shape[-1]

        def turn(t: Tensor) -> Tensor:
            t, rest = t[..., :R], t[..., R:]
            half = torch.cat((-t[..., R // 2 :], t[..., : R // 2]), -1)
            return torch.cat((t * cos + half * sin, rest), -1).to(self.dtype)

        num_groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(num_groups, 1) for t in (turn(k), v))
        out = F.scaled_dot_product_attention(turn(q), k, v, is_causal=True)
        return out.transpose(1, 2).reshape(B, T, -1) * gate.reshape(B, T, -1).sigmoid()

    def _experts(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Output for x `[N, H]` float32; each expert runs once, on the rows routed to it."""
        logits = F.linear(x, layer.gate.weight)
        probs = logits.softmax(-1)
        weights, chosen = probs.topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        num_experts = probs.shape[-1]
        flat = chosen.reshape(-1)
        counts = torch.bincount(flat, minlength=num_experts)
        share = counts / len(x)
        self.balance.append(num_experts * (share * probs.mean(0)).sum())

        order = flat.argsort()
        x = x.to(self.dtype)
        runs = x.index_select(0, order // self.top_k).split(counts.tolist())
        gate_up = layer.experts.gate_up_proj.to(self.dtype).unbind(0)
        down = layer.experts.down_proj.to(self.dtype).unbind(0)
        outputs = []
        for run, w_in, w_out in zip(runs, gate_up, down, strict=True):
            gate, up = F.linear(run, w_in).chunk(2, -1)
            outputs.append(F.linear(F.silu(gate) * up, w_out))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        routed = torch.cat(outputs).index_select(0, back).reshape(len(x), self.top_k, -1)
        routed = (routed * weights[..., None].to(self.dtype)).sum(1)

        shared = layer.shared_expert
        gate_up = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
        gate, up = self._linear(x, gate_up).chunk(2, -1)
        out = self._linear(F.silu(gate) * up, shared.down_proj.weight)
        return routed + out * self._linear(x, layer.shared_expert_gate.weight).sigmoid()

    def _mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        if hasattr(layer, "experts"):
            return self._experts(layer, x)
        gate, up = self._linear(x, layer.gate_proj.weight), self._linear(x, layer.up_proj.weight)
        return self._linear(F.silu(gate) * up, layer.down_proj.weight)

    def _layer(self, layer: nn.Module, h: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = _norm(h, layer.input_layernorm.weight, self.eps)
        if layer.block_type == "linear_attention":
            h = h + self._delta_net(layer.linear_attn, x)
        else:
            mixer = layer.self_attn
            h = h + self._linear(self._attention(mixer, x, rope), mixer.o_proj.weight)
        x = _norm(h, layer.post_attention_layernorm.weight, self.eps)
        return h + self._mlp(layer.mlp, x.flatten(0, 1)).reshape(h.shape)

    def embed(self, batch: Batch) -> Tensor:
        """`[B, T, H]` embeddings, with those of pictures in place of their placeholders."""
        h = F.embedding(batch.ids, self.model.model.language_model.embed_tokens.weight)
        if batch.pixels is not None:
            seen = self.model.model.visual(batch.pixels, grid_thw=batch.grid).pooler_output
            at = batch.ids == self.model.config.image_token_id
            h = h.masked_scatter(at[..., None], seen.to(h.dtype))
        return h

    def hidden(self, batch: Batch) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Embeddings and final normed hidden states `[B, T, H]`, and the rope tables."""
        text = self.model.model.language_model
        embedded = h = self.embed(batch)
        rope = text.rotary_emb(h, batch.positions)
        for layer in text.layers:
            h = self._layer(layer, h, rope)
        return embedded, _norm(h, text.norm.weight, self.eps), rope

    def draft(self, embedded: Tensor, h: Tensor, rope, rows: Tensor) -> Tensor:
        """MTP hidden states `[R, H]` at `rows` `[B, T - 1]` bool; row i drafts token i + 2."""
        mtp, layer = self.mtp, self.mtp.layers[0]
        next_token = _norm(embedded[:, 1:], mtp.pre_fc_norm_embedding.weight, self.eps)
        before = _norm(h[:, :-1], mtp.pre_fc_norm_hidden.weight, self.eps)
        x = self._linear(torch.cat((next_token, before), -1), mtp.fc.weight).float()
        rope = tuple(t[:, :-1] for t in rope)
        normed = _norm(x, layer.input_layernorm.weight, self.eps)
        mixed = self._attention(layer.self_attn, normed, rope)[rows]
        x = x[rows] + self._linear(mixed, layer.self_attn.o_proj.weight)
        x = x + self._experts(layer.mlp, _norm(x, layer.post_attention_layernorm.weight, self.eps))
        return _norm(x, mtp.norm.weight, self.eps)

    def logits(self, rows: Tensor) -> Tensor:
        """`[R, V]` float32 of hidden rows."""
        return self._linear(rows, self.model.lm_head.weight).float()

    def losses(self, batch: Batch, with_mtp: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Trunk loss and MTP loss per labelled token, the balance loss, and the skill by token.

        Without the MTP layer its losses are an empty tensor.
        """
        self.balance = []
        embedded, h, rope = self.hidden(batch)
        rows = batch.labels[:, 1:] != IGNORE
        trunk = F.cross_entropy(
            self.logits(h[:, :-1][rows]), batch.labels[:, 1:][rows], reduction="none"
        )
        mtp = trunk.new_zeros(0)
        if with_mtp:
            ahead = F.pad(batch.labels[:, 2:], (0, 1), value=IGNORE)
            ahead_rows = ahead != IGNORE
            drafted = self.logits(self.draft(embedded, h, rope, ahead_rows))
            mtp = F.cross_entropy(drafted, ahead[ahead_rows], reduction="none")
        skills = batch.skills[:, None].expand(rows.shape)[rows]
        return trunk, mtp, sum(self.balance, trunk.new_zeros(())), skills
