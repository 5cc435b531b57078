"""The notebooks as web pages."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from docs.book import main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, but for a notebook."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("A square: $x^2$")])
    nbformat.write(notebook, tmp_path / "some.ipynb")
    monkeypatch.chdir(tmp_path)


def test_a_notebook_becomes_a_page_with_mathml():
    assert main(["some.ipynb"]) == 0
    assert "<math" in Path("build/book/some.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", (None, "", "no notebook", "{}", "[]"))
def test_what_is_no_notebook_is_one_line_and_nothing_is_written(capsys, content):
    if content is not None:
        Path("other.ipynb").write_text(content)
    assert main(["some.ipynb", "other.ipynb"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other.ipynb" in line and not Path("build").exists()


@pytest.mark.parametrize(("arguments", "code"), ((["--help"], 0), ([], 2), (["--colour", "some.ipynb"], 2)))
def test_help_and_wrong_arguments(capsys, arguments, code):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == code and (".ipynb" in printed.out) == (code == 0)
    assert len(printed.err.splitlines()) == bool(code)
