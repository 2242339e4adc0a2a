"""A random chat model of a few hundred kilobytes over bytes, and data folders to train it on. No download."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bot.prompt import render_prompt
from finetune.grounding import NO_STORE
from finetune.importing import ImportConfig, import_dialogues

# Chat templates by their behaviour; each is what its family does to plain text messages.
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Qwen2.5 puts a system message of its own in front where there is none.
QWEN25 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}" + CHATML
# Qwen3 writes (empty) thoughts before the reply that comes last, and drops them from earlier ones.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma has no system role: its text goes before the first question; the assistant is called model.
GEMMA = (
    "<bos>{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ ns.system }}{{ m.content | trim }}<end_of_turn>\n{% set ns.system = '' %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<|pad|>"]


def build_model(folder: Path, template: str = CHATML, *, sliding: bool = False) -> Path:
    """Write a random Qwen2 of two layers into `folder` and return it; the same bytes each time."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIALS])
    # The system message is one token here: nine hundred bytes of it in every example would be all that is computed.
    tokenizer.add_tokens([AddedToken(render_prompt(NO_STORE, (), "", (), "zh")[0].content, normalized=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=template
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        pad_token_id=tokenizer.token_to_id("<|pad|>"),
        use_sliding_window=sliding,
        sliding_window=16 if sliding else None,
        max_window_layers=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def build_data(folder: Path, n: int = 60) -> Path:
    """Import `n` small dialogues into the data folder `folder` and return it."""
    rng = random.Random(1)
    goods = ["lamp", "rug", "pan", "quilt", "shelf", "毛巾", "台灯", "书架"]
    lines = []
    for i in range(n):
        item, word = goods[i % len(goods)], "".join(rng.choice("abcdefghij") for _ in range(14))
        talk = [("user", f"is the {item} {word[:7]} here?"), ("assistant", f"yes, the {item} is: {word[7:]}.")]
        if i % 3 == 0:
            talk += [("user", f"and {word[3:9]}?"), ("assistant", f"no {word[::-1][:8]}, sorry.")]
        lines.append({"messages": [{"role": r, "content": c} for r, c in talk]})
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines), encoding="utf-8")
    import_dialogues(ImportConfig(files=(str(source),), valid=0.2, test=0.2), folder)
    return folder
