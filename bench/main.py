"""
`make bench`: all benchmark tables, one after the other, each also to bench/results/*.json.

Needs the default model (fetched where missing) and half an hour; nothing else should run on the machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    sys.path.insert(0, str(HERE.parent))
    from bot.catalog import load_catalog, resolve_model
    from bot.settings import default_cache_dir

    model = resolve_model(load_catalog().default_name, default_cache_dir())
    prompts = HERE / "results" / "prompts.jsonl"
    short = HERE / "results" / "engines-short.json"
    commands = [
        ["prompts.py", "--out", str(prompts)],
        # Questions that quote a policy at length, and the cases' own, whose short replies measure prefill.
        ["engines.py", "--model", str(model)],
        ["engines.py", "--model", str(model), "--prompts", str(prompts), "--out", str(short)],
        ["chat.py"],
        ["index.py"],
        ["retrieval.py", "--cache", str(default_cache_dir() / "bench")],
    ]
    for command in commands:
        print(f"== {command[0]}", flush=True)
        subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], cwd=HERE.parent, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
