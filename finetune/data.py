"""
Opens a data folder for training: whole, unchanged since its import, and masked, or not at all.

The manifest's word is not taken for it: every text is looked through once more for numbers, cards, addresses of e-mail …
by their shape.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.errors import MerchantError
from finetune.dialogues import Dialogue, parse_dialogue
from finetune.importing import FORMAT_VERSION, MANIFEST, SPLITS
from finetune.pii import compact_values, residual

# The format of a folder whose files hold conversations as they are trained on, passages and all (examples/recipe).
RENDERED = "rendered-1"


@dataclass(frozen=True)
class Data:
    """The dialogues of a data folder."""

    folder: Path
    sha256: str  # of the manifest's files: names this data in every run and release
    splits: dict[str, list[Dialogue]]
    rendered: bool = False  # the files hold conversations, `splits` nothing
    lineage: dict[str, Any] | None = None  # how it was made of other data: the teacher, what was dropped


def load_data(folder: Path) -> Data:
    """
    Return the dialogues in `folder`.

    Raises:
        MerchantError: not a data folder, changed since its import, or personal data in it; file and line are named.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, masked, version = manifest["files"], manifest["masked"], manifest["format"]
    except FileNotFoundError:
        raise MerchantError(
            f"{str(folder)!r} is no imported data: run `python -m finetune import FILE… --out DIR` first, which masks it"  # noqa: E501
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise MerchantError(f"{path}: not readable ({exc}); import the data again") from None
    if version == RENDERED:
        for split in SPLITS:
            _check_rendered(folder / f"{split}.jsonl", files)
        return Data(folder, str(manifest["data_sha256"]), {split: [] for split in SPLITS}, rendered=True)
    if version != FORMAT_VERSION:
        raise MerchantError(f"{path}: written by another version of this program; import the data again")
    if masked is not True:
        raise MerchantError(f"{path}: the data is not masked; import it again")
    keep = compact_values(manifest.get("keep", ()))
    splits = {split: _load(folder / f"{split}.jsonl", files, keep) for split in SPLITS}
    if not splits["train"]:
        raise MerchantError(f"{folder / 'train.jsonl'}: no dialogues to train on")
    return Data(folder, str(manifest["data_sha256"]), splits, lineage=manifest.get("lineage"))


def _read(path: Path, files: dict[str, dict[str, str]]) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise MerchantError(f"{path}: cannot be read ({exc}); import the data again") from None
    if hashlib.sha256(raw).hexdigest() != files.get(path.name, {}).get("sha256"):
        raise MerchantError(f"{path}: changed since its import (sha256 differs); import the data again")
    return raw


def _check_rendered(path: Path, files: dict[str, dict[str, str]]) -> None:
    """A store's passages hold its own numbers and addresses, so only the shape is looked at."""
    for number, line in enumerate(_read(path, files).decode("utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            whole = len(raw["learn"]) == len(raw["messages"]) and isinstance(raw["kind"], str)
            whole = whole and all(isinstance(c, str) and isinstance(r, str) for r, c in raw["messages"])
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise MerchantError(f"{path}:{number}: no rendered conversation; make the data again")


def _load(path: Path, files: dict[str, dict[str, str]], keep: frozenset[str]) -> list[Dialogue]:
    raw = _read(path, files)
    dialogues = []
    for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
        source = f"{path}:{number}"
        try:
            dialogue = parse_dialogue(line, source)
        except ValueError as exc:
            raise MerchantError(f"{source}: {exc}; import the data again") from None
        for n, message in enumerate(dialogue.lines):
            if kind := residual(message.text, keep):
                raise MerchantError(f"{source}, messages[{n}].content: holds personal data ({kind}); import it again")
        dialogues.append(dialogue)
    return dialogues
