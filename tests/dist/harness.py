"""Runs a function on several ranks of this machine. Start-up takes seconds per rank: run many cases in a call."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0,
                    main: Callable[..., None] | None = None) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks with the default process group initialised; return the ranks' results.

    `fn` is a function of a module, and its arguments and result can be pickled. When a rank fails the others are
    killed, and its traceback is in the RuntimeError raised here; a rank that hangs is a TimeoutError. With a `main` of
    its own in place of `rank_main`, a rank is a new process: what was forked cannot use CUDA.
    """
    with tempfile.TemporaryDirectory() as directory:
        context = fork_server() if main is None else mp.get_context("spawn")
        # No daemons: those may have no reader processes of their own.
        ranks = [context.Process(target=main or rank_main, args=(fn, rank, world_size, directory, timeout, args))
                 for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            _join(ranks, Path(directory), timeout)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [pickle.loads(Path(directory, f"result.{rank}").read_bytes()) for rank in range(world_size)]


def fork_server() -> Any:
    """Ranks are forked from a process that has imported everything and started no thread: imports take seconds."""
    root = str(Path(__file__).parents[2])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preload"])
    return context


def _join(ranks: list[Any], directory: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            break
        if time.monotonic() > deadline:
            hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"ranks {hung} did not finish within {timeout} s")
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    # The other ranks fail in their next collective; the first to write its traceback is the cause.
    errors = sorted(directory.glob("error.*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise RuntimeError(f"rank {errors[0].suffix[1:]} of {len(ranks)} failed:\n{errors[0].read_text()}")
    if failed:
        raise RuntimeError(f"rank {failed[0]} of {len(ranks)} ended with exit code {ranks[failed[0]].exitcode}")


def rank_main(fn: Callable[..., Any], rank: int, world_size: int, directory: str, timeout: float,
               args: tuple[Any, ...]) -> None:
    """What a rank's process does; the store and what the rank leaves are files in `directory`."""
    def start() -> None:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size,
                                timeout=timedelta(seconds=timeout))

    run_rank(start, fn, rank, world_size, directory, args)


def run_rank(start: Callable[[], object], fn: Callable[..., Any], rank: int, world_size: int, directory: str,
             args: tuple[Any, ...]) -> None:
    """`start` the default process group, call `fn`, and leave its result, or what went wrong, in `directory`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    try:
        start()
        result = fn(*args)
        Path(directory, f"result.{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
        # Written aside first: the parent may look at any time.
        aside = Path(directory, f"aside.{rank}")
        aside.write_text(traceback.format_exc())
        aside.rename(Path(directory, f"error.{rank}"))
        os._exit(1)  # a peer may be in a collective that never ends: no tidy shutdown
    dist.destroy_process_group()
