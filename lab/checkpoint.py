"""Files that are never half written, and checkpoints that are checked before they are believed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WEIGHTS, STATE, SUMS = "weights.safetensors", "state.pt", "SHA256SUMS"
KEPT = 2  # the newest checkpoint of each kind and the one before


class CheckpointError(ValueError):
    """No usable checkpoint; the message is one line."""


def write_file(path: Path, content: bytes | str) -> None:
    """Write the whole file or leave the old one as it was: aside, to the disk, then renamed.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk its space is needed
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(folder: Path, kind: str, weights: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint `<folder>/<kind>-<number>`, then remove all of its kind but the newest two.

    It is a folder with the weights in safetensors, the state in a file that loads without running code, and the
    sha256 of both in the format of `sha256sum`. It appears under its name only when it is complete.

    Args:
        folder: of the model.
        kind: "last" or "best".
        weights: a `state_dict`.
        state: tensors, numbers, strings, None, and dicts, lists and tuples of them.

    Raises:
        OSError: the disk is full; the checkpoints before are untouched.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    contents = {
        WEIGHTS: safetensors.torch.save({name: tensor.contiguous() for name, tensor in weights.items()}),
        STATE: buffer.getvalue(),
    }
    contents[SUMS] = "".join(f"{_sha256(data)}  {name}\n" for name, data in contents.items()).encode()

    before = _newest_first(folder, kind)
    number = _number(before[0]) + 1 if before else 1
    path, aside = folder / f"{kind}-{number:06d}", folder / f"{kind}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
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
        shutil.rmtree(old)
    return path


def load_checkpoint(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest undamaged checkpoint of a kind.

    A damaged one is renamed to `damaged-...`, so that it is neither believed nor counted again.

    Returns:
        weights, state and one line for each damaged checkpoint that was passed over; None where there is none at all.

    Raises:
        CheckpointError: there are some, all damaged.
    """
    lines = []
    for path in _newest_first(folder, kind):
        try:
            return *_read(path), lines
        except (OSError, ValueError) as error:
            lines.append(f"{path} is damaged ({_first_line(error)}): falling back to the checkpoint before")
            shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
            os.replace(path, path.with_name(f"damaged-{path.name}"))
    if lines:
        raise CheckpointError(f"{folder}: every {kind} checkpoint is damaged; start again under another --name")
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    sums = dict(reversed(line.split("  ", 1)) for line in (path / SUMS).read_text(errors="replace").splitlines())
    contents = {name: (path / name).read_bytes() for name in (WEIGHTS, STATE)}
    for name, data in contents.items():
        if sums.get(name) != _sha256(data):
            raise CheckpointError(f"sha256 of {name} is not that in {SUMS}")
    state = torch.load(io.BytesIO(contents[STATE]), map_location="cpu", weights_only=True)
    return safetensors.torch.load(contents[WEIGHTS]), state


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _newest_first(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"{kind}-[0-9]*"), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
