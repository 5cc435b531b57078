"""Files that are never half written, and checkpoints that are checked before they are believed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WEIGHTS, STATE, SUMS = "weights.safetensors", "state.pt", "SHA256SUMS"
KEPT = 2  # the newest checkpoint of each kind and the one before
Weights = dict[str, Tensor]
State = dict[str, Any]


class CheckpointError(ValueError):
    """Say that there is no usable checkpoint; the message is one line."""


# --- files -----------------------------------------------------------------------------------------------------------


def cause(error: OSError) -> str:
    """Say in a line which file it is about and what the system says."""
    return f"{error.filename}: {error.strerror}" if error.filename else first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: what a write says of a full disk has no name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def never_follow(path: str, flags: int) -> int:
    """Open as `open` asks for it, but no symbolic link; a pipe does not block. To be given as its `opener`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def read_file(path: Path) -> bytes:
    """Read a file that is one: no link, no pipe.

    Raises:
        OSError: if it is something else, or cannot be read.
    """
    with naming(path), open(path, "rb", opener=never_follow) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "no plain file", str(path))
        return file.read()


def write_file(path: Path, content: bytes | str) -> None:
    """Write the whole file or leave the old one as it was: aside, to the disk, then renamed.

    No symbolic link is followed: what it points to stays as it is.

    Raises:
        OSError: if the disk is full, or the folder cannot be written to.
    """
    aside = path.with_name(path.name + ".tmp")
    with naming(path):
        remove(aside)  # of a run that was killed
        try:
            with open(aside, "xb", opener=never_follow) as file:
                # names of folders may hold bytes that are no text
                file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except OSError:
            with contextlib.suppress(OSError):
                remove(aside)  # on a full disk its space is needed
            raise
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Write a line at the end of a file.

    Raises:
        OSError: if the file is a symbolic link, or cannot be written to.
    """
    with naming(path), open(path, "ab", opener=never_follow) as file:
        file.write(line.encode())


def remove(path: Path) -> None:
    """Remove a folder and all in it, or a file, or a link and not what it points to; if there is one."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except OSError as error:
            error.filename = str(path)  # it may name a file without its folder
            raise
    else:
        path.unlink(missing_ok=True)


def put_aside(path: Path) -> None:
    """Rename what is damaged to `damaged-...`, in the place of an older one."""
    aside = path.with_name(f"damaged-{path.name}")
    remove(aside)
    os.replace(path, aside)


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    if os.name == "posix":
        with naming(folder):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, kind: str, weights: Weights, state: State) -> None:
    """Write the checkpoint `<folder>/<kind>-<number>`, then remove all of its kind but the newest two.

    It is a folder with the weights in safetensors, the state in a file that loads without running code, and the
    sha256 of both in the format of `sha256sum`. It appears under its name only when it is complete.

    Args:
        folder: of the model.
        kind: "last" or "best".
        weights: a `state_dict`.
        state: tensors, numbers, strings, None, and dicts, lists and tuples of them.

    Raises:
        OSError: if the disk is full, say; the checkpoints before are untouched.
    """
    before = _newest_first(folder, kind)
    number = _number(before[0]) + 1 if before else 1
    buffer = io.BytesIO()
    torch.save(state | {"number": number}, buffer)
    contents = {
        WEIGHTS: safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}),
        STATE: buffer.getvalue(),
    }
    contents[SUMS] = "".join(f"{_sha256(data)}  {name}\n" for name, data in contents.items()).encode()

    path, aside = folder / f"{kind}-{number:06d}", folder / f"{kind}.tmp"
    remove(aside)
    try:
        aside.mkdir(parents=True)
        for name, data in contents.items():
            write_file(aside / name, data)
        os.replace(aside, path)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(folder)
    for old in before[KEPT - 1 :]:
        remove(old)


def load_checkpoint(
    folder: Path, kind: str, accept: Callable[[Weights, State], object] | None = None, set_aside: bool = False
) -> tuple[Weights, State, list[str]] | None:
    """Find the newest checkpoint of a kind that is undamaged and can be used.

    Args:
        folder: of the model.
        kind: "last" or "best".
        accept: puts it to use; whatever it raises, the checkpoint counts as damaged.
        set_aside: rename a damaged one to `damaged-...`, so that it is not counted again. For the process that holds
            the lock.

    Returns:
        weights, state and one line for each damaged checkpoint that was passed over; None where there is none at all.

    Raises:
        CheckpointError: if there are some, all damaged.
        OSError: if a damaged one cannot be renamed.
    """
    lines: list[str] = []
    for path in _newest_first(folder, kind):
        try:
            weights, state = _read(path)
            if accept is not None:
                accept(weights, state)
            return weights, state, lines
        except Exception as error:  # its sums may be good and its content anything
            lines.append(f"{path} is damaged ({first_line(error)}): falling back to the checkpoint before")
            if set_aside:
                put_aside(path)
    if lines:
        raise CheckpointError(f"{folder}: every {kind} checkpoint is damaged; start again under another --name")
    return None


def _read(path: Path) -> tuple[Weights, State]:
    if path.is_symlink():
        raise CheckpointError("a symbolic link")
    sums = dict(line.split("  ", 1)[::-1] for line in read_file(path / SUMS).decode().splitlines())
    contents = {name: read_file(path / name) for name in (WEIGHTS, STATE)}
    for name, data in contents.items():
        if sums.get(name) != _sha256(data):
            raise CheckpointError(f"sha256 of {name} is not that in {SUMS}")
    state = torch.load(io.BytesIO(contents[STATE]), map_location="cpu", weights_only=True)
    if state.get("number", _number(path)) != _number(path):
        raise CheckpointError(f"it was {state['number']}")
    return safetensors.torch.load(contents[WEIGHTS]), state


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _newest_first(folder: Path, kind: str) -> list[Path]:
    """Return all that has the name of a checkpoint; a copy beside it, as `best-000004.bak`, has not."""
    named = [path for path in folder.glob(f"{kind}-*") if re.fullmatch(rf"{kind}-\d{{6,}}", path.name)]
    return sorted(named, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])
