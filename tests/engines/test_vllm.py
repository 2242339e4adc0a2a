"""`bot.engines.vllm`: replies, aborts, limits and errors, on a tiny model whose reply is known."""

from __future__ import annotations

import asyncio
import inspect
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from bot.engine import Chunk, Sampling
from bot.engines import vllm as module
from bot.engines.vllm import VllmEngine, cpu_profile, cuda_profile, engine_arguments
from bot.errors import EngineBusy, EngineDead, EngineFailed, EngineNotReady, MerchantError
from bot.messages import Message
from tests.engines.tiny_model import ENDLESS, REPLY, needs_vllm, pieces_of

HELLO = [Message("system", "You help."), Message("user", "你好, when do you open?")]
ENDLESSLY = [Message("user", "endless")]
ROOT = Path(__file__).resolve().parents[2]

with_engine = [needs_vllm, pytest.mark.timeout(300)]  # the first to ask waits for its start


async def read(engine: VllmEngine, messages: list[Message], sampling: Sampling | None = None) -> list[Chunk]:
    async with aclosing(engine.stream(messages, sampling or Sampling())) as chunks:
        return [chunk async for chunk in chunks]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def nothing_left(engine: VllmEngine, within_s: float = 5.0) -> None:
    """Return once the engine holds no request: neither we, nor vLLM's front end, nor its scheduler."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        figures = engine.figures()
        if not engine._outlets and figures["unfinished"] == figures["running"] == figures["waiting"] == 0:
            assert figures["kv_cache_usage"] == 0
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left behind: {engine.figures()}")


class TestReplies:
    pytestmark = with_engine

    async def test_a_reply_comes_whole_and_no_chunk_ends_within_a_character(self, engine: VllmEngine) -> None:
        chunks = await read(engine, HELLO)
        assert text_of(chunks) == REPLY
        assert len(chunks) > 5
        assert not any("\ufffd" in chunk.text for chunk in chunks)

    async def test_only_the_last_chunk_has_a_finish_and_the_counts(self, engine: VllmEngine) -> None:
        *most, last = await read(engine, HELLO)
        assert {chunk.finish for chunk in most} == {None}
        assert last.finish == "stop"
        assert sum(chunk.n_tokens for chunk in [*most, last]) == len(pieces_of(REPLY)) + 1  # and the end token
        assert last.n_prompt_tokens == engine.count_tokens(HELLO)

    async def test_the_likeliest_first_tokens_are_told_where_they_are_asked_for(self, engine: VllmEngine) -> None:
        [chunk] = await read(engine, ENDLESSLY, Sampling(max_tokens=1, n_likely=20))
        best, logprob = max(chunk.likely, key=lambda one: one[1])
        assert best == chunk.text == ENDLESS[: len(best)] != ""
        assert math.exp(logprob) > 0.5
        assert sum(math.exp(one) for _, one in chunk.likely) <= 1.001
        assert len(chunk.likely) == 20
        assert not any(chunk.likely for chunk in await read(engine, HELLO))

    async def test_a_reply_cut_within_a_character_ends_before_it_or_says_so(self, engine: VllmEngine) -> None:
        chunks = await read(engine, HELLO, Sampling(max_tokens=4))
        assert chunks[-1].finish == "length"
        assert sum(chunk.n_tokens for chunk in chunks) == 4
        assert REPLY.startswith(text_of(chunks).rstrip("\ufffd"))

    async def test_a_stop_string_ends_the_reply_and_is_left_out(self, engine: VllmEngine) -> None:
        chunks = await read(engine, HELLO, Sampling(stop=("承担",)))
        assert text_of(chunks) == REPLY[: REPLY.index("承担")]
        assert chunks[-1].finish == "stop"
        await nothing_left(engine)

    async def test_replies_at_the_same_time_do_not_mix(self, engine: VllmEngine) -> None:
        asked = [HELLO if i % 2 else ENDLESSLY for i in range(8)]
        replies = await asyncio.gather(*(read(engine, m, Sampling(max_tokens=60)) for m in asked))
        for messages, chunks in zip(asked, replies, strict=True):
            expected = REPLY if messages is HELLO else (ENDLESS * 9)[: len(text_of(chunks))]
            assert text_of(chunks) == expected
        await nothing_left(engine)

    async def test_two_event_loops_may_use_one_engine(self, engine: VllmEngine) -> None:
        replies: list[str] = []
        thread = threading.Thread(target=lambda: replies.append(text_of(asyncio.run(read(engine, HELLO)))))
        thread.start()
        replies.append(text_of(await read(engine, HELLO)))
        await asyncio.to_thread(thread.join)
        assert replies == [REPLY, REPLY]

    async def test_a_slow_reader_gets_merged_chunks_and_loses_nothing(self, engine: VllmEngine) -> None:
        async with aclosing(engine.stream(ENDLESSLY, Sampling(max_tokens=200))) as chunks:
            read = [await anext(chunks)]
            await asyncio.sleep(1.5)  # the engine is done long before
            read += [chunk async for chunk in chunks]
        assert len(read) <= 3
        assert sum(chunk.n_tokens for chunk in read) == 200
        assert text_of(read) == (ENDLESS * 20)[: len(text_of(read))]

    async def test_a_warmed_prefix_is_found_in_the_cache(self, engine: VllmEngine) -> None:
        rules = Message("system", "Returns within 7 days. 七天无理由退货。" * 8)
        await engine.warm([rules, Message("user", "?")])
        last = (await read(engine, [rules, Message("user", "How long may I return it?")]))[-1]
        n_rules = engine.count_tokens([rules])
        assert n_rules - 64 <= last.n_cached_tokens <= n_rules
        assert last.n_cached_tokens % 32 == 0

    async def test_drafts_from_the_prompt_are_accepted_where_the_reply_repeats_itself(self, engine: VllmEngine) -> None:
        before = engine.figures()
        await read(engine, ENDLESSLY, Sampling(max_tokens=100))
        after = engine.figures()
        assert after["generated_tokens"] - before["generated_tokens"] == 100
        assert after["accepted_tokens"] - before["accepted_tokens"] > 50


class TestSampling:
    """Sampling while speculating ends the core of vLLM 0.32 on CPU, or gives noise; see `mend_vllm`."""

    pytestmark = with_engine

    async def test_at_a_low_temperature_the_reply_is_the_greedy_one(self, engine: VllmEngine) -> None:
        for top_k in (20, 0):
            sampling = Sampling(temperature=0.02, top_k=top_k, max_tokens=100)
            reply = text_of(await read(engine, ENDLESSLY, sampling))
            assert reply == (ENDLESS * 20)[: len(reply)]

    async def test_at_a_high_temperature_it_is_not_and_a_seed_repeats_it(self, engine: VllmEngine) -> None:
        sampling = Sampling(temperature=2.0, top_k=50, seed=3, max_tokens=20)
        replies = [text_of(await read(engine, HELLO, sampling)) for _ in range(2)]
        assert replies[0] == replies[1] != REPLY[: len(replies[0])]

    async def test_any_mixture_of_settings_leaves_the_engine_alive(self, engine: VllmEngine) -> None:
        settings = [
            Sampling(max_tokens=n, temperature=t, top_k=k, stop=stop, seed=seed)
            for n in (1, 3, 30)
            for t, k in ((0.0, 20), (0.3, 20), (1.0, 1), (2.0, 0))
            for stop, seed in (((), None), (("ship", "may"), 7))
        ]
        places = asyncio.Semaphore(engine.profile.max_num_queued_reqs)

        async def one(i: int, sampling: Sampling) -> str | None:
            async with places:
                return (await read(engine, ENDLESSLY if i % 3 else HELLO, sampling))[-1].finish

        finishes = await asyncio.gather(*(one(i, sampling) for i, sampling in enumerate(settings)))
        assert set(finishes) <= {"stop", "length"}
        await nothing_left(engine)


class TestAborts:
    pytestmark = with_engine

    async def test_closing_the_stream_frees_its_place_and_the_next_works(self, engine: VllmEngine) -> None:
        chunks = engine.stream(ENDLESSLY, Sampling(max_tokens=1900))
        assert (await anext(chunks)).text
        assert engine.unfinished() == 1
        await chunks.aclose()
        await nothing_left(engine)
        assert text_of(await read(engine, HELLO)) == REPLY

    async def test_cancelling_the_reader_frees_its_place_and_the_next_works(self, engine: VllmEngine) -> None:
        task = asyncio.create_task(read(engine, ENDLESSLY, Sampling(max_tokens=1900)))
        while not engine.unfinished():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await nothing_left(engine)
        assert text_of(await read(engine, HELLO)) == REPLY

    async def test_cancelling_before_the_first_chunk_leaves_nothing(self, engine: VllmEngine) -> None:
        for _ in range(10):
            task = asyncio.create_task(read(engine, ENDLESSLY, Sampling(max_tokens=1900)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await nothing_left(engine)

    def test_a_caller_whose_loop_is_gone_leaves_nothing(self, engine: VllmEngine) -> None:
        async def leave() -> None:
            await anext(engine.stream(ENDLESSLY, Sampling(max_tokens=1900)))

        asyncio.run(leave())  # which closes what was left half read
        asyncio.run(nothing_left(engine))


class TestLimits:
    pytestmark = with_engine

    async def test_more_requests_than_places_are_told_to_come_back(self, engine: VllmEngine) -> None:
        limit = engine.profile.max_num_queued_reqs
        tasks = [asyncio.create_task(read(engine, ENDLESSLY, Sampling(max_tokens=1900))) for _ in range(limit)]
        while engine.unfinished() < limit:
            await asyncio.sleep(0.005)
        with pytest.raises(EngineBusy) as busy:
            await read(engine, HELLO)
        assert busy.value.retry_after_s is not None
        assert 1 <= busy.value.retry_after_s <= 60
        assert engine.unfinished() == limit
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await nothing_left(engine)
        assert text_of(await read(engine, HELLO)) == REPLY

    async def test_a_prompt_without_room_for_a_reply_is_a_bug_and_says_both_numbers(self, engine: VllmEngine) -> None:
        long = [Message("user", "很长" * 2000)]
        n_tokens = engine.count_tokens(long)
        with pytest.raises(ValueError, match=f"has {n_tokens} tokens; the limit is {engine.max_prompt_tokens}"):
            await read(engine, long)
        assert engine.unfinished() == 0

    async def test_a_long_prompt_gets_a_shorter_reply(self, engine: VllmEngine) -> None:
        n_over = engine.count_tokens([Message("user", "endless")])
        prompt = [Message("user", "endless" + "x" * (engine.max_model_len - n_over - 10))]
        chunks = await read(engine, prompt, Sampling(max_tokens=500))
        assert chunks[-1].finish == "length"
        assert sum(chunk.n_tokens for chunk in chunks) == 10

    async def test_what_vllm_refuses_fails_this_reply_only(self, engine: VllmEngine) -> None:
        with pytest.raises(EngineFailed, match="temperature"):
            await read(engine, HELLO, Sampling(temperature=-1.0))
        await nothing_left(engine)
        assert text_of(await read(engine, HELLO)) == REPLY

    async def test_a_child_that_hangs_counts_as_dead_and_may_come_back(self, engine: VllmEngine) -> None:
        patient, (child,) = engine.profile, engine.processes()
        engine.profile = patient.changed({"stall_s": 0.5})
        await engine.check_health()
        os.kill(child, signal.SIGSTOP)
        try:
            task = asyncio.create_task(read(engine, HELLO))
            await asyncio.sleep(1.0)
            with pytest.raises(EngineDead, match="no token"):
                await engine.check_health()
        finally:
            os.kill(child, signal.SIGCONT)
            engine.profile = patient
        assert text_of(await task) == REPLY
        await engine.check_health()


class TestErrors:
    @needs_vllm
    @pytest.mark.timeout(300)
    def test_every_exception_of_vllm_has_a_fate_here(self, engine: VllmEngine) -> None:
        """An upgrade that adds one fails here: decide what it means to the visitor, in `VllmEngine._generate`."""
        import vllm.exceptions
        import vllm.v1.engine.exceptions

        found = {
            name
            for library in (vllm.exceptions, vllm.v1.engine.exceptions)
            for name, value in inspect.getmembers(library, inspect.isclass)
            if issubclass(value, BaseException) and value.__module__ == library.__name__
        }
        busy = {"GracefulHTTPError", "QueueOverflowError", "MaxQueuedTokensError", "ProfilerAlreadyActiveError"}
        dead = {"EngineDeadError"}
        failed = {
            "VLLMError",
            "VLLMClientError",
            "VLLMServerError",
            "VLLMValidationError",
            "VLLMNotFoundError",
            "LoRAAdapterNotFoundError",
            "VLLMUnprocessableEntityError",
            "GenerationError",
            "RetryableRequestError",
            "EngineGenerateError",
        }
        assert found == busy | dead | failed
        for name in busy:
            assert issubclass(getattr(vllm.exceptions, name), vllm.exceptions.GracefulHTTPError)
        assert not any(
            issubclass(getattr(vllm.exceptions, name, Exception), vllm.exceptions.GracefulHTTPError) for name in failed
        )

    async def test_an_engine_that_was_not_started_is_not_ready(self, tmp_path: Path) -> None:
        engine = VllmEngine(some_model(tmp_path), "x", cpu_profile(2))
        assert engine.state().phase == "none"
        with pytest.raises(EngineNotReady):
            await read(engine, HELLO)
        with pytest.raises(EngineNotReady):
            await engine.check_health()
        assert engine.figures() == {}
        assert engine.count_tokens(HELLO) > 10
        await engine.close()
        with pytest.raises(EngineDead):
            await read(engine, HELLO)

    def test_a_folder_without_a_model_is_the_merchants_mistake(self, tmp_path: Path) -> None:
        with pytest.raises(MerchantError, match="not a model folder"):
            VllmEngine(tmp_path, "x")


def some_model(folder: Path) -> Path:
    (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    return folder


@needs_vllm
@pytest.mark.timeout(300)
async def test_closing_an_engine_while_it_loads_ends_its_core_and_no_other(engine: VllmEngine) -> None:
    (neighbour,) = engine.processes()
    other = VllmEngine(engine.model_dir, "other", engine.profile)
    start = asyncio.create_task(other.start())
    while len(multiprocessing.active_children()) < 2:
        assert not start.done()
        await asyncio.sleep(0.05)
    await other.close()
    with pytest.raises(EngineFailed):
        await start
    assert engine.processes() == [neighbour]
    assert [child.pid for child in multiprocessing.active_children()] == [neighbour]
    assert text_of(await read(engine, HELLO)) == REPLY


class TestOutlet:
    async def test_unread_chunks_are_merged_and_counted(self) -> None:
        outlet = module._Outlet(asyncio.get_running_loop())
        outlet.put(Chunk("a", n_tokens=1))
        outlet.put(Chunk("", n_tokens=1))
        outlet.put(Chunk("b", "stop", 2, 7, 3))
        assert await outlet.get() == Chunk("ab", "stop", 4, 7, 3)

    async def test_an_error_comes_after_what_was_put_before_it(self) -> None:
        outlet = module._Outlet(asyncio.get_running_loop())
        outlet.put(Chunk("a", n_tokens=1))
        outlet.fail(EngineDead("gone"))
        outlet.fail(EngineFailed("later"))
        assert (await outlet.get()).text == "a"
        with pytest.raises(EngineDead):
            await outlet.get()

    async def test_tokens_without_text_wait_for_the_next(self) -> None:
        outlet = module._Outlet(asyncio.get_running_loop())
        outlet.put(Chunk("", n_tokens=1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(outlet.get(), 0.05)
        outlet.put(Chunk("好", n_tokens=1))
        assert await outlet.get() == Chunk("好", n_tokens=2)

    def test_a_closed_loop_is_not_woken(self) -> None:
        loop = asyncio.new_event_loop()
        outlet = module._Outlet(loop)
        loop.close()
        outlet.put(Chunk("a", n_tokens=1))
        outlet.fail(EngineDead("gone"))


class TestSettings:
    def test_the_cpu_profile_names_its_executor_in_full(self, tmp_path: Path) -> None:
        arguments = engine_arguments(cpu_profile(2), some_model(tmp_path))
        assert arguments["distributed_executor_backend"] == "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        assert arguments["block_size"] == 32
        assert arguments["speculative_config"]["method"] == "ngram"
        assert arguments["enforce_eager"] is True
        assert "gpu_memory_utilization" not in arguments

    def test_the_cuda_profile_sets_its_batch_and_leaves_the_rest_to_vllm(self, tmp_path: Path) -> None:
        arguments = engine_arguments(cuda_profile(), some_model(tmp_path))
        assert (arguments["max_num_batched_tokens"], arguments["max_num_seqs"]) == (8192, 256)
        assert arguments["gpu_memory_utilization"] == 0.90
        assert (arguments["enable_lora"], arguments["max_loras"], arguments["max_lora_rank"]) == (True, 4, 32)
        assert not {"speculative_config", "block_size", "distributed_executor_backend"} & set(arguments)
        assert "LD_PRELOAD" not in module.vllm_environment(cuda_profile())

    @needs_vllm
    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("profile", [cpu_profile(2), cuda_profile()], ids=["cpu", "cuda"])
    def test_vllm_knows_every_argument(self, profile: module.Profile, engine: VllmEngine, tmp_path: Path) -> None:
        import dataclasses

        from vllm.engine.arg_utils import AsyncEngineArgs

        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        assert set(engine_arguments(profile, some_model(tmp_path))) <= known

    def test_a_prompt_is_no_longer_than_the_model_was_trained_for(self, tmp_path: Path) -> None:
        engine = VllmEngine(some_model(tmp_path), "x", cpu_profile(2))
        assert engine.max_model_len == 2048
        assert engine.max_prompt_tokens == 2048 - cpu_profile(2).reply_tokens

    def test_an_unknown_setting_is_named(self) -> None:
        assert cpu_profile(2).changed({"max_num_seqs": 4}).max_num_seqs == 4
        with pytest.raises(MerchantError, match="'max_seqs'"):
            cpu_profile(2).changed({"max_seqs": 4})

    def test_the_variables_keep_vllm_quiet_and_use_every_core(self) -> None:
        variables = module.vllm_environment(cpu_profile(2))
        assert variables["VLLM_NO_USAGE_STATS"] == variables["HF_HUB_OFFLINE"] == "1"
        assert (variables["VLLM_CPU_OMP_THREADS_BIND"], variables["OMP_NUM_THREADS"]) == ("nobind", "2")

    def test_importing_the_module_imports_no_heavy_library(self) -> None:
        code = "import sys, bot.engines.vllm; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "[]"

    def test_preloading_leaves_the_servers_own_environment_alone(self) -> None:
        before = os.environ.get("LD_PRELOAD")
        with module._environment({"LD_PRELOAD": "/x.so"}):
            assert os.environ["LD_PRELOAD"] == "/x.so"
        assert os.environ.get("LD_PRELOAD") == before

    @needs_vllm
    @pytest.mark.timeout(300)
    @pytest.mark.skipif(not module.preload_environment(), reason="tcmalloc or libiomp5 is not installed")
    def test_the_child_has_the_libraries_and_this_process_has_not(self, engine: VllmEngine) -> None:
        (child,) = engine.processes()
        loaded = Path(f"/proc/{child}/maps").read_text()
        assert "libtcmalloc_minimal" in loaded
        assert "libiomp5" in loaded
        assert "libtcmalloc_minimal" not in Path("/proc/self/maps").read_text()
