"""
`RunConfig`: every knob of a training run, from a file (TOML, YAML, JSON) or flags; written whole into the run.

Knows the values and what cannot go together, before anything heavy is imported. What a method's weights can be served by
is in finetune/methods.py.
"""  # noqa: E501

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bot.errors import MerchantError

MethodName = Literal["lora", "adalora", "ia3", "prefix", "prompt", "full"]


class RunConfig(BaseModel):
    """One fine-tuning run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(None, description="Catalog name or model folder; the catalog's default where not given.")
    data: Path = Field(description="A data folder of `python -m finetune import`.")
    store: Path | None = Field(None, description="Store folder: its passages are put into the prompts, as in serving.")
    method: MethodName = Field("lora", description="What is trained.")

    rank: int = Field(16, ge=1, le=512, description="Rank of LoRA; of AdaLoRA the mean rank it ends with.")
    alpha: float = Field(32.0, gt=0, description="LoRA's scale.")
    rslora: bool = Field(True, description="Rank-stabilised: divide by the root of the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before LoRA's first matrix.")
    targets: tuple[str, ...] = Field((), description="Linear layers to adapt; all seven kinds where not given.")
    n_virtual_tokens: int = Field(16, ge=1, le=512, description="Virtual tokens of prefix and prompt tuning.")

    lr: float | None = Field(None, gt=0, description="Learning rate; the method's usual one where not given.")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: float = Field(2.0, gt=0, le=1000)
    max_steps: int = Field(0, ge=0, description="Stop after so many steps; 0: after the epochs.")

    max_tokens: int = Field(1024, ge=32, description="Longest example; longer ones lose their oldest turns, whole.")
    row_tokens: int = Field(2048, ge=32, description="Tokens in one forward pass.")
    batch_tokens: int = Field(8192, ge=32, description="Tokens in one optimizer step, over several passes.")
    packing: bool = Field(True, description="Several examples in one row, none seeing another; else padded rows.")
    gradient_checkpointing: bool = False
    bf16: bool = Field(True, description="Weights and products in bfloat16; the trained ones are kept in float32.")

    adversarial: Literal["none", "fgm", "freelb"] = "none"
    adversarial_eps: float = Field(0.5, gt=0, description="Length of the disturbance of an embedding.")
    adversarial_steps: int = Field(2, ge=1, le=10, description="Ascents of FreeLB.")

    eval_every: int = Field(0, ge=0, description="Steps between validations; 0: four times an epoch.")
    patience: int = Field(3, ge=0, description="Stop after so many validations without a gain; 0: never.")
    min_delta: float = Field(0.001, ge=0, description="What counts as a gain, in loss.")
    keep_checkpoints: int = Field(2, ge=1)

    n_passages: int = Field(4, ge=1, le=10, description="Passages in a prompt.")
    unanswerable: float = Field(
        0.08, ge=0, le=0.5, description="Share of examples whose passage is taken away, answered by a refusal."
    )
    ungrounded: Literal["drop", "keep"] = Field("drop", description="Replies with figures that no passage holds.")

    threads: int = Field(0, ge=0, description="CPU threads; 0: those there are.")
    seed: int = 0

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        if self.row_tokens < self.max_tokens:
            raise ValueError("row_tokens is below max_tokens: an example would not fit into a row")
        if self.batch_tokens < self.row_tokens:
            raise ValueError("batch_tokens is below row_tokens: a step is at least one row")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError("prefix tuning keeps its tokens in the cache that gradient checkpointing turns off")
        if self.method in ("prefix", "prompt") and self.adversarial != "none":
            raise ValueError(f"adversarial training disturbs embeddings; {self.method} tuning has its own there")
        return self

    @property
    def packs(self) -> bool:
        """Whether rows are packed: virtual tokens stand before a row, so theirs hold one example each."""
        return self.packing and self.method not in ("prefix", "prompt")

    @property
    def learning_rate(self) -> float:
        # LoRA's optimum is about ten times that of full tuning (Schulman et al. 2025, "LoRA Without Regret").
        usual = {"lora": 2e-4, "adalora": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt": 3e-2, "full": 2e-5}
        return self.lr if self.lr is not None else usual[self.method]


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """
    Return the configuration in `path` with `overrides` (None: not given) on top.

    Raises:
        MerchantError: unreadable, an unknown knob, a value out of range, or two that do not go together.
    """
    raw: Any = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix.lower() in (".yaml", ".yml"):
                import yaml

                raw = yaml.safe_load(text)
            else:
                raw = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        except (OSError, ValueError) as exc:
            raise MerchantError(f"{path}: {exc}") from None
        except Exception as exc:  # yaml.YAMLError, known only where yaml is
            raise MerchantError(f"{path}: {' '.join(str(exc).split())}") from None
        if not isinstance(raw, dict):
            raise MerchantError(f'{path}: should hold one table of knobs, for instance method = "lora"')
    values = {**raw, **{k: v for k, v in overrides.items() if v is not None}}
    try:
        return RunConfig(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise MerchantError(f"{path or 'arguments'}, {where}: {first['msg'].removeprefix('Value error, ')}") from None
