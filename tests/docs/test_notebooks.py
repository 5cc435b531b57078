"""The notebooks run from top to bottom, are committed as they ran, and say the same when they run again."""

import dis
import hashlib
import re
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[2]
FACT = re.compile(
    r"^ok  (.+): (?:error (\S+) \(allowed (\S+)\)|(\S+) \((\S+) to (\S+) allowed\)|([\d,]+))$", re.MULTILINE
)
NAMES = ("derivation", "data_prep")
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(ROOT / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def facts(notebook):
    """Return the name of each asserted fact -> (bounds, value), as printed; exact numbers have no bounds."""
    printed = (out for cell in code_cells(notebook) for out in cell.outputs if out.output_type == "stream")
    found = {}
    for name, error, allowed, value, low, high, number in FACT.findall("\n".join(out.text for out in printed)):
        assert name not in found, f"two facts of one name: {name}"
        found[name] = ((), number) if number else ((low or "0", high or allowed), error or value)
    return found


def solutions(notebook):
    """Return the code of the hidden solutions, as cells."""
    hidden = "\n".join(re.findall(r"<details>.*?</details>", text_of(notebook), re.DOTALL))
    return [nbformat.v4.new_code_cell(code) for code in re.findall(r"```python\n(.*?)```", hidden, re.DOTALL)]


def execute(notebook, folder):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("FAST", "1")
        environment.delenv("QRNN_DATA", raising=False)
        environment.setenv("PYTHONPATH", str(folder))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=120, resources=resources, coalesce_streams=True).execute()
    return notebook


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Return a function that executes a notebook and its solutions, with no more beside it than it needs."""
    runs = {}

    def run(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)  # empty: no project, no folder for figures
            shutil.copy(ROOT / "qrnn_layer.py", folder)
            if name == "data_prep":
                shutil.copytree(ROOT / "lab", folder / "lab")
            notebook = read(name)
            notebook.cells += solutions(notebook)
            runs[name] = execute(notebook, folder)
            assert {path.name for path in folder.iterdir()} <= {"qrnn_layer.py", "lab", "__pycache__"}
        return runs[name]

    return run


@every_notebook
def test_runs_alone_without_error_or_warning(name, fresh):
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
def test_committed_facts_are_those_of_a_fresh_run(name, fresh):
    """Ask what can be asked of two machines: the same facts with the same bounds, and each within its bounds."""
    committed, now = facts(read(name)), facts(fresh(name))
    if name == "derivation":  # data_prep is committed with the real corpus
        assert len(committed) >= 120
        assert committed.keys() <= now.keys()  # the fresh run has the solutions' too
    for fact in committed.keys() & now.keys():
        (bounds, value), (bounds_now, value_now) = committed[fact], now[fact]
        assert bounds == bounds_now, fact
        if bounds:
            low, high = map(float, bounds)
            slack = 1 + 5e-2  # errors are printed with two digits
            assert all(low / slack <= float(v) <= high * slack for v in (value, value_now) if low >= 0), fact
        elif name == "derivation" or fact.startswith("synthetic"):
            assert value == value_now, fact


def test_data_prep_was_committed_with_the_real_corpus():
    counts = {name: number for name, (_, number) in facts(read("data_prep")).items()}
    expected = {"train tokens": "2,088,628", "valid tokens": "217,646", "test tokens": "245,569", "types": "33,278"}
    assert {name: counts.get(name) for name in expected} == expected


def test_the_figures_of_the_pages_are_committed():
    sources = "\n".join(cell.source for name in NAMES for cell in code_cells(read(name)))
    figures = re.findall(r'"(\w+\.png)"', sources)
    assert set(figures) == {"idea.png", "collapse.png", "gradient.png"}
    assert all((ROOT / "docs" / "images" / figure).is_file() for figure in figures)


def names_bound_and_read(source):
    """Return the global names that a cell binds, and those it reads before it has bound them, or inside functions."""
    bound, early = set(), set()

    def walk(code, later):
        for step in dis.get_instructions(code):
            if step.opname == "STORE_NAME":
                bound.add(step.argval)
            elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL") and (later or step.argval not in bound):
                early.add(step.argval)
            elif hasattr(step.argval, "co_code"):  # comprehensions run at once
                walk(step.argval, later or step.argval.co_name not in ("<genexpr>", "<listcomp>", "<dictcomp>"))

    walk(compile(source, "cell", "exec"), False)
    return bound, early


@every_notebook
def test_running_cells_out_of_order_gives_no_wrong_numbers(name):
    """A name that two cells bind is a cell's own: none reads it before it has bound it."""
    notebook = read(name)
    cells = [names_bound_and_read(cell.source) for cell in [*code_cells(notebook), *solutions(notebook)]]
    times = Counter(chain.from_iterable(bound for bound, _ in cells))
    shared = {word for word, n in times.items() if n > 1}
    assert not {word for _, early in cells for word in early & shared}


@pytest.mark.parametrize(("name", "exercises"), [("derivation", 9), ("data_prep", 3)])
def test_every_exercise_has_a_hidden_solution_that_checks_itself(name, exercises):
    notebook = read(name)
    assert len(re.findall(r"^\*\*\d\. ", text_of(notebook), re.MULTILINE)) == exercises
    hidden = solutions(notebook)
    assert len(hidden) == exercises
    assert all(re.search(r"^ *(assert|check\(|claim\()", cell.source, re.MULTILINE) for cell in hidden)


def test_slides_are_a_lecture_of_part_1():
    slides, _ = SlidesExporter().from_notebook_node(read("derivation"))
    headings = re.findall(r"<h1[^>]*>(.*?)<a", slides)
    assert [re.sub("<.*?>", "", heading) for heading in headings] == [
        "A recurrence without a loop",
        "A hook: how many digits are left?",
        "Part 1. The closed form",
    ]


@pytest.mark.parametrize("files", ["wiki.{}.tokens", "{}.txt"])
def test_data_prep_finds_the_official_files_by_what_is_in_them(files, tmp_path):
    """Other names, and a larger corpus beside it under the official ones: neither may mislead it."""
    splits = ("train", "valid", "test")
    contents = {split: f" the {split} text \n".encode() for split in splits}
    other = tmp_path / "a-larger-corpus"
    other.mkdir()
    for split in splits:
        (tmp_path / files.format(split)).write_bytes(contents[split])
        (other / f"wiki.{split}.tokens").write_bytes(b" something else \n")
    (cell,) = (cell for cell in code_cells(read("data_prep")) if cell.source.startswith("def official_files"))
    sums = {split: hashlib.sha256(content).hexdigest() for split, content in contents.items()}
    scope = {"WIKITEXT_2_SHA256": sums, "SPLITS": splits, "hashlib": hashlib}
    exec(cell.source, scope)
    found = scope["official_files"](tmp_path)
    assert {split: path.read_bytes() for split, path in found.items()} == contents
