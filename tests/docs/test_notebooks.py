"""The notebooks run from top to bottom, are committed as they ran, and say the same when they run again."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FACT = re.compile(r"^ok  (.+?): (?:error (\S+) \(allowed (\S+)\)|([\d,]+))$", re.MULTILINE)
NAMES = ("derivation", "data_prep")
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def facts(notebook):
    """Name of each asserted fact -> (error, allowed, number), as printed."""
    text = "\n".join(out.text for cell in code_cells(notebook) for out in cell.outputs if out.output_type == "stream")
    return {name: values for name, *values in FACT.findall(text)}


def solutions(notebook):
    """The code of the hidden solutions, as cells."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    hidden = "\n".join(re.findall(r"<details>.*?</details>", text, re.DOTALL))
    return [nbformat.v4.new_code_cell(code) for code in re.findall(r"```python\n(.*?)```", hidden, re.DOTALL)]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Each notebook and its solutions, executed in a copy of the checkout: figures are written there, not here."""
    folder = tmp_path_factory.mktemp("checkout")
    for path in (ROOT / "qrnn_layer.py", ROOT / "lab"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    (folder / "docs" / "images").mkdir(parents=True)
    runs = {}

    def run(name):
        if name not in runs:
            notebook = read(name)
            notebook.cells += solutions(notebook)
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("FAST", "1")
                environment.delenv("QRNN_DATA", raising=False)
                environment.setenv("PYTHONPATH", str(folder))
                resources = {"metadata": {"path": str(folder)}}
                NotebookClient(notebook, timeout=120, resources=resources, coalesce_streams=True).execute()
            runs[name] = notebook
        return runs[name]

    return run


@every_notebook
def test_runs_without_error_or_warning(name, fresh):
    notebook = fresh(name)  # an exception in a cell, failed assertions included, is raised here
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", f"{cell.source}\n\n{output.text}"


@every_notebook
def test_is_committed_executed_in_order_and_clean(name):
    path = ROOT / f"{name}.ipynb"
    notebook, text = read(name), path.read_text(encoding="utf-8")
    assert path.stat().st_size < 1_000_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    images = re.compile(r'"image/png": "[^"]*"')
    local = re.search(r"(/(home|root|tmp|work|Users|usr|mnt|opt)/|[A-Z]:\\\\)[^\s\"]*", images.sub("", text))
    assert local is None, f"a path of some machine: {local.group()}"
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 15, f"one idea a cell:\n{cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", output


@every_notebook
def test_committed_numbers_agree_with_a_fresh_run(name, fresh):
    committed, now = facts(read(name)), facts(fresh(name))
    shared = committed.keys() & now.keys()
    assert len(shared) >= (20 if name == "derivation" else 3)
    for fact in sorted(shared):
        if not committed[fact][1]:  # a number, not an error
            if fact.startswith("synthetic"):
                assert committed[fact] == now[fact], fact
            continue
        (before, allowed, _), (after, allowed_now, _) = committed[fact], now[fact]
        assert allowed == allowed_now, fact
        small, large = sorted((float(before), float(after)))
        assert large <= 4 * small + 1e-6, f"{fact}: error {before} committed, {after} now"


def test_data_prep_was_committed_with_the_real_corpus():
    counts = {name: number for name, (*_, number) in facts(read("data_prep")).items()}
    expected = {"train tokens": "2,088,628", "valid tokens": "217,646", "test tokens": "245,569", "types": "33,278"}
    assert {name: counts.get(name) for name in expected} == expected


def test_the_readme_figures_are_committed():
    sources = "\n".join(cell.source for name in NAMES for cell in code_cells(read(name)))
    figures = re.findall(r'"(\w+\.png)"', sources)
    assert figures and all((ROOT / "docs" / "images" / figure).is_file() for figure in figures)
