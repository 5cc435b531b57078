"""How a training ends early: by a signal, or because one of the processes that train together has failed."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """Say that another process failed; the message is its line."""


class StopSignal:
    """Let Ctrl-C and SIGTERM, within `with`, ask for a stop after the step; a second one stops at once."""

    def __enter__(self) -> StopSignal:
        self.requested = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(RuntimeError):  # the signal came while something else was being printed
            print("\nstopping, to evaluate and report; once more to stop at once", file=sys.stderr, flush=True)


def agree(accelerator: Accelerator, *wishes: bool) -> tuple[bool, ...]:
    """Return for each wish whether any process has it."""
    if accelerator.num_processes == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.float32, device=accelerator.device)
    return tuple(bool(vote) for vote in accelerator.reduce(votes, "sum"))


def together(accelerator: Accelerator, action: Callable[[], T], mine: bool = True) -> T | None:
    """Do something in the processes for which it is `mine`; wait until all have done it.

    Raises:
        ElsewhereError: if it failed in another process; in that one, what it raised there.
    """
    result, failure = None, None
    try:
        if mine:
            result = action()
    except Exception as error:
        failure = error
    if accelerator.num_processes > 1:
        failures = gather_object([None if failure is None else str(failure)])
        line = next((line for line in failures if line is not None), None)
        if failure is None and line is not None:
            raise ElsewhereError(line)
    if failure is not None:
        raise failure
    return result


def main_only(accelerator: Accelerator, action: Callable[[], T]) -> T | None:
    """Do something in the main process; see `together`."""
    return together(accelerator, action, accelerator.is_main_process)


def main_first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something in the main process, then in the others, which may count on what it left; see `together`."""
    first = main_only(accelerator, action)
    rest = together(accelerator, action, not accelerator.is_main_process)
    return cast(T, first if accelerator.is_main_process else rest)  # what ran here
