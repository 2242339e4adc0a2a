"""
Models as training sees them: loaded, adapted, run over rows, saved. With finetune/adversarial.py and train.py the only torch
here, and the only place that imports transformers and peft, inside functions.

What is not the usual loop: rows hold several conversations whose attention is computed one by one (no T x T mask, and
nothing to leak), and logits only where a label is, which for a vocabulary of 150,000 is most of the memory.
"""  # noqa: E501

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bot.errors import MerchantError
from bot.messages import Message
from finetune.config import RunConfig
from finetune.examples import IGNORE, Example, Row

logger = logging.getLogger(__name__)

PACKED_ATTENTION = "zhanggui_packed"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class HfTokenizer:
    """transformers' tokenizer as finetune/examples.py needs it; renders exactly as bot/engines/vllm.py does."""

    def __init__(self, folder: Path, *, chat: bool = True) -> None:
        """
        Raises:
            MerchantError: `chat`, and there is no chat template.
        """
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(folder)
        if chat and self.inner.chat_template is None:
            raise MerchantError(f"{folder}: the tokenizer has no chat template; use an instruct model")
        added = {i for i, t in self.inner.added_tokens_decoder.items() if t.special}
        self.end_ids: frozenset[int] = frozenset(self.inner.all_special_ids) | frozenset(added)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        return str(self.inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt))

    def encode(self, text: str) -> list[int]:
        return list(self.inner(text, add_special_tokens=False)["input_ids"])

    def count(self, messages: Sequence[Message]) -> int:
        return len(self.encode(self.render(messages, generation_prompt=True)))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids)))


# --- Attention over packed rows --------------------------------------------------------------------------------------


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, T, d)
    key: torch.Tensor,  # (1, kv_heads, T, d)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Sequence[int | torch.Tensor] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Causal attention within each segment of the row; `segments` are their lengths, which add up to T.

    A segment of branches is given as its mask, (n, n): what each place sees.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    parts = list(segments) if segments is not None else [query.shape[2]]
    lengths = [p if isinstance(p, int) else len(p) for p in parts]
    out = []
    pieces = zip(parts, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    for part, q, k, v in pieces:
        n = q.shape[2]
        if not isinstance(part, int):
            if sliding_window and n > sliding_window:
                raise MerchantError(
                    f"shared_prefixes: this model looks back {sliding_window} tokens, and {n} are joined: leave it out"
                )
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=part, dropout_p=dropout, scale=scaling))
        elif sliding_window and n > sliding_window:
            place = torch.arange(n, device=q.device)
            distance = place[:, None] - place[None, :]
            mask = (distance >= 0) & (distance < sliding_window)  # (n, n)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
        else:
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling))
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None  # (1, T, heads, d)


def _without_bars() -> None:
    """Turn transformers' progress bars off: they would run through what a command prints."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _register() -> None:
    _without_bars()
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, lambda *_, **__: None)


# --- Loading and adapting --------------------------------------------------------------------------------------------


def load_base(folder: Path, config: RunConfig, labels: Sequence[str] = ()) -> Any:
    """
    Return the base model of `folder`: bfloat16 where only an adapter is trained, float32 where all of it is.

    With `labels` its head names one of them, and is drawn from torch's seed where the folder holds none; in float32.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    _register()
    dtype = torch.bfloat16 if config.bf16 and config.method != "full" else torch.float32
    attention = PACKED_ATTENTION if config.packs else "sdpa"
    if labels:
        names = dict(enumerate(labels))
        with _quiet():  # that the head is new is what a user asks for
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, num_labels=len(names), id2label=names,
                label2id={label: n for n, label in names.items()},
            )  # fmt: skip
        model.score.float()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def adapt(model: Any, config: RunConfig, n_steps: int, base_name: str) -> Any:
    """
    Return `model` with what `config.method` trains; everything else is frozen.

    Raises:
        MerchantError: the layers to adapt are not in the model, or the adapter to go on from does not fit them.
    """
    import peft

    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if config.method == "full":
        return model
    if config.method == "head":
        for name, p in model.named_parameters():
            p.requires_grad = name.startswith("score.")
        return model
    have = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = list(config.targets or [t for t in LINEAR if t in have])
    if config.method in ("lora", "adalora", "ia3") and (not targets or not set(targets) <= have):
        missing = sorted(set(targets) - have) or ["q_proj"]
        raise MerchantError(
            f"targets: the model has no linear layer {missing[0]!r}; there are {', '.join(sorted(have))}"
        )
    task_type = "SEQ_CLS" if config.task == "classify" else "CAUSAL_LM"  # the former trains the head, `score`, as well
    common: dict[str, Any] = {"task_type": task_type, "base_model_name_or_path": base_name}
    made: Any
    if config.method == "lora":
        made = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            use_rslora=config.rslora,
            lora_dropout=config.dropout,
            target_modules=targets,
            layers_to_transform=_layers(model, config),
            **common,
        )
    elif config.method == "adalora":
        # Starts at half as much again and prunes over the middle of the run: a tenth to warm up, a third to settle.
        made = peft.AdaLoraConfig(
            init_r=max(config.rank + 1, round(1.5 * config.rank)), target_r=config.rank, lora_alpha=config.alpha,
            lora_dropout=config.dropout, target_modules=targets, total_step=n_steps,
            tinit=max(1, n_steps // 10), tfinal=max(1, n_steps // 3), deltaT=max(1, n_steps // 50), **common,
        )  # fmt: skip
    elif config.method == "ia3":
        wanted = [t for t in ("k_proj", "v_proj", "down_proj") if t in have]
        made = peft.IA3Config(
            target_modules=wanted, feedforward_modules=[t for t in wanted if t == "down_proj"], **common
        )
    elif config.method == "prefix":
        made = peft.PrefixTuningConfig(num_virtual_tokens=config.n_virtual_tokens, **common)
    else:
        made = peft.PromptTuningConfig(num_virtual_tokens=config.n_virtual_tokens, **common)
    model.name_or_path = base_name  # what the adapter's file names as its base: no path of this machine
    adapted = peft.get_peft_model(model, made)
    for module in adapted.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = (
                False  # autocast brings both sides to bfloat16, at a quarter of the memory
            )
    if config.start_from is not None:
        _go_on_from(config.start_from, adapted, config, base_name)
    return adapted


def _go_on_from(folder: Path, model: Any, config: RunConfig, base_name: str) -> None:
    """Give `model`, freshly adapted by LoRA, the weights of the adapter in `folder`."""
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as exc:
        raise MerchantError(f"start_from: {folder} holds no adapter: {' '.join(str(exc).split())}") from None
    base = str(theirs.get("base_model_name_or_path"))
    if Path(base).name != Path(base_name).name:
        raise MerchantError(f"start_from: the adapter is of {base}, the run of {base_name}")
    knobs = {"rank": (theirs.get("r"), config.rank), "alpha": (theirs.get("lora_alpha"), config.alpha)}
    knobs["rslora"] = (theirs.get("use_rslora"), config.rslora)
    for name, (has, wants) in knobs.items():
        if has != wants:
            raise MerchantError(f"start_from: the adapter has {name} {has}, the run {wants}; give the run the same")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # else it looks for the base on the hub
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
        raise MerchantError("start_from: the adapter has other layers than the run; give both targets and from_layer")
    peft.set_peft_model_state_dict(model, tensors)


def _layers(model: Any, config: RunConfig) -> list[int] | None:
    """Return the layers that are adapted, None for all."""
    n = int(model.config.num_hidden_layers)
    if config.from_layer >= n:
        raise MerchantError(f"from_layer: the model has {n} layers, and {config.from_layer} leaves none")
    return list(range(config.from_layer, n)) if config.from_layer else None


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def autocast(config: RunConfig, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if config.bf16 else nullcontext()


# --- Rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A row as tensors."""

    input_ids: torch.Tensor  # (1, T) packed, (B, W) padded
    attention_mask: torch.Tensor | None  # (B, W) padded
    position_ids: torch.Tensor | None  # (1, T) packed
    segments: tuple[int | torch.Tensor, ...] | None  # packed: the lengths of the conversations, or masks of branches
    at: tuple[torch.Tensor, torch.Tensor]  # (line, place) of what predicts a learned token
    targets: torch.Tensor  # (n_learned,)
    n_tokens: int  # real ones, padding not counted


def row_inputs(examples: Sequence[Example], row: Row, *, packed: bool, device: str = "cpu", pad_id: int = 0) -> Inputs:
    """Return the tensors of one row. Targets come in the order of the examples in it."""
    chosen = [examples[n] for n in row]
    lines: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    offset = 0
    for line, example in enumerate(chosen):
        for t, label in enumerate(example.labels[1:]):
            if label != IGNORE:
                lines.append(0 if packed else line)
                places.append(offset + t)
                targets.append(label)
        if packed:
            offset += len(example.input_ids)
    lengths = tuple(len(e.input_ids) for e in chosen)

    def tensor(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    at = (tensor(lines), tensor(places))
    if packed:
        ids = [i for e in chosen for i in e.input_ids]
        positions = [p for e in chosen for p in _positions(e)]
        segments = tuple(_branch_mask(e.branches, device) if e.branches else len(e.input_ids) for e in chosen)
        return Inputs(tensor([ids]), None, tensor([positions]), segments, at, tensor(targets), sum(lengths))
    assert not any(e.branches for e in chosen), "padded rows hold plain sequences"
    width = max(lengths)
    ids_padded = [[*e.input_ids, *[pad_id] * (width - len(e.input_ids))] for e in chosen]
    mask = [[1] * n + [0] * (width - n) for n in lengths]
    return Inputs(tensor(ids_padded), tensor(mask), None, None, at, tensor(targets), sum(lengths))


def _positions(example: Example) -> list[int]:
    if not example.branches:
        return list(range(len(example.input_ids)))
    shared, *branches = example.branches
    return [*range(shared), *(shared + n for length in branches for n in range(length))]


def _branch_mask(branches: Sequence[int], device: str) -> torch.Tensor:
    """Return (n, n), true where a place sees another: the beginning, and what stands before it in its own branch."""
    # 0 is the beginning, which all see; else the number of the branch.
    of = torch.repeat_interleave(torch.arange(len(branches), device=device), torch.tensor(branches, device=device))
    n = len(of)
    before = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return before & ((of[None, :] == 0) | (of[None, :] == of[:, None]))


def row_loss(model: Any, inputs: Inputs, config: RunConfig, n_virtual: int = 0) -> torch.Tensor:
    """Return the summed cross-entropy of the learned tokens of a row, float32; nothing else's logits are computed."""
    return F.cross_entropy(row_logits(model, inputs, config, n_virtual), inputs.targets, reduction="sum")


def row_logits(model: Any, inputs: Inputs, config: RunConfig, n_virtual: int = 0) -> torch.Tensor:
    """Return the logits that the learned tokens of a row are told from, (n_learned, vocabulary), float32."""
    # The same places of every line are computed: for a packed row exactly the wanted ones.
    columns, column_of = torch.unique(inputs.at[1], return_inverse=True)
    arguments: dict[str, Any] = {
        "input_ids": inputs.input_ids,
        "use_cache": False,
        "logits_to_keep": columns + n_virtual,
    }
    if inputs.segments is not None:
        arguments |= {"position_ids": inputs.position_ids, "segments": inputs.segments}
    else:
        arguments["attention_mask"] = inputs.attention_mask
    with autocast(config, inputs.input_ids.device.type):
        logits = model(**arguments).logits  # (lines, columns, vocabulary)
    wanted: torch.Tensor = logits[inputs.at[0], column_of].float()
    return wanted


def virtual_tokens(config: RunConfig) -> int:
    """Return how many places prompt tuning puts before a line's own; prefix tuning's are in the cache, not in the line."""  # noqa: E501
    return config.n_virtual_tokens if config.method == "prompt" else 0


def orthogonality(model: Any) -> torch.Tensor | float:
    """Return AdaLoRA's penalty, which peft adds only to a loss it computes itself (peft/tuners/adalora/model.py)."""
    weight = model.peft_config["default"].orth_reg_weight
    terms = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=p.device)))
    return weight * torch.stack(terms).mean() if terms else 0.0


# --- Results ---------------------------------------------------------------------------------------------------------


def save_result(
    model: Any, tokenizer: HfTokenizer, config: RunConfig, folder: Path, state: dict[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """
    Write what publishing takes into the new `folder`; return what it is. AdaLoRA is folded into a plain LoRA.

    `state` holds all weights whole, where the model's own are sharded.
    """
    folder.mkdir(parents=True)
    if config.method == "full":
        if state is not None:
            halves = {name: p.to(torch.bfloat16) for name, p in state.items()}
            model.config.dtype = torch.bfloat16
            model.save_pretrained(folder, state_dict=halves)
        else:
            model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.inner.save_pretrained(folder)
        return {"kind": "model"}
    if config.method == "head":
        from safetensors.torch import save_file

        save_file({n: p.detach().cpu() for n, p in trainable(model).items()}, folder / "head.safetensors")
        return {"kind": "head"}
    if config.method == "adalora":
        ranks = fold_adalora(model, folder)
        return {"kind": "adapter", "peft_type": "LORA", "ranks": ranks}
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    adapter = json.loads(path.read_text())
    # peft writes sets in whatever order they have in this process: equal runs are to have equal files.
    adapter = {name: sorted(value) if isinstance(value, list) else value for name, value in adapter.items()}
    path.write_text(json.dumps(adapter, indent=2, sort_keys=True))
    return {"kind": "adapter", "peft_type": adapter["peft_type"]}


def fold_adalora(model: Any, folder: Path) -> dict[str, int]:
    """
    Write AdaLoRA's P·Λ·Q as a plain LoRA of each layer's own rank, which vLLM and peft load; return the ranks.

    B' = B·s and A' = (A∘Λ), rows with Λ = 0 left out, s = α / (ranknum + 1e-5) as in peft's SVDLinear. Each layer's
    alpha is its rank, so LoRA's own scale is one. A layer that lost all its ranks keeps one of zeros.
    """
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "lora_E"):
            continue
        a, b, e = (getattr(module, f"lora_{x}")["default"].detach().float() for x in "ABE")
        scale = float(module.scaling["default"]) / (float(module.ranknum["default"]) + 1e-5)
        kept = torch.nonzero(e[:, 0] != 0)[:, 0]
        kept = kept if len(kept) else torch.zeros(1, dtype=torch.long)
        tensors[f"base_model.model.{name}.lora_A.weight"] = (a * e)[kept].contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (b * scale)[:, kept].contiguous()
        ranks[name] = len(kept)
    top = max(ranks.values())
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    import peft

    plain = peft.LoraConfig(
        r=top, lora_alpha=top, target_modules=list(config.target_modules), task_type="CAUSAL_LM",
        rank_pattern={n: r for n, r in ranks.items() if r != top}, alpha_pattern={n: r for n, r in ranks.items() if r != top},  # noqa: E501
        base_model_name_or_path=config.base_model_name_or_path, inference_mode=True,
    )  # fmt: skip
    plain.save_pretrained(str(folder))
    return ranks


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write base and adapter as one model into the new folder `out`: safetensors in bfloat16, tokenizer, template."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _without_bars()
    # In float32: adding small updates to bfloat16 weights would round most of them away twice.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    for name in ("generation_config.json", "chat_template.jinja"):
        if (base / name).exists() and not (out / name).exists():
            shutil.copy(base / name, out / name)


def load_for_evaluation(base: Path, adapter: Path | None, *, bf16: bool = True) -> Any:
    """Return a model that scores and generates: the base, or with an adapter of any method on it."""
    from transformers import AutoModelForCausalLM

    _without_bars()
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter is not None:
        model = with_adapter(model, adapter)
    return model.eval()


def with_adapter(model: Any, adapter: Path) -> Any:
    """Return `model` with a trained adapter of any method on it."""
    import peft

    return peft.PeftModel.from_pretrained(model, str(adapter))
