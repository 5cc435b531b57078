"""The notebooks' pages: titles, links, text alternatives, formulas, and a phone's width."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from docs.book import DOORS, index, mathml, page

ROOT = Path(__file__).parents[2]
TITLES = {"derivation": "A recurrence without a loop", "data_prep": "From raw text to batches"}


@pytest.fixture(scope="module")
def pages():
    return {f"{name}.html": page(ROOT / f"{name}.ipynb") for name in TITLES} | {"index.html": index()}


def test_titles(pages):
    for name, title in TITLES.items():
        assert f"<title>{title}</title>" in pages[f"{name}.html"]


def test_every_link_within_the_pages_leads_somewhere(pages):
    for file, html in pages.items():
        places = set(re.findall(r' id="([^"]+)"', html))
        for target in re.findall(r'<a[^>]* href="([^"]+)"', html):
            if target.startswith("#"):
                assert target[1:] in places, f"{file}: {target}"
            elif not target.startswith("https://"):
                assert target in {*DOORS, "index.html"}, f"{file}: {target}"


def test_the_pages_need_no_network(pages):
    for file, html in pages.items():
        assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="(?!data:)', html), file
        assert "<script" not in html, file


def test_every_figure_has_a_text_alternative(pages):
    for file, html in pages.items():
        for image in re.findall(r"<img[^>]*>", html):
            alternative = re.search(r'alt="([^"]*)"', image)
            assert alternative and len(alternative[1]) > 40 and not re.search(r"[$\\]", alternative[1]), file


def test_contents_list_every_heading(pages):
    for name in TITLES:
        html = pages[f"{name}.html"]
        headings = re.findall(r"<h[12] id=", html)
        assert html.count('<li class="level-') == len(headings) > 10


def test_code_that_only_draws_is_folded(pages):
    html = pages["derivation.html"]
    assert html.count('<details class="code">') > 15
    for line in re.findall(r"<h2 id=.*?</h2>", html):
        assert "details" not in line


def test_tables_are_tables(pages):
    for file, html in pages.items():
        assert not re.search(r"<p>\s*\|", html), file


@pytest.mark.parametrize(
    ("latex", "found"),
    [
        (r"\log 0", r"<mi>log</mi><mspace width=\"0.167em\" /><mn>0</mn>"),
        (r"\log_2 T", r"</msub><mspace width=\"0.167em\" /><mi>T</mi>"),
        (r"f \max(u)", r"<mi>f</mi><mspace width=\"0.167em\" /><mi>max</mi><mo"),
        (r"a = -\infty", r'<mo form="prefix" lspace="0" rspace="0">−</mo><mi>∞</mi>'),  # noqa: RUF001
        (r"\sigma(-a)", r'<mo form="prefix" lspace="0" rspace="0">−</mo><mi>a</mi>'),  # noqa: RUF001
        (r"(a) - b", r"<mo>−</mo><mi>b</mi>"),  # noqa: RUF001
        (r"\lvert c\rvert", r'<mo form="prefix" [^>]*>&#124;</mo><mi>c</mi><mo form="postfix"'),
        (r"h_{t-1}", r'<mo lspace="0" rspace="0">−</mo>'),  # noqa: RUF001
        (r"\mathrm{logsigmoid}(b)", r"<mi>logsigmoid</mi>"),
    ],
)
def test_formulas_have_the_spaces_that_tex_puts(latex, found):
    assert re.search(found, mathml(latex, display=False)), mathml(latex, display=False)


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium: apt-get install chromium")
def test_no_page_is_wider_than_a_phone_or_a_screen(pages, tmp_path):
    frames = [(file, width) for file in pages for width in (390, 1280)]
    for file, html in pages.items():
        (tmp_path / file).write_text(html, encoding="utf-8")
    look = '<iframe src="{}" style="width:{}px;height:800px;border:0"></iframe>'
    measure = "onload = () => document.title = [...document.querySelectorAll('iframe')].map("
    measure += "f => f.contentDocument.documentElement.scrollWidth)"
    together = "".join(look.format(*frame) for frame in frames)
    (tmp_path / "frames.html").write_text(f"<title></title>{together}<script>{measure}</script>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = map(int, re.search(r"<title>([\d,]+)</title>", done.stdout)[1].split(","))
    assert all(needs <= width for needs, (_, width) in zip(found, frames, strict=True)), done.stdout[:200]
