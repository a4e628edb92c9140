"""Initial weights of the demo model, which already contain induction heads.

Induction heads (https://arxiv.org/abs/2209.11895) predict what followed the same word earlier. Two
layers have to learn them together, for which a small model needs millions of tokens. Here they are
set at the start: the first layer stores at each token the two before it, and recalls what followed
the token last time; the attention looks for positions whose stored tokens are the latest ones, and
reads the words there. Training may change all of it.
"""

import math

import torch
from torch import Tensor, nn

# Standard deviation of an embedding's components; initial outputs of heads are about as long.
SPREAD = 0.05
# Decay rates of the delta rule's heads without a set task, which remember 3 to 500 tokens.
FASTEST, SLOWEST = 0.3, 0.002


@torch.no_grad()
def initialize(model: nn.Module) -> None:
    """Overwrite transformers' initial values, which only serve until weights are loaded.

    The embedding and the head are one tensor during training and two in the checkpoint. Else the
    model would have to learn twice, for every single word, to copy it.
    """
    text = model.model.language_model
    H = text.embed_tokens.weight.shape[1]
    basis = torch.linalg.qr(torch.randn(H, H))[0]
    common, basis = basis[0], basis[1:]  # `common` is in all words, as a bias for the gates
    text.embed_tokens.weight.normal_(std=SPREAD).add_(common * SPREAD * math.sqrt(H))
    model.lm_head.weight = text.embed_tokens.weight
    first = True
    for layer in text.layers:
        if layer.block_type == "linear_attention":
            _delta_net(layer.linear_attn, common, basis, first)
            first = False
        else:
            _attention(layer.self_attn, basis)
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.shared_expert.down_proj.weight.zero_()
        else:
            layer.mlp.down_proj.weight.zero_()
    for name, p in model.model.visual.named_parameters():
        if p.ndim > 1:
            p.normal_(std=0.5 if "pos_embed" in name else p[0].numel() ** -0.5)


def _delta_net(layer: nn.Module, common: Tensor, basis: Tensor, lookup: bool) -> None:
    Hk, Hv, Dk, Dv = layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    by_common = common * math.sqrt(2 / len(common))  # 1 on the normed embedding of any word
    layer.in_proj_z.weight.normal_(std=0.02).add_(2 * by_common)
    layer.in_proj_b.weight.normal_(std=0.02).add_(3 * by_common)
    layer.in_proj_a.weight.normal_(std=0.02)
    q, k, v = layer.in_proj_qkv.weight.split((Hk * Dk, Hk * Dk, Hv * Dv))
    order = torch.randperm(len(basis))
    q.copy_(basis[order[: Hk * Dk]])
    k.copy_(q)  # a query matches keys with the same words
    conv = layer.conv1d.weight.squeeze(1).uniform_(-0.1, 0.1)
    q_taps, k_taps, v_taps = conv.split((Hk * Dk, Hk * Dk, Hv * Dv))
    q_taps[:, 3] += 1
    rates = torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), Hv)
    layer.out_proj.weight.zero_()
    if lookup:
        k_taps[: Hk // 2 * Dk, 2] += 1  # the key of a value is the token before it
        k_taps[Hk // 2 * Dk :, 3] += 1
        rates = torch.where(torch.arange(Hv) < Hv // 2, SLOWEST, 8.0)
        for head in range(Hv):
            rows = slice(head * Dv, (head + 1) * Dv)
            if head < Hv // 2:
                v[rows] = read = _words(basis, Dv, head)
                v_taps[rows, 3] += 1
                layer.out_proj.weight[:, rows] = read.T * SPREAD / 4
            else:
                back = 1 + head % 2
                v[rows] = _words(basis, Dv, 0)
                v_taps[rows, 3 - back] += 1
                layer.out_proj.weight[:, rows] = _note(basis, Dv, back).T * SPREAD
    else:
        k_taps[:, 2:] += 0.5
        v_taps[:, 3] += 1
        v.copy_(basis[torch.randperm(len(basis))].repeat(2, 1)[: len(v)])
    layer.A_log.fill_(math.log(4))
    layer.dt_bias.copy_((rates / 4).expm1().log())  # the inverse of softplus


def _words(basis: Tensor, count: int, part: int) -> Tensor:
    """`[count, H]`: a projection that reads one of two parts of a word."""
    return basis[:count] if part % 2 == 0 else basis[-count:]


def _note(basis: Tensor, count: int, back: int) -> Tensor:
    """`[count, H]`: the directions that store the token `back` positions before."""
    return basis[back * count : (back + 1) * count]


def _attention(layer: nn.Module, basis: Tensor) -> None:
    """Heads of even groups look for the latest token, of odd ones for the latest two."""
    D = layer.head_dim
    layer.q_proj.weight.normal_(std=0.02)
    q = layer.q_proj.weight.view(-1, 2 * D, layer.q_proj.in_features)[:, :D]
    k = layer.k_proj.weight.view(-1, D, layer.k_proj.in_features)
    v = layer.v_proj.weight.view(k.shape)
    o = layer.o_proj.weight.view(-1, len(q), D)
    num_groups = len(q) // len(k)
    words, last, before = _words(basis, D, 0), _note(basis, D, 1), _note(basis, D, 2)
    for i in range(len(k)):
        heads = slice(i * num_groups, (i + 1) * num_groups)
        v[i] = _words(basis, D, i)
        o[:, heads] = v[i].T[:, None] * SPREAD
        k[i], q[heads] = last, words
        if i % 2:
            k[i, D // 2 :], q[heads, D // 2 :] = before[: D // 2], last[: D // 2]
    layer.q_norm.weight.fill_(0.5)
    layer.k_norm.weight.fill_(0.5)
