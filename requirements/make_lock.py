"""
Write the exact pins of one environment: `python requirements/make_lock.py NAME [EXTRA …]` -> requirements/NAME.lock.

pip resolves, nothing is installed. Two corrections, both measured (docs/dependencies.md):
torchvision, torchaudio and torchcodec are left out, since vLLM names them but text needs none and the
registry's builds break `transformers` next to a CPU build of torch; and torch's local version (+cpu) is cut
off, so that pip takes the CPU build where it finds one and the public build elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "zhanggui", "pip"}
HERE = Path(__file__).resolve().parent


def main() -> int:
    name, *extras = sys.argv[1:]
    target = str(HERE.parent) + (f"[{','.join(extras)}]" if extras else "")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    # cpu.lock is resolved first; core.lock (no model) and dev.lock (test tools) keep to its pins, so that one
    # environment can hold them all. cuda.lock keeps to core's.
    base = {"core": "cpu", "dev": "cpu", "cuda": "core"}.get(name)
    if base:
        command += ["--constraint", str(HERE / f"{base}.lock")]
    report = subprocess.run([*command, "--report", "-", target], check=True, stdout=subprocess.PIPE, text=True).stdout
    pins: dict[str, str] = {}
    for item in json.loads(report)["install"]:
        project = item["metadata"]["name"].lower().replace("_", "-")
        if project not in LEFT_OUT:
            pins[project] = item["metadata"]["version"].split("+")[0]
    if name == "dev":  # installed on top of cpu.lock
        base_pins = (HERE / "cpu.lock").read_text(encoding="utf-8").splitlines()
        pins = {p: v for p, v in pins.items() if f"{p}=={v}" not in base_pins}
    lines = [
        f"# Made by: python requirements/make_lock.py {' '.join(sys.argv[1:])}",
        "# Install with: pip install --no-deps -r",
    ]
    lines += [f"{project}=={version}" for project, version in sorted(pins.items())]
    (HERE / f"{name}.lock").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"requirements/{name}.lock: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
