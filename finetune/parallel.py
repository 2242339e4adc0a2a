"""
Several processes that train one model: who they are, which rows each takes, and what they add up.

Data parallel by rows. A step is planned once and dealt out, so every row is one process's alone; gradients are summed
over the processes once a step, after all its rows, and every learned token weighs the same whichever process had it: two
processes make the step that one would, up to the order of floating-point additions. With `fsdp` the weights, their
gradients and AdamW's moments are sharded (torch's FSDP2); what a method trains beside frozen weights stays whole.

Knows tensors and processes; no run, no file. DDP is not used: it averages over processes, which is wrong where their
numbers of learned tokens differ, and waits for the same number of rows in each.
"""  # noqa: E501

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bot.errors import BotError, MerchantError
from finetune.config import RunConfig
from finetune.examples import Row

Main = Callable[[list[str]], int]


class ProcessFailed(BotError):
    """One of a run's processes ended as none should; the others were ended too."""

    def __init__(self, rank: int, words: str) -> None:
        super().__init__(rank, words)
        self.rank, self.words = rank, words

    def __str__(self) -> str:
        return f"process {self.rank} of the run: {self.words}; --resume goes on from the last checkpoint"


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; alone by default."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def writes(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    def wait(self) -> None:
        """Block until every process is here."""
        if self.size > 1:
            dist.barrier()

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over the processes, in place."""
        if self.size > 1:
            there = values.to(self.device)
            dist.all_reduce(there)
            values.copy_(there)
        return values

    def any(self, flag: bool) -> bool:
        return bool(self.add(torch.tensor(float(flag), dtype=torch.float64)) > 0)

    def gather(self, thing: Any) -> list[Any]:
        """Return `thing` of every process, in the order of their ranks."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over the processes; one without a row in this step has none yet. FSDP sums its own."""
        if self.size == 1:
            return
        works = []
        for p in parameters:
            if is_sharded(p):
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            works.append(dist.all_reduce(p.grad, async_op=True))
        for work in works:
            work.wait()


# --- Rows ------------------------------------------------------------------------------------------------------------


def deal(rows: Sequence[Row], sizes: Sequence[int], n: int) -> list[list[Row]]:
    """Return the rows of each of `n` processes: each row once, the largest first to whoever has the fewest tokens."""
    dealt: list[list[Row]] = [[] for _ in range(n)]
    load = [0] * n
    for k in sorted(range(len(rows)), key=lambda k: (-sizes[k], k)):
        to = min(range(n), key=lambda r: (load[r], r))
        dealt[to].append(rows[k])
        load[to] += sizes[k]
    return dealt


# --- Sharded weights -------------------------------------------------------------------------------------------------


def is_sharded(p: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def whole(p: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole and on the CPU; every process has to ask."""
    full: torch.Tensor = p.full_tensor() if is_sharded(p) else p
    return full.detach().cpu().contiguous()


def like(values: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return `values`, which are whole, as `p` is: this process's shard of them, on its device."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(p):
        return values
    return distribute_tensor(values.to(p.device), p.device_mesh, p.placements)


def shard(model: Any, config: RunConfig, ranks: Ranks) -> Any:
    """
    Shard `model`, on the CPU and equal in every process, layer by layer; return it. What is trained beside frozen
    weights stays whole.

    Raises:
        MerchantError: the model does not say what its layers are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(inner, "_no_split_modules", None) or ())
    layers = [m for m in inner.modules() if type(m).__name__ in names]
    if not layers:
        raise MerchantError("fsdp: this model does not say what its layers are; train without it")
    frozen = config.method != "full"
    kept = {p for p in model.parameters() if p.requires_grad} if frozen else set()
    half = torch.bfloat16 if config.bf16 and not frozen else None
    how: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.partition(":")[0], (ranks.size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
        "ignored_params": kept,
    }
    for p in kept:
        p.data = p.data.to(ranks.device)
    for layer in layers:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def sync_on(model: Any, yes: bool) -> None:
    """Whether the next backward pass of a sharded model sums its gradients over the processes."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(yes)


# --- Starting --------------------------------------------------------------------------------------------------------


def is_alone() -> bool:
    """Whether nobody has started this process as one of several: not `launch`, not torchrun, not `accelerate launch`."""  # noqa: E501
    return not dist.is_initialized() and not dist.is_torchelastic_launched()


def device_of(config: RunConfig, local_rank: int = 0) -> str:
    """
    Return where this process computes: "cpu", "cuda:0", …

    Raises:
        MerchantError: CUDA is asked for and not there, or there are fewer GPUs than processes.
    """
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise MerchantError("device: cuda is not available here; use auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise MerchantError(f"gpus: {local_rank + 1} or more asked for, and {torch.cuda.device_count()} here")
    # cuDNN's attention builds a plan for every new length of a row (2,000 tokens a second on an H100), is not
    # deterministic, and under the masks of joined conversations the loss became NaN at step 22 (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return f"cuda:{local_rank}"


def ranks_of(config: RunConfig) -> Ranks:
    """
    Return this process's place, joining the others where there are some.

    Raises:
        MerchantError: the launcher started another number of processes than `gpus`, or there is no such device.
    """
    if not dist.is_initialized() and dist.is_torchelastic_launched():
        _join(config)
    if not dist.is_initialized():
        return Ranks(device=device_of(config))
    rank, size = dist.get_rank(), dist.get_world_size()
    if size != config.gpus:
        raise MerchantError(f"gpus is {config.gpus}, and {size} processes were started: make them equal")
    local = rank % max(1, torch.cuda.device_count()) if torch.cuda.is_available() else rank
    device = device_of(config, local)
    if device != "cpu":
        torch.cuda.set_device(device)
    return Ranks(rank, size, device)


def _join(config: RunConfig, **where: Any) -> None:
    backend = "gloo" if device_of(config) == "cpu" else "nccl"
    # Rank 0 may search a store for an hour before the first step; a process that dies is noticed at once all the same.
    dist.init_process_group(backend, timeout=timedelta(hours=12), **where)


def launch(main: Main, arguments: list[str], config: RunConfig) -> int:
    """
    Run `main(arguments)` in `config.gpus` new processes of this machine; return the exit status of who fails first.

    SIGINT and SIGTERM reach all of them, so that a run is interrupted as one process is. Rank 0 alone says something.

    Raises:
        ProcessFailed: one was killed, or met an error that nothing foresaw.
    """
    import torch.multiprocessing as mp

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    mp.get_context("forkserver").set_forkserver_preload(
        ["finetune.train", "transformers", "peft"]
    )  # loaded once, not by each
    context = mp.start_processes(
        _child, (_importable(main), arguments, config, address), config.gpus, join=False, start_method="forkserver"
    )
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def pass_on(number: int, frame: Any) -> None:
        for pid in context.pids():
            os.kill(pid, number)

    for number in before:
        signal.signal(number, pass_on)
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as exc:
        if exc.exit_code < 0:
            raise ProcessFailed(exc.error_index, f"killed by signal {-exc.exit_code}") from None
        return int(exc.exit_code)
    except mp.ProcessRaisedException as exc:
        raise ProcessFailed(exc.error_index, str(exc).strip().splitlines()[-1]) from exc
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _importable(main: Main) -> Main:
    """Return `main` as a new process finds it: under `python -m` it is in `__main__`, another one there."""
    spec = sys.modules["__main__"].__spec__
    if main.__module__ != "__main__" or spec is None:
        return main
    found: Main = getattr(importlib.import_module(spec.name), main.__name__)
    return found


def _child(rank: int, main: Main, arguments: list[str], config: RunConfig, address: str) -> None:
    if rank:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)
    _join(config, init_method=address, rank=rank, world_size=config.gpus)
    status = main(arguments)
    dist.destroy_process_group()
    raise SystemExit(status)
