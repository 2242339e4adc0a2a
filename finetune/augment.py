"""
More wordings of a dialogue's first question: typos, noise, templates. Optional, for the training side only. Pure.

Replies are never changed, nor are numbers and placeholders: what is learned stays what an agent wrote. Deterministic by
the dialogue's id and the seed. Whether it helps is for the gate to say.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from finetune.dialogues import Dialogue

KINDS = ("typos", "noise", "templates")

# Pinyin neighbours people pick by mistake, and letters beside each other on a keyboard.
_HOMOPHONES = dict(
    zip("在的做像运费退货快递发请问你您哪那吗嘛以已", "再得作象云非推或块第法清文尼您那哪嘛吗已以", strict=True)
)
_KEYS = {"a": "s", "e": "r", "i": "o", "n": "m", "o": "p", "r": "t", "s": "d", "t": "y", "u": "i", "l": "k"}
_FRAMES = {
    "zh": ("你好，{}", "请问{}", "亲，{}", "{}谢谢", "麻烦问一下，{}", "{}急"),
    "en": ("Hi, {}", "quick question: {}", "{} thanks", "hello! {}", "Can you tell me: {}"),
}
_FIXED = re.compile(r"\[[A-Z]+_\d+\]|[A-Za-z]*\d[\w.\-]*")


def augmented(dialogue: Dialogue, kinds: Sequence[str], seed: int) -> list[Dialogue]:
    """Return one variant of `dialogue` for each of `kinds` that changes its first question."""
    variants = []
    for kind in kinds:
        rng = random.Random(f"{seed}:{kind}:{dialogue.id}")
        first = dialogue.lines[0]
        text = {"typos": _typos, "noise": _noise, "templates": _template}[kind](first.text, rng, dialogue.lang)
        if text != first.text:
            lines = (replace(first, text=text), *dialogue.lines[1:])
            variants.append(replace(dialogue, id=f"{dialogue.id}-{kind}", lines=lines))
    return variants


def _parts(text: str) -> list[str]:
    """Return `text` in pieces, the odd ones fixed: numbers, codes, placeholders."""
    pieces, at = [], 0
    for match in _FIXED.finditer(text):
        pieces += [text[at : match.start()], match.group()]
        at = match.end()
    return [*pieces, text[at:]]


def _typos(text: str, rng: random.Random, lang: str) -> str:
    pieces = _parts(text)
    for n in range(0, len(pieces), 2):
        chars = list(pieces[n])
        for i, char in enumerate(chars):
            if rng.random() < 0.06:
                chars[i] = _HOMOPHONES.get(char, _KEYS.get(char, char))
            elif char.isalpha() and char.isascii() and i and rng.random() < 0.03:
                chars[i - 1], chars[i] = chars[i], chars[i - 1]
        pieces[n] = "".join(chars)
    return "".join(pieces)


def _noise(text: str, rng: random.Random, lang: str) -> str:
    changed = re.sub(r"[？?。.!！]+\s*$", "", text)
    if lang == "en" and rng.random() < 0.7:
        changed = "".join(p if n % 2 else p.lower() for n, p in enumerate(_parts(changed)))
    return changed + rng.choice(
        ("", "？？", "...", "～", "!!", " 🙏") if lang == "zh" else ("", "??", "...", " pls", "!!")
    )


def _template(text: str, rng: random.Random, lang: str) -> str:
    return rng.choice(_FRAMES.get(lang, _FRAMES["en"])).format(text)
