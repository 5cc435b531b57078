"""Output that ends no run: what the terminal cannot show, a reader that has gone, a stream that is closed or full."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Patient(io.FileIO):
    """Drop what a stream of the process cannot write: a run is worth more than its messages.

    Attributes:
        lost: why something was dropped, unless the reader had gone, as in `| head -1`.
    """

    lost: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = error
            return memoryview(data).nbytes


def make_patient() -> None:
    """Let stdout and stderr escape what their encoding lacks, and drop what cannot be written.

    Streams that were replaced, by a test or a notebook, stay as they are.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            raw = Patient(descriptor, "w", closefd=False)
            patient = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=True,  # also in a file, so that progress can be followed there
            )
            setattr(sys, name, patient)


def lost_output() -> OSError | None:
    """Return why a part of stdout could not be written, None if nothing is missing."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, Patient) else None
