"""Write the notebooks as web pages that need no network, and a first page with three doors: play, read, data.

Formulas become MathML, which browsers draw by themselves; figures and styles are inside the pages.
"""

from __future__ import annotations

import re
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from html import escape
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from lab.command_line import exit_code
from lab.parser import Parser
from lab.settings import InputError

DOCS = Path(__file__).parent
FORMULA = re.compile(r"\$\$(.+?)\$\$|(\(?)\$([^$\n]+?)\$([.,;:)]*)", re.DOTALL)  # with what may not part from it
HEADING = re.compile(r'<h([12]) id="([^"]+)">(.*?)<a class="anchor-link".*?</h\1>', re.DOTALL)
POWER_OF_TEN = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?e[-+]\d+)")
FOLDED = """{% extends 'basic/index.html.j2' %}
{% block input %}{% if 'hide-input' in cell.metadata.get('tags', []) -%}
<details class="code"><summary>code that only draws</summary>{{ super() }}</details>
{%- else %}{{ super() }}{% endif %}{% endblock %}"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<nav class="pages">{pages}</nav>
{contents}<main>{body}</main>
</body>
</html>
"""
DOORS = {  # file -> name of the door, who it is for
    "trick.html": ("Play", "Drag gates and inputs, and watch the digits go. No mathematics needed. 10 minutes."),
    "derivation.html": ("Read", "Derive the trick, break it, explain what broke, repair it. Two hours, or 35 minutes."),
    "data_prep.html": ("Data", "From raw text to batches, and what a perplexity is a perplexity of. 15 minutes."),
}
INDEX = """<h1>A recurrence without a loop</h1>
<p>A recurrent layer whose states are all computed at once, in two lines of code. Three doors lead in:</p>
<div class="doors">{doors}</div>"""

# --- formulas --------------------------------------------------------------------------------------------------------

OPENING, CLOSING = "([{", ")]}"


def mathml(latex: str, display: bool) -> str:
    """Return a formula as MathML, with the spaces that TeX would put."""
    ET.register_namespace("", "http://www.w3.org/1998/Math/MathML")
    root = ET.fromstring(convert(" ".join(latex.split()), display="block" if display else "inline"))
    for row in list(root.iter()):
        _space(row)
    for script in (element for element in root.iter() if element.tag.endswith(("msub", "msup", "msubsup"))):
        for sign in (sign for part in list(script)[1:] for sign in part.iter() if sign.tag.endswith("}mo")):
            sign.attrib |= {"lspace": "0", "rspace": "0"}  # as TeX: no spaces in a script
    return ET.tostring(root, encoding="unicode").replace("|", "&#124;")  # a bar would end a cell of a table


def _space(row: ET.Element) -> None:
    """Tell names, signs and bars from binary operators, which a browser cannot do from the symbol alone."""
    namespace = row.tag.rpartition("}")[0] + "}"
    letters = [child.text or "" for child in row]
    if len(row) > 1 and all(child.get("mathvariant") == "normal" for child in row):  # one name, not letters in a row
        row[:] = [ET.Element(namespace + "mi")]
        row[0].text = "".join(letters)
    bar_is_open = False
    for index, child in enumerate(list(row)):
        before = row[index - 1] if index else None
        starts = before is None or (before.tag == namespace + "mo" and before.get("form") != "postfix")
        if child.text == "|":
            bar_is_open = not bar_is_open
            child.attrib |= {"form": "prefix" if bar_is_open else "postfix", "stretchy": "false"}
            child.attrib |= {"lspace": "0", "rspace": "0"}
        elif child.tag == namespace + "mo" and (child.text or " ") in CLOSING:
            child.set("form", "postfix")
        elif child.text == "\u2212" and starts:
            child.attrib |= {"form": "prefix", "lspace": "0", "rspace": "0"}
        elif child.text in ("∞", "⋯"):
            child.tag = namespace + "mi"
    for child in list(row):
        name = child[0] if child.tag == namespace + "msub" else child  # log, or the log of log_2
        text = name.text or ""
        if name.tag in (namespace + "mi", namespace + "mo") and len(text) > 1 and text.isalpha():
            name.tag = namespace + "mi"
            _space_around_name(row, child, namespace)


def _space_around_name(row: ET.Element, name: ET.Element, namespace: str) -> None:
    """Put thin spaces around log, max, logsigmoid, ... unless a fence or an operator is there."""
    index = list(row).index(name)
    after, before = row[index + 1 : index + 2], row[max(index - 1, 0) : index]
    thin = {"width": "0.167em"}
    if after and after[0].text not in tuple(OPENING) and after[0].tag != namespace + "mspace":
        row.insert(index + 1, ET.Element(namespace + "mspace", thin))
    if (
        before
        and before[0].tag != namespace + "mspace"
        and (before[0].tag != namespace + "mo" or before[0].get("form") == "postfix")
    ):
        row.insert(index, ET.Element(namespace + "mspace", thin))


def with_mathml(markdown: str) -> str:
    """Return the text with every $formula$ and $$formula$$ as MathML."""

    def replace(match: re.Match[str]) -> str:
        display, before, inline, after = match.groups()
        if display:
            return f'<div class="formula">{mathml(display, True)}</div>'
        return f'<span class="together">{before}{mathml(inline, False)}{after}</span>'

    return FORMULA.sub(replace, markdown)


def plain(markdown: str) -> str:
    """Return a sentence under a figure without marks and formulas, for those who hear it."""
    text = markdown.replace("**What to see.** ", "").replace("\\varepsilon", "ε").replace("\\,", " ")
    return re.sub(r"[$`*{}]|\\\w+", "", text)


# --- pages -----------------------------------------------------------------------------------------------------------


def prepared(path: Path) -> NotebookNode:
    """Return a notebook with formulas as MathML, unbroken numbers, and a text alternative for every figure."""
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(nbformat.read(path, as_version=4), {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(re.sub(r"\]\((\w+)\.ipynb", r"](\1.html", cell.source))
        outputs = cell.get("outputs", [])
        captions = [output for output in outputs if "text/markdown" in output.get("data", {})]
        for output in outputs:
            if "image/png" in output.get("data", {}):
                output.metadata["image/png"] = {"alt": plain(captions[0].data["text/markdown"])}
        for output in captions:
            numbers = POWER_OF_TEN.sub(r'<span class="together">\1</span>', output.data["text/markdown"])
            output.data["text/markdown"] = with_mathml(numbers)
    return notebook


def contents(body: str) -> str:
    """Return links to the headings of a page."""
    lines = (
        f'<li class="level-{level}"><a href="#{name}">{text}</a></li>' for level, name, text in HEADING.findall(body)
    )
    return f'<details class="contents"><summary>Contents</summary><ul>{"".join(lines)}</ul></details>'


def document(title: str, body: str, here: str, with_contents: bool) -> str:
    """Return a complete HTML document with links to the other pages."""
    names = {"index.html": "Start"} | {file: name for file, (name, _) in DOORS.items()}
    pages = (f"<b>{name}</b>" if file == here else f'<a href="{file}">{name}</a>' for file, name in names.items())
    style = HtmlFormatter(style="default").get_style_defs(".highlight") + (DOCS / "book.css").read_text("utf-8")
    listed = contents(body) if with_contents else ""
    return PAGE.format(title=escape(title), style=style, pages=" ".join(pages), contents=listed, body=body)


def page(path: Path) -> str:
    """Return a notebook as a complete HTML document."""
    exporter = HTMLExporter(raw_template=FOLDED)
    body, _ = exporter.from_notebook_node(prepared(path))
    heading = HEADING.search(body)
    title = re.sub("<.*?>", "", heading[3]) if heading else path.stem
    return document(title, body, f"{path.stem}.html", with_contents=True)


def index() -> str:
    """Return the first page."""
    doors = "".join(f'<a href="{file}"><b>{name}</b><span>{text}</span></a>' for file, (name, text) in DOORS.items())
    return document("A recurrence without a loop", INDEX.format(doors=doors), "index.html", with_contents=False)


def main(arguments: Sequence[str]) -> int:
    """Write the notebooks that the arguments name as pages; return the exit code: 0, or 2 if one cannot be read."""
    parser = Parser("Write notebooks as pages that need no network, in build/book/.")
    parser.add_argument("notebook", nargs="+", type=Path, help="a file .ipynb that was run")
    return exit_code(lambda: write_pages(parser.parse_args(arguments).notebook))


def write_pages(notebooks: list[Path]) -> int:
    """Write each notebook as a page, beside a first page and the page to play with.

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
        (folder / f"{path.stem}.html").write_text(content, encoding="utf-8")
    shutil.copy(DOCS / "trick.html", folder)
    (folder / "index.html").write_text(index(), encoding="utf-8")
    print(f"wrote {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
