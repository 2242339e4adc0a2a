"""
What each training method's weights can be served by, checked before a job starts. Pure.

Measured on vLLM 0.32's own loader (docs/finetune.md): it takes plain LoRA while it runs, and nothing else; what can be
folded or merged exactly is; prefix and prompt tuning can be evaluated here and not served.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bot.errors import MerchantError
from finetune.config import RunConfig

Route = Literal["adapter", "merged", "evaluate"]


@dataclass(frozen=True, slots=True)
class Method:
    """How the result of one method reaches visitors."""

    name: str
    cuda: Route  # in a server on CUDA
    cpu: Route  # on CPU vLLM's LoRA costs ten times the prefill, so weights are merged there
    how: str


METHODS = {
    m.name: m
    for m in (
        Method("lora", "adapter", "merged", "loaded while the server runs on CUDA; merged for CPU"),
        Method("adalora", "adapter", "merged", "folded into a plain LoRA of the ranks it found, exactly; then as LoRA"),
        Method("ia3", "merged", "merged", "merged: its factors change every weight"),
        Method("full", "merged", "merged", "the whole model is the result"),
        Method("head", "evaluate", "evaluate", "a classifier's last layer; `finetune classify` runs it"),
        Method("prefix", "evaluate", "evaluate", "evaluated only: vLLM serves no prefixes; distil it into a LoRA"),
        Method("prompt", "evaluate", "evaluate", "evaluated only: vLLM serves no soft prompts; distil it into a LoRA"),
    )
}

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of its buffers; an adapter may have any rank up to one of these


def check_servable(config: RunConfig, *, must_serve: bool) -> Method:
    """
    Return the method of `config`.

    Raises:
        MerchantError: the result is to be served, and cannot be.
    """
    method = METHODS[config.method]
    if config.task == "classify":
        method = Method(method.name, "evaluate", "evaluate", "a classifier, which `finetune classify` runs")
    if must_serve and method.cpu == "evaluate":
        raise MerchantError(
            f"method {method.name!r} cannot be published ({method.how}): use lora, adalora, ia3 or full on dialogues, or leave out --publishable"  # noqa: E501
        )
    return method


def buffer_rank(rank: int) -> int:
    """Return the smallest `max_lora_rank` of vLLM that takes an adapter of `rank`."""
    return next(r for r in VLLM_RANKS if r >= rank)
