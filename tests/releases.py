"""Small models and adapters on disk, written with numpy alone: no torch, no peft, milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROWS, COLUMNS, RANK = 12, 8, 2
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def make_model(folder: Path) -> Path:
    """Write weights in float16, a configuration and a tokenizer's file: enough to be checked, merged and refused."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    weights = {f"{module}.weight": rng.normal(size=(ROWS, COLUMNS)).astype(np.float16) for module in MODULES}
    weights["model.norm.weight"] = np.ones(COLUMNS, np.float16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """Write a LoRA of `make_model`'s weights, as peft names its parts."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for module in MODULES:
        weights[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(RANK, COLUMNS)).astype(np.float32)
        weights[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(ROWS, RANK)).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "use_rslora": True, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
