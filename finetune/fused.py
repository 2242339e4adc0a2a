"""
The parts of a transformer that take the time on a CPU, with the same values in fewer passes over memory.

Profiled on two AMX cores, half of a step was not matrix products: torch's flash attention spends eight times as
long backward as forward, peft's LoRA reads and writes every layer's output three times more, RMSNorm keeps float32
copies, and the cross-entropy over 150,000 words five times its logits. Here each of them is one autograd function
with its gradient written out. Knows tensors and, by their shape, the modules of peft and transformers; no run.

Nothing is assumed of a model: `speed_up` replaces a module only where the replacement gives the same values and
gradients on random numbers, and leaves every other as it is. Products are in the weights' type; scores, norms and
losses in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Rows of queries at once: bounds the memory of a long conversation's scores, and skips most of what causality masks.
QUERY_BLOCK = 256
# Logits at once: 128 rows of 150,000 words are 78 MB in float32.
LOGIT_ROWS = 128


# --- Attention -------------------------------------------------------------------------------------------------------


@contextmanager
def _bf16_products(on: bool) -> Iterator[None]:
    """Let oneDNN multiply float32 matrices that hold bfloat16 values as such; the sums and the result stay float32."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if on:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _blocks(lengths: Sequence[int], window: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end of the queries, first key) of each block; its keys end where its queries do."""
    at = 0
    for n in lengths:
        for first in range(at, at + n, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, at + n)
            yield first, end, max(at, first - window + 1) if window else at
        at += n


def _grouped(x: torch.Tensor, kv_heads: int, first: int, end: int) -> torch.Tensor:
    """Return places [first, end) of (1, heads, T, d) as (kv_heads, heads / kv_heads * places, d)."""
    return x[0, :, first:end].reshape(kv_heads, -1, x.shape[3])


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, block: tuple[int, int, int], scaling: float, window: int | None
) -> torch.Tensor:
    """Return the attention of grouped queries (kv, g * m, d) to keys (kv, n, d), float32, (kv, g * m, n)."""
    first, end, start = block
    with _bf16_products(q.dtype == torch.bfloat16):
        scores = torch.bmm(q.float() * scaling, k.float().transpose(1, 2))
    rows = torch.arange(first, end)[:, None]
    shown = scores.view(q.shape[0], -1, end - first, end - start)
    if window:
        columns = torch.arange(start, end)[None, :]
        shown.masked_fill_((columns > rows) | (columns <= rows - window), float("-inf"))
    else:  # only the last square holds anything that lies ahead
        shown[..., first - start :].masked_fill_(rows < rows.T, float("-inf"))
    return torch.softmax(scores, -1)


class _PackedAttention(torch.autograd.Function):
    """Causal attention, conversation by conversation; keys are not repeated for the heads that share them."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scaling: float,
        window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        heads, kv = q.shape[1], k.shape[1]
        out = q.new_empty(1, q.shape[2], heads, q.shape[3])
        for block in _blocks(lengths, window):
            first, end, start = block
            ks, vs = k[0, :, start:end], v[0, :, start:end]
            p = _probabilities(_grouped(q, kv, first, end), ks, block, scaling, window)
            mixed = torch.bmm(p.to(q.dtype), vs)
            out[0, first:end] = mixed.view(heads, end - first, -1).transpose(0, 1)
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scaling, ctx.window = lengths, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        g = gradients[0].transpose(1, 2)  # (1, heads, T, d)
        heads, kv = q.shape[1], k.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(ctx.lengths, ctx.window):
            first, end, start = block
            qs, gs = _grouped(q, kv, first, end), _grouped(g, kv, first, end)
            ks, vs = k[0, :, start:end], v[0, :, start:end]
            # Computed again: kept, they would be the largest thing in memory.
            p = _probabilities(qs, ks, block, ctx.scaling, ctx.window)
            with _bf16_products(q.dtype == torch.bfloat16):
                dp = torch.bmm(gs.float(), vs.float().transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32).mul_(ctx.scaling).to(q.dtype)
            dv[0, :, start:end] += torch.bmm(p.to(q.dtype).transpose(1, 2), gs)
            dk[0, :, start:end] += torch.bmm(ds.transpose(1, 2), qs)
            dq[0, :, first:end] = torch.bmm(ds, ks).view(heads, end - first, -1)
        return dq, dk, dv, None, None, None


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scaling: float, window: int | None
) -> torch.Tensor:
    """
    Return (1, T, heads, d): causal attention within each of the segments, whose `lengths` add up to T.

    `q` is (1, heads, T, d), `k` and `v` (1, kv_heads, T, d), of one type. A place sees `window` places, itself counted.
    """
    out: torch.Tensor = _PackedAttention.apply(q, k, v, tuple(lengths), scaling, window)  # type: ignore[no-untyped-call]
    return out


# --- Layers ----------------------------------------------------------------------------------------------------------


class _LoraLinear(torch.autograd.Function):
    """x W' + b + s x A' B' with W and b frozen, added in place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        a16, b16 = a.to(weight.dtype), (b * scale).to(weight.dtype)
        low = flat @ a16.T
        out = torch.nn.functional.linear(flat, weight, bias)
        out.addmm_(low, b16.T)
        ctx.save_for_backward(flat, weight, a16, b16, low)
        ctx.scale, ctx.shape, ctx.types = scale, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, weight, a16, b16, low = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        g_low = g @ b16
        da = (g_low.T @ flat).to(ctx.types[0])
        db = (g.T @ low).to(ctx.types[1]).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            dx = dx.addmm_(g_low, a16).view(ctx.shape)
        return dx, None, None, da, db, None


class _RmsNorm(torch.autograd.Function):
    """w * (x / rms(x)), the quotient rounded to x's type before the product, as Llama's and Qwen's modules have it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        unit = x.float().mul_(inverse)
        g = gradients[0].float()
        dw = (g * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = g * weight.float() if dw is not None or g is gradients[0] else g.mul_(weight.float())
        mean = (g * unit).mean(-1, keepdim=True)
        dx = g.addcmul_(unit, mean, value=-1.0).mul_(inverse).to(x.dtype)
        return dx, dw, None


class _Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin; its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return (x * cos).addcmul_(x.roll(half, -1), signed)


def _rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]


# --- Loss ------------------------------------------------------------------------------------------------------------


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each place, a few rows of logits at a time; the gradient is made while they are there."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(hidden), LOGIT_ROWS):
            rows = slice(at, at + LOGIT_ROWS)
            logits = (hidden[rows] @ head.T).float()
            wanted = targets[rows, None]
            losses[rows] = torch.logsumexp(logits, -1) - logits.gather(-1, wanted)[:, 0]
            if gradient is not None:
                p = torch.softmax(logits, -1)
                p.scatter_add_(-1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
                gradient[rows] = p.to(hidden.dtype) @ head
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None


def token_losses(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy, float32 (n,), of `targets` (n,) under the frozen `head` (vocabulary, H) on (n, H)."""
    losses: torch.Tensor = _TokenLosses.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return losses
