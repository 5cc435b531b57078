"""From flags to settings, and from errors to one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from lab.checkpoint import CheckpointError, cause
from lab.corpora import CorpusError
from lab.processes import ElsewhereError
from lab.provenance import script
from lab.run import RunConfig
from lab.settings import InputError
from lab.terminal import lost_output, make_patient
from lab.training import TrainingError

PATIENCE = 10  # seconds that a process waits for another to say what is wrong
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
REGISTRY = ConstructorRegistry()  # what tyro reads in another way than by itself


def parse(arguments: Sequence[str], presets: dict[str, AnyConfig]) -> AnyConfig:
    """Return the preset that the arguments name, changed by their other flags; the first preset is the default.

    `--demo` is short for `--preset demo`.

    Raises:
        SystemExit: with code 0 after --help, 2 if a flag does not exist or a value is of the wrong kind.
        InputError: if a value is out of range.
    """
    words = ["--preset=demo" if word == "--demo" else word for word in arguments]
    default = next(iter(presets.values()))
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", nargs="?", default=default.preset)  # without a value tyro says so
    preset = presets.get(chosen.parse_known_args(words)[0].preset, default)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(
                type(preset),
                prog=f"python {script()}",
                args=words,
                default=preset,
                registry=REGISTRY,
                console_outputs=_speaks(),
            )
    except SystemExit:
        if said.getvalue():
            print(f"error: {_one_line(said.getvalue())}", file=sys.stderr, flush=True)
        raise
    config.check()
    return config


def _one_line(box: str) -> str:
    """Return what tyro says in a box: what is wrong, up to the first rule or blank line, and the flags it names."""

    def is_rule(line: str) -> bool:
        return not line.strip("─-")  # dashes where the terminal has no UTF-8

    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]]
    lines = list(dropwhile(is_rule, lines))
    said = list(takewhile(lambda line: not is_rule(line), lines))
    wrong = " ".join(said).removeprefix("Error parsing ").rstrip(". ")
    flags = ", ".join(line for line in lines[len(said) :] if re.match(r"--\w", line))
    return f"{wrong}; see {flags} in --help" if flags else f"{wrong}; see --help"


@REGISTRY.primitive_rule
def _none(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
    """Accept "none" for None, in small letters too."""

    def read(words: list[str]) -> None:
        if words[0].lower() != "none":
            raise ValueError(f"{words[0]!r} is not none")

    if kind.type is not type(None):
        return None
    return PrimitiveConstructorSpec(1, "none", read, lambda value: value is None, lambda _: ["none"])


@REGISTRY.primitive_rule
def _path(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Refuse the empty path, which would be the current folder."""

    def read(words: list[str]) -> Path:
        if not words[0]:
            raise ValueError("empty; the current folder is called .")
        return Path(words[0])

    if kind.type is not Path:
        return None
    return PrimitiveConstructorSpec(1, "PATH", read, lambda value: isinstance(value, Path), lambda path: [str(path)])


def exit_code(command: Callable[[], int], go_on: str = "--resume goes on") -> int:
    """Run a command, and turn its errors into one line on stderr.

    Args:
        command: returns an exit code.
        go_on: how to go on with what was stopped.

    Returns:
        what the command returns; 1 if it failed, 2 if its input was wrong, 130 if it was interrupted.
    """
    make_patient()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # until here Ctrl-C ended it without a word
    try:
        code = command()
        lost = lost_output()
        return code if lost is None else _fail(f"stdout: {lost.strerror}", 1)
    except SystemExit as stopped:  # the parser has said what is wrong
        if stopped.code:
            _let_speak()
        raise
    except (InputError, CorpusError, CheckpointError, ElsewhereError) as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{cause(error)}; nothing that was written is lost, {go_on}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        return _fail("out of memory; a smaller --batch-size or --hidden needs less", 1)
    except (KeyboardInterrupt, ImportError) as error:
        if isinstance(error, ImportError) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise  # else Ctrl-C came while a compiled module was being imported, which turned it into this
        return _fail(f"stopped at once; {go_on}", 130)
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(message: str, code: int) -> int:
    """Say in one process what is wrong."""
    if _speaks():
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # else threads of the process group may abort the exit
            sys.stdout.flush()
            os._exit(code)
    _let_speak()
    return code


def _speaks() -> bool:
    """Tell whether this process speaks: of several, one on each machine does; torchrun numbers them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _let_speak() -> None:
    """Let the other processes wait for their launcher, which ends all once that one has."""
    if not _speaks():
        time.sleep(PATIENCE)
