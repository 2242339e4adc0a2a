"""
A finished run -> the folder that is shipped: `python examples/recipe/release.py --run RUN --out bot/default_release`.

Writes the adapter in bfloat16, which halves the file and costs nothing (the merged weights are rounded to it anyway), its
configuration, and release.json with where it comes from. README.md, the model card, is written by people and left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from bot.catalog import resolve_model  # noqa: E402

MAX_BYTES = 12_000_000


def write_release(run: Path, out: Path, name: str) -> dict[str, object]:
    """Write the release of `run` into `out` and return release.json; refuses an adapter above 12 MB."""
    import torch
    from safetensors.torch import load_file, save_file

    head = json.loads((run / "run.json").read_text(encoding="utf-8"))
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    adapter = out / "adapter_model.safetensors"
    tensors = load_file(run / "result" / "adapter_model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, adapter, metadata={"format": "pt"})
    adapter.chmod(0o644)  # safetensors writes for its owner only
    if adapter.stat().st_size > MAX_BYTES:
        sys.exit(
            f"{adapter}: {adapter.stat().st_size:,} bytes, and {MAX_BYTES:,} may be shipped: a lower rank, or fewer layers"
        )
    shutil.copy(run / "result" / "adapter_config.json", out / "adapter_config.json")
    digest = hashlib.sha256()
    for path in sorted(resolve_model(head["base"]).glob("*.safetensors")):
        digest.update(path.read_bytes())
    release = {
        "name": name,
        "base": head["base"],
        "base_sha256": digest.hexdigest(),
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "prompt_version": head["prompt_version"],
        "data_sha256": head["data_sha256"],
        "config": {k: v for k, v in head["config"].items() if k not in ("data", "store", "start_from")},
        "start_from_sha256": head.get("start_from_sha256"),
        "code": head["environment"]["commit"],
        "packages": head["environment"]["packages"],
        "n_examples": head["n_examples"],
        "n_tokens": result["n_tokens"],
        "seconds": result["seconds"],
        "best_loss": result["best_loss"],
    }
    (out / "release.json").write_text(json.dumps(release, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return release


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a finished run as the release that is shipped.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run of `finetune train`")
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "bot" / "default_release", metavar="DIR")
    parser.add_argument("--name", default="qinghe-0.5b-3", help="of the release; a new one for each")
    options = parser.parse_args()
    release = write_release(options.run, options.out, options.name)
    print(json.dumps({k: release[k] for k in ("name", "base", "adapter_sha256")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
