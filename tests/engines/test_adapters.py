"""
LoRAs that are loaded while an engine runs, as on CUDA; here by vLLM on CPU, which can do it too, only slowly.

The adapter turns the tiny model's reply into the beginning of its endless one: each reply shows by which it was made.
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from bot.engine import BoundEngine, Sampling, leased
from bot.engines import vllm as module
from bot.engines.fetched import EngineMaker
from bot.engines.releases import ReleasedEngines
from bot.engines.vllm import VllmEngine, cpu_profile, cuda_profile, engine_arguments, shortage
from bot.errors import EngineFailed, MerchantError
from bot.messages import Message
from bot.releases import StoredRelease, Wanted, load_release
from tests.engines.tiny_model import ENDLESS, REPLY, needs_vllm
from tests.releases import make_adapter, make_model
from tests.running import until

HELLO = [Message("user", "hello")]


def write_adapter(model: Path, folder: Path, *, rank: int = 1, modules: str = "model.layers.1.mlp.down_proj") -> Path:
    """
    Write a LoRA by which the token that opens the reply comes out as the one that opens the endless text.

    Rank one: what the MLP computes for the one, times the way from the one to the other. The rest of `rank` is zero.
    """
    import torch
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save_tensors
    from transformers import AutoTokenizer

    weights = {name: w.float() for name, w in load_file(model / "model.safetensors").items()}
    tokens = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(["<|reply|>", "<|endless|>"])
    embedding = weights["model.embed_tokens.weight"]
    here, there = embedding[tokens[0]], embedding[tokens[1]]
    layer = "model.layers.1"
    x = here / here.pow(2).mean().add(1e-6).sqrt() * weights[f"{layer}.post_attention_layernorm.weight"]
    gate, up = weights[f"{layer}.mlp.gate_proj.weight"] @ x, weights[f"{layer}.mlp.up_proj.weight"] @ x
    inside = torch.nn.functional.silu(gate) * up  # (intermediate,)
    a = torch.zeros(rank, inside.numel())
    b = torch.zeros(here.numel(), rank)
    a[0], b[:, 0] = inside / inside.pow(2).sum().sqrt(), (there - here) / inside.pow(2).sum().sqrt()
    folder.mkdir(parents=True)
    save_tensors(
        {f"base_model.model.{modules}.lora_A.weight": a, f"base_model.model.{modules}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": [modules.rsplit(".", 1)[1]], "base_model_name_or_path": str(model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def release_of(model: Path, folder: Path, name: str, **options: object) -> StoredRelease:
    write_adapter(model, folder / "adapter", **options)  # type: ignore[arg-type]
    (folder / "release.json").write_text(json.dumps({"name": name, "base": str(model)}))
    return load_release(folder)


async def said(engine: BoundEngine | VllmEngine, n: int = 40) -> str:
    async with aclosing(engine.stream(HELLO, Sampling(max_tokens=n))) as chunks:
        return "".join([chunk.text async for chunk in chunks])


class TestWhoIsLoadedHow:
    """What EngineMaker decides and asks vLLM for; no engine is started."""

    @pytest.fixture
    def releases(self, tmp_path: Path) -> dict[str, StoredRelease]:
        base = make_model(tmp_path / "base")
        made = {}
        for name, rank in (("small", 8), ("large", 64)):
            adapter = make_adapter(base, tmp_path / name / "adapter")
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": rank}))
            (tmp_path / name / "release.json").write_text(json.dumps({"name": name, "base": str(base)}))
            made[name] = load_release(tmp_path / name)
        (tmp_path / "merged" / "model").mkdir(parents=True)
        (tmp_path / "merged" / "release.json").write_text(json.dumps({"name": "merged", "base": str(base)}))
        return made | {"merged": load_release(tmp_path / "merged"), "bare": StoredRelease("base", None, str(base))}

    def test_on_cuda_a_lora_shares_the_engine_of_its_base_and_the_rest_has_its_own(
        self, releases: dict[str, StoredRelease], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bot.engines.fetched.profile_for_this_machine", cuda_profile)
        maker = EngineMaker(tmp_path)
        assert {name: maker.is_hot(r) for name, r in releases.items()} == {
            "small": True,
            "large": False,  # its rank is above max_lora_rank, which is room kept for each adapter
            "merged": False,
            "bare": True,
        }
        hosts = {name: maker.host_of(r) for name, r in releases.items()}
        assert hosts["small"] == hosts["bare"]
        assert len(set(hosts.values())) == 3
        assert EngineMaker(tmp_path, {"max_lora_rank": 64}).is_hot(releases["large"])
        assert not EngineMaker(tmp_path, {"max_loras": 0}).is_hot(releases["small"])

    def test_on_cpu_each_release_has_an_engine_of_its_own(
        self, releases: dict[str, StoredRelease], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bot.engines.fetched.profile_for_this_machine", cpu_profile)
        maker = EngineMaker(tmp_path)
        assert not any(maker.is_hot(r) for r in releases.values())
        assert len({maker.host_of(r) for r in releases.values()}) == 4

    async def test_a_lora_of_another_base_is_refused_before_an_engine_sees_it(
        self, releases: dict[str, StoredRelease], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("bot.engines.fetched.profile_for_this_machine", cuda_profile)
        small = releases["small"]
        assert small.adapter_dir is not None
        make_adapter(tmp_path, small.adapter_dir)
        maker = EngineMaker(tmp_path)
        await maker.prepare(small)
        weights = make_model(tmp_path / "other") / "model.safetensors"
        save_file({"model.norm.weight": np.ones(8, np.float16)}, weights)
        with pytest.raises(MerchantError, match="another base"):
            await maker.prepare(replace(small, base=str(tmp_path / "other")))

    def test_vllm_is_asked_for_as_many_adapters_as_the_profile_has_room_for(self, tmp_path: Path) -> None:
        model = make_model(tmp_path / "base")
        asked = engine_arguments(cuda_profile(), model)
        assert (asked["enable_lora"], asked["max_loras"], asked["max_cpu_loras"], asked["max_lora_rank"]) == (
            *(True, 4, 4, 32),
        )
        assert not {"enable_lora", "max_loras"} & set(engine_arguments(cpu_profile(2), model))


class TestRoomForASecondEngine:
    def test_on_cpu_weights_and_cache_are_held_against_the_memory_there_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_model(tmp_path / "base")
        assert module.available_memory() > 1 << 28
        with (model / "model.safetensors").open("r+b") as file:
            file.truncate(1_000_000_000)
        profile = cpu_profile(2).changed({"kv_cache_memory_bytes": 1_000_000_000})
        monkeypatch.setattr(module, "available_memory", lambda: 4_000_000_000)
        assert shortage(profile, model) is None
        monkeypatch.setattr(module, "available_memory", lambda: 3_000_000_000)
        assert shortage(profile, model) == (
            "a second engine needs 3.1 GB beside the first (weights 1.0 GB), and 3.0 GB are free: free some, or "
            "restart the server"
        )

    @pytest.mark.parametrize(
        ("free", "visible", "refused"),
        [(80_000, "", False), (9_000, "", True), (9_000, "1", False), (9_000, "GPU-b", False), (80_000, "0", False)],
    )
    def test_on_cuda_what_the_gpu_has_free_is_held_against_the_share_vllm_would_take(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, visible: str, refused: bool
    ) -> None:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho '0, GPU-aa, 81559, {free}'\necho '1, GPU-bb, 81559, 80000'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        why = shortage(cuda_profile(), make_model(tmp_path / "base"))
        assert (why is not None) is refused
        if why is not None:
            assert "a second engine takes 77.0 GB of GPU 0, and 9.4 GB are free" in why
            assert "restart the server" in why


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what vLLM imports for LoRA, not ours
@needs_vllm
@pytest.mark.timeout(900)
async def test_releases_are_loaded_and_forgotten_by_a_running_engine(tiny_model: Path, tmp_path: Path) -> None:
    maker = EngineMaker(
        tmp_path / "cache",
        {"max_loras": 2, "max_lora_rank": 8, "n_speculative_tokens": 0, "max_model_len": 2048, "max_num_seqs": 8}
        | {"kv_cache_memory_bytes": 1 << 26},
    )
    base = StoredRelease("tiny", None, str(tiny_model))
    first = release_of(tiny_model, tmp_path / "first", "first", rank=4)
    second = release_of(tiny_model, tmp_path / "second", "second")
    wanted = [Wanted(base)]
    engines = ReleasedEngines(maker, lambda: wanted[-1], lambda: [HELLO], check_interval_s=0.1)
    await engines.start()
    try:
        await until(lambda: engines.state().ready, 250)
        assert await said(engines) == REPLY
        host = next(iter(engines._hosts.values()))
        engine: VllmEngine = host.engine._engine  # type: ignore[attr-defined]
        (core,) = engine.processes()

        async def loaded() -> set[int]:
            found = asyncio.run_coroutine_threadsafe(engine._llm.list_loras(), engine._loop)  # type: ignore[arg-type]
            return set(await asyncio.wrap_future(found))  # a set or a list, by how the core is asked

        # 1) Published while a turn of the base is under way: each is answered by its own, in one batch.
        with engines.lease() as held:
            wanted.append(Wanted(first, "first"))
            await until(lambda: engines.status().name == "first", 250)
            assert engines.status().state == "serving"
            new, old = await asyncio.gather(said(engines), said(held))
            assert old == REPLY
            assert new == (ENDLESS * 9)[: len(new)]
            assert len(new) > 100
            assert (engines.name, engines.adapter) == ("tiny", "first")
        assert await loaded() == {1}

        # 2) Two side by side, with an identity of their own each; then one is dropped.
        wanted.append(Wanted(second, "second", beside=(first,)))
        await until(lambda: engines.names() == ("second", "first"), 250)
        assert await loaded() == {1, 2}
        with leased(engines, "first") as bound:
            assert bound is not None
            assert bound.adapter == "first"
            assert (await said(bound)).startswith(ENDLESS)
        # There is room for two.
        third = release_of(tiny_model, tmp_path / "third", "third")
        wanted.append(Wanted(third, "third", beside=(first, second)))
        await until(lambda: engines.status().state == "failed", 250)
        assert "max_loras is 2" in engines.status().detail
        wanted.append(Wanted(second, "second"))
        await until(lambda: engines.names() == ("second",), 250)
        assert engines.status().state == "serving"
        deadline = asyncio.get_running_loop().time() + 250
        while await loaded() != {2} and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        assert await loaded() == {2}

        # 3) An identity is never used again: vLLM's caches would take the new weights for the old.
        wanted.append(Wanted(first, "first"))
        await until(lambda: engines.status().name == "first", 250)
        assert 1 not in await loaded()
        with pytest.raises(EngineFailed, match="no adapter 'nobody'"):
            await anext(engine.stream(HELLO, Sampling(), adapter="nobody"))

        # 4) What is of another base is refused before vLLM sees it: that would serve the base in its name.
        other = release_of(tiny_model, tmp_path / "other", "other", modules="model.layers.9.mlp.down_proj")
        wanted.append(Wanted(other, "other"))
        await until(lambda: engines.status().state == "failed", 250)
        assert "another base" in engines.status().detail
        assert (await said(engines)).startswith(ENDLESS)
        assert engine.processes() == [core]  # one engine from beginning to end
    finally:
        await engines.close()
