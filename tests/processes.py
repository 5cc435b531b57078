"""Checks that run in several processes at once."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(checks: dict[str, Callable[[], None]], world_size: int, folder: Path) -> dict[str, list[str]]:
    """Failures of each check, one text for each rank that has one. The functions are of the top level of a module."""
    multiprocessing.set_forkserver_preload(["torch"])  # imported once for all of them
    context = mp.start_processes(
        _process, (checks, world_size, str(folder)), world_size, join=False, start_method="forkserver"
    )
    deadline, end = time.monotonic() + 300, ""
    try:
        while not context.join(timeout=max(deadline - time.monotonic(), 0)):
            assert time.monotonic() < deadline, "the processes wait for each other"
    except (AssertionError, mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        end = str(error)
    finally:
        for process in context.processes:
            process.kill()
    failures: dict[str, list[str]] = {}
    for name in checks:
        files = [folder / f"{rank}-{name}" for rank in range(world_size)]
        texts = [file.read_text() if file.exists() else f"{file.name}: {end}" for file in files]
        failures[name] = [text for text in texts if text]
    return failures


def _process(rank: int, checks: dict[str, Callable[[], None]], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    for name, check in checks.items():
        failure = ""
        try:
            check()
        except (Exception, pytest.fail.Exception):
            failure = f"rank {rank}: {traceback.format_exc()}"
        Path(folder, f"{rank}-{name}").write_text(failure)
    dist.barrier()
    dist.destroy_process_group()
