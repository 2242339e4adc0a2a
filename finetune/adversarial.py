"""
Adversarial training on the output of the input embedding: FGM and FreeLB, by a hook, for any method and packed rows.

FGM (Miyato et al. 2017, https://arxiv.org/abs/1605.07725): one step along the gradient, a second pass. FreeLB (Zhu et al.
2020, https://arxiv.org/abs/1909.11764): several ascents, all their gradients used. The usual code edits the embedding's
weights; under LoRA they have no gradient, so the disturbance is added to what the embedding gives out.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Disturbance:
    """Adds `delta` to the embedding's output while it is set, and collects its gradient."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        self.delta: torch.Tensor | None = None
        self._watch = False
        self._handle = embedding.register_forward_hook(self._hook)

    def _hook(self, module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not self._watch:
            return None
        if self.delta is None or self.delta.shape != output.shape:
            self.delta = torch.zeros_like(output, dtype=torch.float32, requires_grad=True)
        return output + self.delta.to(output.dtype)

    def _delta(self) -> torch.Tensor:
        assert self.delta is not None, "the loss did not come by the embedding"
        return self.delta

    def _gradient(self) -> torch.Tensor:
        gradient = self._delta().grad
        assert gradient is not None, "the loss did not come by the embedding"
        return gradient

    def fgm(self, loss_of: Callable[[], torch.Tensor], segments: Sequence[int] | None, eps: float) -> torch.Tensor:
        """Backward the clean loss and the loss at the disturbed embedding; return the clean one."""
        self._watch, self.delta = True, None
        try:
            clean = loss_of()
            clean.backward()
            self.delta = _scaled(self._gradient(), segments, eps).requires_grad_(True)
            loss_of().backward()
        finally:
            self._watch, self.delta = False, None
        return clean.detach()

    def freelb(
        self, loss_of: Callable[[], torch.Tensor], segments: Sequence[int] | None, eps: float, n_steps: int
    ) -> torch.Tensor:
        """Backward the mean loss over `n_steps` ascents within the ball of radius `eps`; return the first, clean one."""  # noqa: E501
        self._watch, self.delta = True, None
        first: torch.Tensor | None = None
        try:
            for _ in range(n_steps):
                loss = loss_of()
                first = loss.detach() if first is None else first
                (loss / n_steps).backward()
                moved = self._delta().detach() + _scaled(self._gradient(), segments, eps / max(n_steps - 1, 1))
                self.delta = _clipped(moved, segments, eps).requires_grad_(True)
        finally:
            self._watch, self.delta = False, None
        assert first is not None
        return first


def _parts(x: torch.Tensor, segments: Sequence[int] | None) -> list[torch.Tensor]:
    """Return views of (1, T, H), one a packed conversation, or of (B, T, H), one a line: each has its own length."""
    return list(x[0].split(list(segments))) if segments is not None else list(x)


def _scaled(gradient: torch.Tensor, segments: Sequence[int] | None, eps: float) -> torch.Tensor:
    out = gradient.detach().clone()
    for part in _parts(out, segments):
        norm = part.norm()
        part.mul_(eps / norm if norm > 0 else 0.0)
    return out


def _clipped(delta: torch.Tensor, segments: Sequence[int] | None, eps: float) -> torch.Tensor:
    out = delta.detach().clone()
    for part in _parts(out, segments):
        norm = part.norm()
        if norm > eps:
            part.mul_(eps / norm)
    return out
