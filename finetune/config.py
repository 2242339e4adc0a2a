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

MethodName = Literal["lora", "adalora", "ia3", "prefix", "prompt", "full", "head"]
TaskName = Literal["dialogue", "classify"]
# What may differ when a run is resumed: where it runs and who watches, not what it computes.
NOT_OF_THE_RESULT = frozenset({"gpus", "fsdp", "device", "wandb"})


class RunConfig(BaseModel):
    """One fine-tuning run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = Field(None, description="Catalog name or model folder; the catalog's default where not given.")
    task: TaskName = Field("dialogue", description="To reply as in the dialogues, or to name a text's class.")
    data: Path = Field(
        description="A data folder of `python -m finetune import`; to classify: a file of texts and labels, or a folder."  # noqa: E501
    )
    store: Path | None = Field(None, description="Store folder: its passages are put into the prompts, as in serving.")
    method: MethodName = Field("lora", description="What is trained.")
    start_from: Path | None = Field(
        None, description="Folder of the LoRA adapter that the run goes on from: a release, or the result of a run."
    )
    objective: Literal["sft", "kto", "dpo"] = Field(
        "sft", description="sft: replies as they were given; kto: from thumbs; dpo: from pairs of replies."
    )
    beta: float = Field(0.1, gt=0, le=10, description="KTO, DPO: how much leaving the base model costs.")

    rank: int = Field(16, ge=1, le=512, description="Rank of LoRA; of AdaLoRA the mean rank it ends with.")
    alpha: float = Field(32.0, gt=0, description="LoRA's scale.")
    rslora: bool = Field(True, description="Rank-stabilised: divide by the root of the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before LoRA's first matrix.")
    targets: tuple[str, ...] = Field((), description="Linear layers to adapt; all seven kinds where not given.")
    from_layer: int = Field(
        0, ge=0, description="Adapt this layer and those above it only: below no gradient is computed."
    )
    n_virtual_tokens: int = Field(16, ge=1, le=512, description="Virtual tokens of prefix and prompt tuning.")

    columns: dict[Literal["text", "label"], str] = Field(
        default_factory=dict, description="To classify: names of the columns; the usual ones where not given."
    )
    valid: float = Field(0.1, ge=0, lt=1, description="To classify: share of the texts for validation.")
    test: float = Field(0.1, ge=0, lt=1, description="To classify: share of the texts that `eval` measures on.")
    pool: Literal["last", "mean"] = Field("last", description="To classify: the state that the head reads.")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="To classify: balanced lets each class weigh the same, however rare."
    )
    skip_bad: bool = Field(False, description="To classify: leave out rows that cannot be read.")

    lr: float | None = Field(None, gt=0, description="Learning rate; the method's usual one where not given.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="How AdamW's learning rate goes on after the warm-up."
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: float = Field(2.0, gt=0, le=1000)
    max_steps: int = Field(0, ge=0, description="Stop after so many steps; 0: after the epochs.")

    max_tokens: int = Field(1024, ge=32, description="Longest example; longer ones lose their oldest turns, whole.")
    row_tokens: int = Field(2048, ge=32, description="Tokens in one forward pass.")
    batch_tokens: int = Field(8192, ge=32, description="Tokens in one optimizer step, over several passes.")
    batch_examples: int | None = Field(
        None, ge=1, description="Examples in one optimizer step, in the place of `batch_tokens`."
    )
    packing: bool = Field(True, description="Several examples in one row, none seeing another; else padded rows.")
    shared_prefixes: bool = Field(
        False, description="Neighbouring examples that begin alike (several questions on the same passages) share it."
    )
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

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one.")
    gpus: int = Field(
        1, ge=1, le=1024, description="Processes, one a GPU; on a machine without one they share the CPU."
    )
    fsdp: bool = Field(False, description="Shard the weights over the processes; else each holds them all.")
    wandb: str | None = Field(None, min_length=1, description="Project at Weights & Biases that watches the run.")

    threads: int = Field(0, ge=0, description="CPU threads of a process; 0: those there are.")
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _usual_of_the_task(cls, values: Any) -> Any:
        # A text is a tenth of a dialogue and teaches one label: smaller steps, or an epoch would be a handful of them.
        if not isinstance(values, dict) or values.get("task") != "classify":
            return values
        usual: dict[str, Any] = {"max_tokens": 256, "row_tokens": 1024, "batch_tokens": 1024, "epochs": 3.0}
        if values.get("method") == "head":  # each text is read once, whatever the epochs: more of them cost nothing
            usual |= {"epochs": 20.0, "patience": 0}
        return usual | values

    @model_validator(mode="before")
    @classmethod
    def _as_the_adapter(cls, values: Any) -> Any:
        # Weights fit the shape they were trained in alone: where the run names none, it is theirs.
        if not isinstance(values, dict) or values.get("start_from") is None:
            return values
        return _shape_of(Path(values["start_from"])) | values

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        if self.row_tokens < self.max_tokens:
            raise ValueError("row_tokens is below max_tokens: an example would not fit into a row")
        if self.batch_tokens < self.row_tokens:
            raise ValueError("batch_tokens is below row_tokens: a step is at least one row")
        if self.method == "prefix" and self.gradient_checkpointing:
            raise ValueError("prefix tuning keeps its tokens in the cache that gradient checkpointing turns off")
        if self.shared_prefixes and self.adversarial != "none":
            raise ValueError("adversarial training disturbs conversations one by one; shared_prefixes joins them")
        if self.method in ("prefix", "prompt") and self.adversarial != "none":
            raise ValueError(f"adversarial training disturbs embeddings; {self.method} tuning has its own there")
        if self.task == "classify" and self.method in ("adalora", "prefix", "prompt"):
            raise ValueError(f"method {self.method} trains dialogues; to classify take lora, ia3, full or head")
        if self.objective != "sft" and (self.task, self.method) != ("dialogue", "lora"):
            raise ValueError(f"objective {self.objective} compares with the adapter off: task dialogue, method lora")
        if self.objective != "sft" and (self.gpus > 1 or self.adversarial != "none" or self.shared_prefixes):
            raise ValueError(f"objective {self.objective} goes with neither gpus, adversarial nor shared_prefixes")
        if self.task == "classify" and self.store is not None:
            raise ValueError("store: passages are put into dialogues' prompts; to classify leave it out")
        if self.start_from is not None and (self.method, self.task, self.objective) != ("lora", "dialogue", "sft"):
            raise ValueError("start_from goes on with a LoRA adapter: method lora, task dialogue, objective sft")
        if self.method == "head" and self.task != "classify":
            raise ValueError("method head trains a classifier's last layer: add task classify")
        if self.method == "head" and (self.gpus > 1 or self.adversarial != "none"):
            raise ValueError("method head reads each text once and keeps what it read: one process, not adversarial")
        if self.valid + self.test >= 0.9:
            raise ValueError("valid and test: fractions whose sum is below 0.9")
        if self.fsdp and (self.gpus < 2 or self.task == "classify" or self.method == "adalora"):
            raise ValueError("fsdp shards a dialogue model over two processes or more (gpus), not with adalora")
        return self

    @property
    def packs(self) -> bool:
        """Whether rows are packed: virtual tokens stand before a row, so theirs hold one example each."""
        return self.packing and self.method not in ("prefix", "prompt")

    @property
    def learning_rate(self) -> float:
        # LoRA's optimum is about ten times that of full tuning (Schulman et al. 2025, "LoRA Without Regret").
        usual = {"lora": 2e-4, "adalora": 1e-3, "ia3": 5e-3, "prefix": 1e-2, "prompt": 3e-2, "full": 2e-5, "head": 1e-3}
        if self.objective != "sft" and self.lr is None:
            return 2e-5  # preferences move a model that answers already: a tenth of what teaches it to
        return self.lr if self.lr is not None else usual[self.method]


def _shape_of(folder: Path) -> dict[str, Any]:
    """Return the knobs that give a LoRA adapter's weights their shape; none where no adapter can be read."""
    try:
        theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return {
            "rank": theirs["r"],
            "alpha": theirs["lora_alpha"],
            "rslora": theirs["use_rslora"],
            "targets": sorted(theirs["target_modules"]),
            "from_layer": min(theirs["layers_to_transform"] or [0]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # what is wrong with it is said where its weights are read


def read_knobs(path: Path) -> dict[str, Any]:
    """
    Return the table in a TOML, YAML or JSON file.

    Raises:
        MerchantError: unreadable, or no table.
    """
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
    return raw


def load_config(path: Path | None, overrides: Mapping[str, Any]) -> RunConfig:
    """
    Return the configuration in `path` with `overrides` (None: not given) on top.

    Raises:
        MerchantError: unreadable, an unknown knob, a value out of range, or two that do not go together.
    """
    raw = read_knobs(path) if path is not None else {}
    values = {**raw, **{k: v for k, v in overrides.items() if v is not None}}
    try:
        return RunConfig(**values)
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise MerchantError(f"{path or 'arguments'}, {where}: {first['msg'].removeprefix('Value error, ')}") from None
