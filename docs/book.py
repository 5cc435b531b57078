"""The notebooks as web pages that need no network: `make book` writes build/book/*.html.

Formulas become MathML, which browsers draw by themselves; figures and styles are inside the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter

from lab.command_line import Parser, exit_code
from lab.settings import InputError

STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 17px/1.55 system-ui, sans-serif; color: #1a1a1a; }
p, ul, ol, blockquote { max-width: 46rem; } h1, h2 { line-height: 1.2; margin: 2em 0 .6em; }
a { color: #0b5cad; } a.anchor-link { display: none; }
pre, code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre { margin: .4rem 0; overflow-x: auto; }
p code, li code, td code { background: #f2f4f6; padding: .1em .25em; border-radius: 3px; }
.highlight, details pre { background: #f6f8fa; padding: .5rem .8rem; border-radius: 5px; overflow-x: auto; }
.highlight pre { background: none; padding: 0; }
.output_subarea { overflow-x: auto; padding-left: .8rem; } .output_text, .output_stdout { color: #444; }
.prompt, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
img { max-width: 100%; height: auto; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; font-size: 15px; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d8dce0; text-align: left; vertical-align: top; }
math { font-family: "STIX Two Math", "Cambria Math", "STIX Math", "Latin Modern Math", math; font-size: 1.1em; }
.formula { overflow-x: auto; overflow-y: hidden; padding: .5rem 0; max-width: 46rem; }
mtd[columnalign="right"] { text-align: right; } mtd[columnalign="left"] { text-align: left; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: 4px solid #0072b2; background: #f2f7fb; }
details { margin: .5rem 0 1.5rem; } summary { cursor: pointer; color: #0b5cad; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style>
</head>
<body>{body}</body>
</html>
"""
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def with_mathml(markdown: str) -> str:
    """The text with every $formula$ and $$formula$$ as MathML."""

    def mathml(match: re.Match[str]) -> str:
        display, inline = match.groups()
        formula = convert(" ".join((display or inline).split()), display="block" if display else "inline")
        return f'<div class="formula">{formula}</div>' if display else formula

    return FORMULA.sub(mathml, markdown)


def page(path: Path) -> str:
    """A notebook as a complete HTML document."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(path, as_version=4), {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = with_mathml(output.data["text/markdown"])
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    return PAGE.format(title=path.stem, style=colours + STYLE, body=body)


def main(arguments: Sequence[str]) -> int:
    """Write the notebooks that the arguments name as pages; return the exit code: 0, 2 if one cannot be read."""
    parser = Parser("Write notebooks as pages that need no network, in build/book/.")
    parser.add_argument("notebook", nargs="+", type=Path, help="a file .ipynb that was run")
    return exit_code(lambda: write_pages(parser.parse_args(arguments).notebook))


def write_pages(notebooks: list[Path]) -> int:
    """Write each notebook as a page.

    Raises:
        InputError: if one cannot be read; then none is written.
    """
    pages = {}
    for path in notebooks:
        try:
            pages[path] = page(path)
        except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
            reason = getattr(error, "strerror", None) or "no notebook"
            raise InputError(f"{path}: cannot be read ({reason}); a file .ipynb expected") from None
    folder = Path("build/book")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in pages.items():
        target = folder / f"{path.stem}.html"
        target.write_text(content, encoding="utf-8")
        print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
