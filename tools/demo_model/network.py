"""The Qwen2 transformer as the trainer runs it: float32 weights, arithmetic in bf16, rounded where inference rounds.

Every operation works on one flat row of packed conversations. Attention keeps them apart: with the variable-length flash kernel where
it works (checked against the plain form before it is used), else with a block mask.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 272
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    ffn: int = 512
    positions: int = 2048
    theta: float = 10000.0
    epsilon: float = 1e-6

    def as_dict(self):
        return asdict(self)


def flash_attention(q, k, v, at):
    """q, k, v: [tokens, heads, width]; `at.ends`: cumulative lengths."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, at.ends, at.ends, at.longest, at.longest, 0.0, True, False, scale=1 / math.sqrt(q.shape[-1]))[0]


def masked_attention(q, k, v, at):
    """The plain form: rows of `at.longest` tokens under a mask of causal blocks."""
    rows = q.shape[0] // at.longest
    q, k, v = (t.view(rows, at.longest, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=at.mask)
    return out.transpose(1, 2).reshape(rows * at.longest, *out.shape[1:2], out.shape[-1])


class Where(NamedTuple):
    """Where each token stands in its conversation, and which tokens it may see."""

    positions: torch.Tensor
    ends: torch.Tensor
    mask: torch.Tensor | None
    longest: int


def where(positions, ends, masked):
    """positions: [rows, length], 0 where a conversation begins; ends: cumulative lengths of all conversations."""
    length, mask = positions.shape[1], None
    if masked:
        number = (positions == 0).int().cumsum(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
        mask = ((number[:, :, None] == number[:, None, :]) & causal)[:, None]
    return Where(positions.reshape(-1).long(), ends, mask, length)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        hidden, queries, keys = shape.hidden, shape.heads * shape.width, shape.kv_heads * shape.width

        def weight(rows, columns, scale=1.0):
            return nn.Parameter(torch.randn(rows, columns) * scale / math.sqrt(columns))

        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.q, self.q_bias = weight(queries, hidden), nn.Parameter(torch.zeros(queries))
        self.k, self.k_bias = weight(keys, hidden), nn.Parameter(torch.zeros(keys))
        self.v, self.v_bias = weight(keys, hidden), nn.Parameter(torch.zeros(keys))
        self.o = weight(hidden, queries, 0.2)
        self.ffn_norm = nn.Parameter(torch.ones(hidden))
        self.gate, self.up = weight(shape.ffn, hidden), weight(shape.ffn, hidden)
        self.down = weight(hidden, shape.ffn, 0.2)


HUGGING_FACE_NAMES = {
    "input_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight", "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}


class Network(nn.Module):
    def __init__(self, shape, dtype=torch.bfloat16, attention=masked_attention):
        super().__init__()
        self.shape, self.dtype, self.attention = shape, dtype, attention
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.hidden) * 0.05)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.final_norm = nn.Parameter(torch.ones(shape.hidden))
        steps = torch.arange(0, shape.width, 2).float() / shape.width
        angles = torch.arange(shape.positions).float()[:, None] / shape.theta ** steps[None]
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def norm(self, x, weight):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.epsilon)).to(self.dtype) * weight.to(self.dtype)

    def linear(self, x, weight, bias=None):
        return F.linear(x, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def rotate(self, x, cosine, sine):
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1).to(self.dtype)

    def logits(self, tokens, at):
        """tokens: [tokens] -> [tokens, vocabulary]."""
        shape, count = self.shape, tokens.shape[0]
        cosine, sine = self.cosine[at.positions][:, None], self.sine[at.positions][:, None]
        group = shape.heads // shape.kv_heads
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        for layer in self.layers:
            h = self.norm(x, layer.input_norm)
            q = self.rotate(self.linear(h, layer.q, layer.q_bias).view(count, shape.heads, shape.width), cosine, sine)
            k = self.rotate(self.linear(h, layer.k, layer.k_bias).view(count, shape.kv_heads, shape.width), cosine, sine)
            v = self.linear(h, layer.v, layer.v_bias).view(count, shape.kv_heads, shape.width)
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            out = self.attention(q, k, v, at)
            x = x + self.linear(out.reshape(count, shape.heads * shape.width), layer.o)
            h = self.norm(x, layer.ffn_norm)
            x = x + self.linear(F.silu(self.linear(h, layer.gate)) * self.linear(h, layer.up), layer.down)
        return self.linear(self.norm(x, self.final_norm), self.embedding)

    def loss(self, tokens, targets, at):
        """Mean cross-entropy over the tokens that the assistant writes."""
        return F.cross_entropy(self.logits(tokens, at).float(), targets, ignore_index=-100)

    def named_weights(self):
        """(Hugging Face name, float32 weight), the head left out because it is the embedding."""
        yield "model.embed_tokens.weight", self.embedding
        for index, layer in enumerate(self.layers):
            for name, value in layer.named_parameters():
                yield f"model.layers.{index}.{HUGGING_FACE_NAMES[name]}", value
        yield "model.norm.weight", self.final_norm

    def matrices(self):
        return [value for value in self.layers.parameters() if value.ndim == 2]

    def others(self):
        return [self.embedding, self.final_norm, *(value for value in self.layers.parameters() if value.ndim == 1)]


def flash_works(device):
    """Whether the variable-length flash kernel gives the plain form's values and gradients here."""
    try:
        torch.manual_seed(0)
        rows, length, lengths = 2, 256, [100, 37, 119, 1, 200, 55]
        positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, length).to(device)
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), rows * length, rows * length], dtype=torch.int32, device=device)
        at = where(positions, ends, masked=True)
        found = []
        for attention in (masked_attention, flash_attention):
            torch.manual_seed(1)
            q, k, v = (torch.randn(rows * length, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            out = attention(q, k, v, at)
            out.float().pow(2).sum().backward()
            found.append([out, q.grad, k.grad, v.grad])
        worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(*found))
        print(f"flash attention: relative difference from the plain form {worst:.1e}", flush=True)
        return worst < 0.03
    except Exception as error:  # any failure means: use the plain form
        print(f"flash attention is not usable here: {error}", flush=True)
        return False


class Muon:
    """Momentum whose update is made orthogonal by five Newton-Schulz steps, for the matrices of the layers."""

    def __init__(self, matrices, momentum=0.95, weight_decay=0.05):
        self.momentum, self.weight_decay = momentum, weight_decay
        groups = {}
        for matrix in matrices:
            groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = [(group, torch.zeros(len(group), *shape, device=group[0].device)) for shape, group in groups.items()]

    @torch.no_grad()
    def step(self, rate):
        for group, memory in self.groups:
            gradient = torch.stack([matrix.grad for matrix in group])
            memory.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(memory, self.momentum))
            update *= max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            torch._foreach_add_(group, list(update.float().unbind(0)), alpha=-rate)


def orthogonal(stack):
    """The nearest matrices with all singular values about 1; coefficients chosen for fast growth of small singular values."""
    x = stack.bfloat16() if stack.is_cuda else stack.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.mT if tall else x
