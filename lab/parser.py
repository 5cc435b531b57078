"""The flags of a script that has few of them; those of the experiments are read in `lab/command_line.py`."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lab.provenance import script


class Parser(argparse.ArgumentParser):
    """Parse flags: an error is one line, and no flag may be shortened."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"python {script()}", description=description, formatter_class=formatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")
