"""
A made-up chat model of about 2 MB whose greedy reply is known beforehand.

It is a Qwen2 with its attention and MLP outputs set to zero, so the next token depends on the last one alone: each row
of the output layer is the embedding of the token before it. What it says is spelled in pieces that cut through
characters, as byte-level tokenizers do. No download, no training; needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bot.engines.vllm import Profile, cpu_profile

REPLY = "您好！七天内可以退货，运费由我们承担。🙂 Orders over ¥99 ship free — résumé, naïve, ß; end."
ENDLESS = "the model repeats these words for as long as it may "  # asked for by "endless" in the last message
N_PIECE_BYTES = 4  # with Chinese characters of three bytes: nearly every piece cuts one in two

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if 'endless' in messages[-1].content %}<|endless|>{% else %}<|reply|>{% endif %}{% endif %}"
)


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def tiny_profile() -> Profile:
    return cpu_profile().changed(
        {"max_model_len": 2048, "max_num_seqs": 8, "max_num_queued_reqs": 12, "kv_cache_memory_bytes": 1 << 26}
    )


def pieces_of(text: str) -> list[bytes]:
    data = text.encode()
    return [data[i : i + N_PIECE_BYTES] for i in range(0, len(data), N_PIECE_BYTES)]


def build(folder: Path, reply: str = REPLY) -> Path:
    """Write the model that replies `reply` into `folder` and return it. The same bytes each time."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()

    # 1) Vocabulary: 256 bytes, the pieces of both texts (each piece once), the special tokens.
    vocabulary: dict[str, int] = {letters[b]: b for b in range(256)}
    chains: list[list[int]] = []
    for text in (reply, ENDLESS):
        chain = []
        for n, piece in enumerate(pieces_of(text)):
            token = "".join(letters[b] for b in piece)
            if len(piece) == 1 or token in vocabulary:
                raise AssertionError(f"piece {n} of {text!r} is not unique: change the text")
            chain.append(vocabulary.setdefault(token, len(vocabulary)))
        chains.append(chain)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", "<|reply|>", "<|endless|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=_TEMPLATE
    )
    fast.save_pretrained(folder)

    # 2) What follows what.
    replies, endless = chains
    end = int(tokenizer.token_to_id("<|im_end|>") or 0)
    follows = dict(zip(replies, [*replies[1:], end], strict=True)) | dict(
        zip(endless, [*endless[1:], endless[0]], strict=True)
    )
    for opening, chain in (("<|reply|>", replies), ("<|endless|>", endless)):
        follows[int(tokenizer.token_to_id(opening) or 0)] = chain[0]

    # 3) The weights that say so.
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + -tokenizer.get_vocab_size() % 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        dtype="bfloat16",
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(config.vocab_size, config.hidden_size), dim=-1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for before, after in follows.items():
            model.lm_head.weight[after] += embedding[before].to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


def _byte_letters() -> list[str]:
    """Return the printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    table |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in table)}
    return [table[b] for b in range(256)]
