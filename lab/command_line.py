"""From flags to settings, and from errors to one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from lab.checkpoint import CheckpointError, cause
from lab.corpora import CorpusError
from lab.processes import ElsewhereError
from lab.run import RunConfig
from lab.settings import InputError
from lab.training import TrainingError

PATIENCE = 10  # seconds that a process waits for another to say what is wrong
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


class Parser(argparse.ArgumentParser):
    """Of scripts with few flags: says what is wrong in one line, and takes no abbreviations."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(arguments: Sequence[str], presets: dict[str, AnyConfig]) -> AnyConfig:
    """The preset with the flags on top; the first preset is the default.

    Raises:
        InputError: a flag or a value that does not exist; the message is one line.
    """
    default = next(iter(presets.values()))
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", default=default.preset)
    preset = presets.get(chosen.parse_known_args(arguments)[0].preset, default)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = tyro.cli(type(preset), args=arguments, default=preset)
    except SystemExit as stopped:
        if not stopped.code:
            raise  # --help
        raise InputError(_without_box(message.getvalue())) from None
    config.check()
    return config


def _without_box(message: str) -> str:
    """What tyro says in its box, between the title and the hint at --help, in one line."""
    lines = (line.strip("╭╮╰╯│─ ") for line in message.splitlines())
    _, *inside = (line for line in lines if line.strip("-"))
    return " ".join(itertools.takewhile(lambda line: not line.startswith("For full helptext"), inside))


def exit_code(command: Callable[[], int]) -> int:
    """What the command returns; 1 if it failed, 2 if its input was wrong, 130 if it was interrupted, each with one line
    on stderr."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # until here Ctrl-C ended it without a word
    try:
        return command()
    except (InputError, CorpusError, CheckpointError, ElsewhereError) as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{cause(error)}; nothing that was written is lost, --resume goes on", 1)
    except KeyboardInterrupt:
        return _fail("stopped at once; go on with --resume", 130)
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, code: int) -> int:
    """Say in one process what is wrong; the others wait for their launcher, which ends all once that one has."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(PATIENCE)
    return code
