"""The figure that shows where a translator looks."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font


def draw_attention(attention: dict[str, Any], backwards: bool) -> bytes:
    """Draw the weights of a sentence: a column for each character that was written, a row for each of the source.

    Args:
        attention: "source", "translation", and "per_cent": for each character that was written the weights of the
            source from its beginning on, as whole numbers with blanks.
        backwards: whether the model read the source from its end.

    Returns:
        a PNG.
    """
    weights = [[int(number) for number in row.split()] for row in attention["per_cent"]]  # written x source
    size = 0.115  # inches a character: a sentence is legible on a phone
    figure = Figure(figsize=(1.2 + size * len(weights), 1.2 + size * len(weights[0])), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(list(zip(*weights, strict=True)), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    fonts, lacking = fonts_for({*attention["source"], *attention["translation"]})
    down, across = (
        [code(character) if character in lacking else visible(character) for character in attention[side]]
        for side in ("source", "translation")
    )
    turned = 90 if max(map(len, across), default=0) > 1 else 0
    axis.set_xticks(range(len(weights)), [*across, "end"], rotation=turned, family=fonts, fontsize=8)
    axis.set_yticks(range(len(weights[0])), down, family=fonts, fontsize=8, ha="center")
    axis.tick_params(length=0, labeltop=True, labelbottom=False, pad=5)
    order = "read backwards: from the bottom up" if backwards else "read from the top down"
    axis.set(xlabel="translation, as it is written", ylabel=f"source, {order}")
    axis.xaxis.set_label_position("top")
    figure.colorbar(image, label="attention, per cent", orientation="horizontal", fraction=0.03, shrink=0.8, pad=0.02)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return buffer.getvalue()


def visible(character: str) -> str:
    """Return a character as it is shown: a blank as a sign that can be seen."""
    return "\N{OPEN BOX}" if character == " " else character


def code(character: str) -> str:
    """Return the number of a character that cannot be drawn, as Unicode writes it: "4E2D"."""
    return f"{ord(character):04X}"


def fonts_for(characters: set[str]) -> tuple[list[str], set[str]]:
    """Return families of fonts that together draw the characters, and those that no font here has.

    Matplotlib's own font comes first; of the installed ones the first that help.
    """
    default = FontProperties().get_family()
    lacking = {visible(character) for character in characters} - _drawn_by(findfont(FontProperties()))
    fonts = list(default)
    for entry in sorted(fontManager.ttflist, key=lambda entry: (entry.weight != 400, entry.name)):
        if not lacking:
            break
        # Matplotlib's "Last Resort" has a box for everything
        found = set() if entry.name.startswith("Last Resort") else lacking & _drawn_by(entry.fname)
        if found:
            fonts.append(entry.name)
            lacking -= found
    return fonts, lacking


def _drawn_by(path: str) -> set[str]:
    return {chr(number) for number in get_font(path).get_charmap()}
