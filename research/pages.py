"""Bring the numbers of research/results into the pages: `make results`. No number in a table is typed by hand.

A page shows the block NAME between `<!-- begin NAME -->` and `<!-- end NAME -->`, on their own lines or in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import gpu_tables
from benchmarks import tables as benchmark_tables
from lab.checkpoint import write_file
from research import comparison, tables
from research.figures import draw_all

ROOT = Path(__file__).parents[1]
PAGES = tuple(ROOT / page for page in ("README.md", "research/README.md", "benchmarks/README.md", "benchmarks/gpu.md"))
BLOCKS: dict[str, Callable[[], str]] = tables.BLOCKS | comparison.BLOCKS | benchmark_tables.BLOCKS | gpu_tables.BLOCKS
BLOCK = re.compile(r"(<!-- begin (?P<name>[^>]*?) -->)(?P<before>.*?)(<!-- end (?P=name) -->)", re.DOTALL)


def render(text: str) -> str:
    """Return the text of a page with every block made anew.

    Raises:
        ValueError: if no block has such a name, or one begins without an end.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"block {name!r}: one of {', '.join(BLOCKS)} expected")
        made = BLOCKS[name]()
        return f"{match[1]}\n{made}\n{match[4]}" if match["before"].startswith("\n") else f"{match[1]}{made}{match[4]}"

    filled, count = BLOCK.subn(fill, text)
    if count != text.count("<!-- begin ") or count != text.count("<!-- end "):
        raise ValueError(f"{count} blocks, {text.count('<!-- begin ')} begin and {text.count('<!-- end ')} end")
    return filled


if __name__ == "__main__":
    draw_all(ROOT / "docs" / "images")
    for page in PAGES:
        write_file(page, render(page.read_text()))
