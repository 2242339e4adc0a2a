"""
A base model and a LoRA -> one model folder, with numpy alone: neither torch nor peft is needed to serve a release.

Knows safetensors (https://huggingface.co/docs/safetensors) and peft's LoRA files (adapter_config.json,
adapter_model.safetensors); no catalog, no cache, no engine. Works through the base tensor by tensor and in blocks of
rows, in float32, and rounds once, to the nearest even, into the base's own type; so it needs some tens of megabytes,
whatever the size of the model. What it does not know how to merge exactly it refuses.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bot.errors import MerchantError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHUNK = 1 << 22  # elements merged at once: 16 MB of float32
BLOCK = 1 << 22  # bytes copied at once
_PREFIX = "base_model.model."
# Beside the weights: what a model folder needs, and whose it is. Not the stamp of the base.
_BESIDE = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*")

# Of peft's configuration: what changes the arithmetic, and what it has to be here.
_MUST_BE_EMPTY = (
    "fan_in_fan_out", "use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices",
    "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config", "kasa_config",
)  # fmt: skip
# These start from another base than the one named: only a plain beginning merges with it.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a safetensors file, where it lies."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


@dataclass(frozen=True, slots=True)
class Update:
    """What a LoRA adds to one weight: `scaling * b @ a`."""

    a: Float32  # (rank, columns)
    b: Float32  # (rows, rank)
    scaling: float


def merge_adapter(
    base: Path, adapter: Path, out: Path, *, progress: Callable[[int, int], None] | None = None
) -> tuple[str, str]:
    """
    Write `base` with the LoRA in `adapter` on it into the new folder `out`; return the sha256 of base and result.

    Both checksums are over the safetensors files in the order of their names. Blocks for seconds a gigabyte.

    Raises:
        MerchantError: the adapter is none that merges exactly, or of another base. `out` is then incomplete.
    """
    updates = read_adapter(adapter)
    files = sorted(base.glob("*.safetensors"))
    heads = {file: _read_head(file) for file in files}
    check_fits(updates, {name: t.shape for head in heads.values() for name, t in head.items()}, adapter)
    out.mkdir(parents=True)
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            if path.name != "zhanggui.json":
                shutil.copy(path, out / path.name)
    total, done = sum(file.stat().st_size for file in files), 0
    of_base, of_result = hashlib.sha256(), hashlib.sha256()
    for file in files:
        with (out / file.name).open("wb") as target:
            for before, after in _merged(file, heads[file], updates):
                of_base.update(before)
                of_result.update(after)
                target.write(after)
                done += len(after)
                if progress is not None:
                    progress(done, total)
            target.flush()
            os.fsync(target.fileno())
    return of_base.hexdigest(), of_result.hexdigest()


def read_adapter(folder: Path) -> dict[str, Update]:
    """
    Return what the LoRA in `folder` adds, by the name of the weight.

    Raises:
        MerchantError: no LoRA, or one whose kind does not merge into weights exactly.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    tensors = _read_head(path)
    updates = {}
    for name in sorted(tensors):
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(A|B)\.weight", name)
        if match is None:
            raise MerchantError(
                f"{path}: {name!r} is no part of a plain LoRA; train with target modules that are linear"
            )
        module, half = match[1], match[2]
        if half == "B":
            continue
        other = f"{_PREFIX}{module}.lora_B.weight"
        if other not in tensors:
            raise MerchantError(f"{path}: {name!r} has no {other!r} beside it: copy the file anew")
        with path.open("rb") as file:
            a, b = (_values(_bytes(file, tensors[n].begin, tensors[n].end), tensors[n]) for n in (name, other))
        rank = int(_of_pattern(config.get("rank_pattern"), module, config["r"]))
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise MerchantError(f"{path}: {name!r} has not rank {rank}, as {CONFIG} says: copy both files anew")
        alpha = float(_of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        # Rank-stabilised LoRA (arXiv 2312.03732) divides by the root of the rank.
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        updates[f"{module}.weight"] = Update(a, b, scaling)
    if not updates:
        raise MerchantError(f"{path}: it changes no weight")
    return updates


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json of a plain LoRA; raises MerchantError for anything else."""
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, _, _ = config["peft_type"], int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise MerchantError(f"{path}: not the configuration of a LoRA ({exc!r})") from None
    if kind != "LORA":
        raise MerchantError(f"{path}: peft_type is {kind!r}; only a LoRA is merged here")
    wrong = [name for name in _MUST_BE_EMPTY if config.get(name)]
    if config.get("bias", "none") != "none":
        wrong.append("bias")
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        wrong.append("init_lora_weights")
    if wrong:
        raise MerchantError(f"{path}, {wrong[0]}: {config[wrong[0]]!r} does not merge exactly here; train without it")
    return config


def rank_of(folder: Path) -> int:
    """Return the largest rank of a LoRA: what an engine that loads it while running must have room for."""
    config = read_config(folder)
    return max(int(r) for r in (config["r"], *(config.get("rank_pattern") or {}).values()))


def weight_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a model folder; reads headers only."""
    return {name: t.shape for file in sorted(model.glob("*.safetensors")) for name, t in _read_head(file).items()}


def check_fits(updates: Mapping[str, Update], shapes: Mapping[str, tuple[int, ...]], adapter: Path) -> None:
    """Raise MerchantError unless each update has a weight of its shape: an engine would leave it out without a word."""
    for name, update in updates.items():
        shape = (update.b.shape[0], update.a.shape[1])
        if name not in shapes:
            raise MerchantError(f"{adapter}: it changes {name!r}, which the base model does not have: another base")
        if shapes[name] != shape:
            raise MerchantError(
                f"{adapter}: it changes {name!r} of shape {list(shape)}, and the base model's is {list(shapes[name])}: "
                "another base"
            )


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return what a pattern of peft says of a module: keys are expressions for the end of its name, the first wins."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_head(path: Path) -> dict[str, _Tensor]:
    try:
        with path.open("rb") as file:
            n = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if n > size:
                raise ValueError("its header is too long")
            head = json.loads(file.read(n))
        head.pop("__metadata__", None)
        found = {}
        for name, t in head.items():
            begin, end = (8 + n + int(offset) for offset in t["data_offsets"])
            if not 0 <= begin <= end <= size:
                raise ValueError(f"{name} ends outside of it")
            found[name] = _Tensor(t["dtype"], tuple(t["shape"]), begin, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise MerchantError(f"{path}: not readable as safetensors ({exc}): copy it anew") from None
    return found


def _merged(path: Path, head: Mapping[str, _Tensor], updates: Mapping[str, Update]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (bytes of the file, bytes of the merged one), which are equally long, from beginning to end."""
    with path.open("rb") as file:  # read, not mapped: what is mapped counts as this process's memory
        at = 0
        for name, tensor in sorted(head.items(), key=lambda item: item[1].begin):
            if (update := updates.get(name)) is None:
                continue
            yield from _copied(file, at, tensor.begin)
            n_rows, n_columns = tensor.shape
            row_bytes = (tensor.end - tensor.begin) // n_rows
            step = max(1, CHUNK // n_columns)
            for row in range(0, n_rows, step):
                n = min(step, n_rows - row)
                begin = tensor.begin + row * row_bytes
                before = _bytes(file, begin, begin + n * row_bytes)
                values = _values(before, _Tensor(tensor.dtype, (n, n_columns), begin, begin + len(before)))
                values += update.b[row : row + n] @ update.a * np.float32(update.scaling)
                yield before, _bytes_of(values, tensor.dtype)
            at = tensor.end
        yield from _copied(file, at, path.stat().st_size)


def _copied(file: IO[bytes], begin: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    for at in range(begin, end, BLOCK):
        block = _bytes(file, at, min(at + BLOCK, end))
        yield block, block


def _bytes(file: IO[bytes], begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def _values(data: bytes, tensor: _Tensor) -> Float32:
    """Return a tensor's bytes as float32, a copy."""
    if tensor.dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif tensor.dtype in ("F16", "F32"):
        values = np.frombuffer(data, "<f2" if tensor.dtype == "F16" else "<f4").astype(np.float32)
    else:
        raise MerchantError(
            f"weights of type {tensor.dtype} are not merged: use a base in bfloat16, float16 or float32"
        )
    return values.reshape(tensor.shape)


def _bytes_of(values: Float32, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    bits = values.view(np.uint32)
    rounding = (bits >> np.uint32(16)) & np.uint32(1)  # to the nearest, ties to even, as torch does
    rounding += np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype("<u2").tobytes()
