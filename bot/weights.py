"""
GGUF -> a folder of safetensors that vLLM, transformers and peft open: weights, config, tokenizer.

Knows the GGUF container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), the tensor names of the `qwen2`
and `llama` architectures and two tokenizers. Does not know where the file came from or whether it is the right one:
`bot/catalog.py` checks sha256 before it calls.

Why not `AutoModelForCausalLM.from_pretrained(gguf_file=…)`: its reader makes a numpy view for every token and merge
(21 s to open the 0.5B, and it opens the file three times), it needs torch, accelerate and the whole model in memory,
and it refuses to save what it read. This takes 7 s instead of 60. The dequantising itself is the `gguf` package's; the
tensors, tokens and logits are equal to transformers' bit for bit (checked on both embedded models).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bot.errors import MerchantError

Progress = Callable[[int, int], None]  # (bytes written so far, bytes in all)

CHUNK = 1 << 20  # elements dequantised at once: 4 MiB of float32, which two threads keep in the cache

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# From the Qwen2 tokenizer.json; SmolLM2 has digits, then GPT-2's own pattern (`use_regex`).
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file, still quantised."""

    name: str
    shape: tuple[int, ...]  # outermost first, as safetensors has it; GGUF stores it reversed
    kind: int  # GGMLQuantizationType
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file: metadata and where each tensor lies. No weights were read."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> Any:
        """
        Return the number `<architecture>.<key>`.

        Raises:
            MerchantError: it is missing and there is no default.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise MerchantError(f"the GGUF file has no {self.architecture}.{key}: fetch it again or use another model")
        return value


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, kind: int) -> Any:
        layout = SCALARS[kind]
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def text(self) -> str:
        length = self.scalar(10)
        if self.at + length > len(self.data):
            raise ValueError("a string runs past the end")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(kind)
        item, n = self.scalar(4), self.scalar(10)
        if item in (STRING, ARRAY):
            return [self.value(item) for _ in range(n)]
        layout = f"<{n}{SCALARS[item][1]}"
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return list(values)


def read_gguf(path: Path) -> Gguf:
    """
    Return the header of the GGUF file at `path` (version 2 or 3, little endian); about 0.3 s for 150,000 tokens.

    Raises:
        MerchantError: it is no GGUF file, or it ends too soon.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(data)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as exc:
        raise MerchantError(f"{path.name} is not a readable GGUF file ({exc}): fetch it again") from exc


def _read_header(data: mmap.mmap) -> Gguf:
    cursor = _Cursor(data)
    magic, version = data[:4], struct.unpack_from("<I", data, 4)[0]
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"magic {magic!r}, version {version}")
    cursor.at = 8
    n_tensors, n_fields = cursor.scalar(10), cursor.scalar(10)
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.scalar(4))
    found = []
    for _ in range(n_tensors):
        name, n_dims = cursor.text(), cursor.scalar(4)
        shape = tuple(reversed([cursor.scalar(10) for _ in range(n_dims)]))
        found.append(Tensor(name, shape, cursor.scalar(4), cursor.scalar(10)))
    step = int(metadata.get("general.alignment", 32))
    start = (cursor.at + step - 1) // step * step
    tensors = {t.name: Tensor(t.name, t.shape, t.kind, start + t.offset) for t in found}
    return Gguf(metadata, tensors)


def convert(source: Path, target: Path, *, tie_head: bool = False, progress: Progress | None = None) -> str:
    """
    Write the model in the GGUF file `source` into the existing folder `target` as bfloat16 and return the sha256 of its
    `model.safetensors`.

    Every value is dequantised to float32 and rounded to the nearest bfloat16, ties to even: the same bytes on every
    machine. Memory stays under 100 MiB besides the mapped file, whatever the model's size. Blocks: about 12 s for 0.5B
    on two cores. `target` may be left half-written by an exception: give it a temporary folder.

    `tie_head`: the file stores an output head besides the embedding although the model was trained with one matrix for
    both, each quantised on its own. Take the finer one (the head) for both: no third of the memory for a coarser copy.

    Raises:
        MerchantError: an architecture, tensor or tokenizer this file has no words for.
    """
    gguf = read_gguf(source)
    if gguf.architecture not in ("qwen2", "llama"):
        raise MerchantError(
            f"{source.name}: GGUF files of architecture {gguf.architecture!r} cannot be converted (only 'qwen2' and "
            "'llama'); give a folder with safetensors weights instead"
        )
    tensors = {_hf_name(name): tensor for name, tensor in gguf.tensors.items()}
    if "model.embed_tokens.weight" not in tensors:
        raise MerchantError(f"{source.name} holds no token embedding: fetch it again")
    if tie_head and "lm_head.weight" in tensors:
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    config = _config(gguf, tensors)

    _dump_json(target / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    if gguf.architecture == "qwen2":  # as the original: a small model now and then ends with <|endoftext|>
        tokens["eos_token_id"] = [config["eos_token_id"], config["pad_token_id"]]
    # No sampling here: vLLM would take a repetition penalty from this file, which breaks quoting from passages.
    _dump_json(target / "generation_config.json", tokens)
    _write_tokenizer(gguf, target)
    return _write_weights(source, target / "model.safetensors", gguf, tensors, progress)


def _hf_name(name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise MerchantError(f"the GGUF file holds a tensor {name!r} that the conversion does not know; use another model")


def _config(gguf: Gguf, tensors: dict[str, Tensor]) -> dict[str, Any]:
    n_heads, hidden = int(gguf.number("attention.head_count")), int(gguf.number("embedding_length"))
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if gguf.architecture == "qwen2" else "LlamaForCausalLM"],
        "model_type": gguf.architecture,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",  # what readers before transformers 5 look for
        # The layout's version, not the installed one's: without it transformers 5 takes every local folder for a
        # Mistral tokenizer with a wrong pattern, and warns.
        "transformers_version": "4.57.3",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": int(gguf.number("feed_forward_length")),
        "num_hidden_layers": int(gguf.number("block_count")),
        "num_attention_heads": n_heads,
        "num_key_value_heads": int(gguf.number("attention.head_count_kv", n_heads)),
        "max_position_embeddings": int(gguf.number("context_length")),
        "rms_norm_eps": _short(gguf.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(gguf.number("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if gguf.architecture == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": None}
    else:
        config |= {"attention_bias": False, "mlp_bias": False, "head_dim": hidden // n_heads}
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (token := gguf.metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[ours] = int(token)
    return config


def _short(value: float) -> float:
    """Return the shortest decimal of a float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _dump_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# Tokenizer ------------------------------------------------------------------------------------------------------------


def _write_tokenizer(gguf: Gguf, target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where the file has one, the chat template."""
    meta = gguf.metadata
    kind = meta.get("tokenizer.ggml.pre")
    if meta.get("tokenizer.ggml.model") != "gpt2" or kind not in ("qwen2", "smollm"):
        raise MerchantError(f"the GGUF file has a tokenizer {kind!r}; only 'qwen2' and 'smollm' can be converted")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types: list[int] = meta["tokenizer.ggml.token_type"]
    # Unused ids ("[PAD151665]") only fill the embedding up to a round size; the original tokenizer has none of them.
    vocab = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t == NORMAL}
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": t == CONTROL,
        }
        for i, (token, t) in enumerate(zip(tokens, types, strict=True))
        if t in (CONTROL, USER_DEFINED)
    ]
    if kind == "smollm":  # its first 17 tokens are special and part of the vocabulary, as in the original file
        vocab = {str(entry["content"]): int(str(entry["id"])) for entry in added} | vocab
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split: list[dict[str, Any]]
    if kind == "qwen2":
        split = [
            {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False},
            byte_level,
        ]
    else:
        split = [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": byte_level if kind == "qwen2" else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "" if kind == "qwen2" else None,
            "end_of_word_suffix": "" if kind == "qwen2" else None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ", 1) for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    path = target / "tokenizer.json"
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")

    def token(which: str) -> str | None:
        i = meta.get(f"tokenizer.ggml.{which}_token_id")
        return None if i is None else tokens[int(i)]

    config: dict[str, Any] = {
        # Not GPT2Tokenizer: that class would build its own splitting and lose SmolLM2's digits.
        "tokenizer_class": "Qwen2Tokenizer" if kind == "qwen2" else "PreTrainedTokenizerFast",
        "model_max_length": int(gguf.number("context_length")),
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None if kind == "qwen2" else token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "additional_special_tokens": [entry["content"] for entry in added if entry["special"]],
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in added
        },
    }
    if template := meta.get("tokenizer.chat_template"):
        config["chat_template"] = template
    _dump_json(target / "tokenizer_config.json", config)


# Weights --------------------------------------------------------------------------------------------------------------


def _write_weights(
    source: Path, target: Path, gguf: Gguf, tensors: dict[str, Tensor], progress: Progress | None
) -> str:
    """Write one safetensors file (https://huggingface.co/docs/safetensors), tensors by name; return its sha256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        size = 2 * math.prod(tensors[name].shape)
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    digest, written = hashlib.sha256(), 0
    mapped: npt.NDArray[np.uint8] = np.memmap(source, dtype=np.uint8, mode="r")
    n_heads = int(gguf.number("attention.head_count"))
    heads = {"attn_q": n_heads, "attn_k": int(gguf.number("attention.head_count_kv", n_heads))}
    if gguf.architecture != "llama":
        heads = {}
    pieces = ((kind, rows) for name in sorted(tensors) for kind, rows in _pieces(mapped, tensors[name], heads))
    with target.open("wb") as file, ThreadPoolExecutor(2) as pool:
        for block in (len(head).to_bytes(8, "little"), head):
            file.write(block)
            digest.update(block)
        while batch := list(islice(pieces, 8)):  # bounded: a map over all would hold the whole model
            for data in pool.map(_to_bfloat16, batch):
                file.write(data)
                digest.update(data)
                written += len(data)
            if progress:
                progress(written, end)
        file.flush()
        os.fsync(file.fileno())
    if written != end:
        raise MerchantError(f"{source.name} gave {written} bytes of weights instead of {end}: fetch it again")
    return digest.hexdigest()


def _pieces(
    mapped: npt.NDArray[np.uint8], tensor: Tensor, heads: dict[str, int]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Yield (quantisation, bytes) of `tensor`, in order, about CHUNK elements at a time."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except ValueError as exc:
        raise MerchantError(f"tensor {tensor.name!r} has the unknown quantisation {tensor.kind}") from exc
    row = tensor.shape[-1]
    row_bytes = row // block * block_bytes
    n_rows = math.prod(tensor.shape[:-1])
    if row % block or tensor.offset + n_rows * row_bytes > len(mapped):
        raise MerchantError(f"tensor {tensor.name!r} does not fit into the file: fetch it again")
    rows = mapped[tensor.offset : tensor.offset + n_rows * row_bytes].reshape(n_rows, row_bytes)
    part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
    if n_heads := heads.get(part):
        # llama.cpp stores q and k with the two halves of a rotary pair side by side; undo it on the rows, which are
        # quantised each on their own (convert_hf_to_gguf.py, LlamaModel.permute).
        rows = rows.reshape(n_heads, n_rows // n_heads // 2, 2, row_bytes).swapaxes(1, 2).reshape(n_rows, row_bytes)
    step = max(1, CHUNK // row)
    for first in range(0, n_rows, step):
        yield tensor.kind, rows[first : first + step]


def _to_bfloat16(piece: tuple[int, npt.NDArray[np.uint8]]) -> bytes:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind, rows = piece
    # One row of all blocks: gguf works through 16 rows at a time, which is slow for narrow ones.
    values = dequantize(np.ascontiguousarray(rows).reshape(1, -1), GGMLQuantizationType(kind))
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = (bits >> np.uint32(16)) & np.uint32(1)
    rounding += np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype("<u2").tobytes()
