"""Check the page docs/trick.html: its numbers against PyTorch, without a browser, and the page itself in one.

The numbers run in QuickJS. The page runs in headless Chromium, which is driven by the DevTools protocol.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quickjs
import torch
import torch.nn.functional as F
import websocket
from torch import Tensor

from qrnn_layer import closed_form, pool

PAGE = Path(__file__).parents[2] / "docs" / "trick.html"
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
START = {
    "bias": 0, "T": 1024, "dtype": "float32", "sums": "wide", "block": 64, "seed": 1,
    "at": 9, "from": 4, "size": 1000, "reach": 1000, "method": "scan",
}  # fmt: skip
PLAIN = "(_, y) => ArrayBuffer.isView(y) ? Array.from(y) : typeof y === 'number' && !isFinite(y) ? String(y) : y"


def plain(text: str) -> Any:
    """Return what JSON says, where "NaN" and "Infinity" are numbers again."""

    def number(y: Any) -> Any:
        if isinstance(y, dict):
            return {key: number(item) for key, item in y.items()}
        if isinstance(y, list):
            return [number(item) for item in y]
        return float(y) if y in ("NaN", "Infinity", "-Infinity") else y

    return number(json.loads(text))


# --- the numbers, without a browser ----------------------------------------------------------------------------------


class Core:
    """Run the first script of the page, the numbers, in QuickJS."""

    def __init__(self) -> None:
        script = re.search(r'<script id="core">(.*?)</script>', PAGE.read_text(encoding="utf-8"), re.DOTALL)
        self.context = quickjs.Context()
        self.context.eval(script[1])

    def __call__(self, expression: str, **setting: Any) -> Any:
        """Return the value of an expression, in which s is a setting and logF, x are its sequence."""
        self.context.eval(f"var s = {json.dumps(START | setting)}, {{ logF, x }} = sequence(s)")
        return plain(self.context.eval(f"JSON.stringify({expression}, {PLAIN})"))

    def array(self, expression: str, **setting: Any) -> Tensor:
        return torch.tensor(self(expression, **setting), dtype=torch.float64)

    def sequence(self, **setting: Any) -> tuple[Tensor, Tensor]:
        """Return log f and x, both (T,), in the dtype of the setting."""
        dtype = DTYPES[(START | setting)["dtype"]]
        return self.array("logF", **setting).to(dtype), self.array("x", **setting).to(dtype)


@pytest.fixture(scope="module")
def core() -> Core:
    return Core()


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs() / want.double().abs()).max().item()


def first_nan(h: Tensor) -> int:
    """Return the step of the first NaN, counted from 1; 0 if there is none."""
    return int(h.isnan().nonzero()[0]) + 1 if h.isnan().any() else 0


def test_is_one_small_file() -> None:
    page = PAGE.read_bytes()
    assert len(page) <= 48 * 1024
    assert len(gzip.compress(page, 9)) <= 16 * 1024
    assert not re.search(rb"https?:|src=|@import|url\(", page), "nothing comes from elsewhere"


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_rounds_as_torch_does(core: Core, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).int()  # every exponent, subnormals included
    ties = bits[:5000] & ~0x0FFF, bits[:5000] & ~0x7FFF, (bits[:5000] & ~0x1FFF) | 0x1000, bits[:5000] & ~0x0FFF | 1
    numbers = torch.cat([bits, *ties]).view(torch.float32)
    numbers = torch.cat([numbers[numbers.isfinite()], torch.tensor([0.0, 65519.99, 65520.0, 3.0e-8, 2.98e-8, 3.39e38])])
    got = core.array(f"Float64Array.from({numbers.tolist()}, DTYPES.{name}.round)")
    assert torch.equal(got, numbers.to(DTYPES[name]).double())


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_have_the_limits_of_torch(core: Core, name: str) -> None:
    limits = torch.finfo(DTYPES[name])
    assert core(f"[DTYPES.{name}.eps, DTYPES.{name}.tiny, DTYPES.{name}.largest]") == [
        limits.eps, limits.tiny, limits.max,
    ]  # fmt: skip


def test_draws_the_sequence_that_it_says(core: Core) -> None:
    number, uniform = 7, []
    for _ in range(8 * 100):
        number = (1664525 * number + 1013904223) % 2**32
        uniform.append((number + 0.5) / 2**32)
    a, b = ((torch.tensor(uniform, dtype=torch.float64).view(100, 2, 4).sum(2) - 2) * 3**0.5).T
    log_f, x = core.sequence(seed=7, bias=1.5, T=100, dtype="float64", gate3=0.5, gate90=0, input4=2)
    want_f, want_x = F.logsigmoid(a + 1.5), (-a - 1.5).sigmoid() * F.softplus(b)
    want_f[2], want_f[89], want_x[3] = math.log(0.5), -math.inf, 2
    torch.testing.assert_close(log_f, want_f, rtol=1e-12, atol=0)
    torch.testing.assert_close(x, want_x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bias", [-6, 0, 6])
@pytest.mark.parametrize("name", DTYPES)
def test_closed_form_is_that_of_the_library(core: Core, name: str, bias: int) -> None:
    log_f, x = core.sequence(dtype=name, bias=bias)
    log_h, c = closed_form(log_f.unsqueeze(1), x.log().unsqueeze(1))
    page = core("(h => ({ h, c: h.c }))(closed(logF, x, arithmetic(s)))", dtype=name, bias=bias)
    h, page_c = (torch.tensor(page[key], dtype=torch.float64) for key in ("h", "c"))
    assert torch.equal(page_c, c[:, 0].double())
    assert relative(h, log_h[:, 0].exp()) <= 1e-6
    assert (h == log_h[:, 0].exp().double()).double().mean() > 0.9


def test_half_precision_is_summed_in_float32(core: Core) -> None:
    """A running sum in float64 would differ in some steps of so many."""
    setting = {"dtype": "float16", "bias": 4, "T": 16384}
    log_f, x = core.sequence(**setting)
    log_h, c = closed_form(log_f.unsqueeze(1), x.log().unsqueeze(1))
    assert torch.equal(core.array("closed(logF, x, arithmetic(s)).c", **setting), c[:, 0].double())
    h = core.array("closed(logF, x, arithmetic(s))", **setting)
    assert (h == log_h[:, 0].exp().double()).double().mean() > 0.999


@pytest.mark.parametrize("bias", [-2, 0, 3])
@pytest.mark.parametrize("name", DTYPES)
def test_ratio_breaks_at_the_same_step(core: Core, name: str, bias: int) -> None:
    log_f, x = core.sequence(dtype=name, bias=bias)
    product = log_f.exp().cumprod(0)
    h = product * (x / product).cumsum(0)
    result = core("run({ ...s, scene: 3 })", dtype=name, bias=bias)
    assert result["nan"] == first_nan(h)
    assert result["bad"] == (int((~h.isfinite()).nonzero()[0]) + 1 if not h.isfinite().all() else 0)


@pytest.mark.parametrize("method", ["loop", "log", "blocked", "scan"])
@pytest.mark.parametrize("name", DTYPES)
def test_pool_is_that_of_the_library(core: Core, name: str, method: str) -> None:
    setting = {"dtype": name, "gate40": 0, "input7": 0.25, "T": 300, "method": method, "block": 32}
    log_f, x = (array.view(1, -1, 1) for array in core.sequence(**setting))
    h = pool(log_f, x.log(), method=method, block_size=32)
    exact = pool(log_f.double(), x.double().log(), method="loop")
    page = core("pool(s, logF, x, exactly(logF, x))", **setting)
    assert page["last"] == pytest.approx(h[0, -1, 0].item(), rel=1e-6)
    assert page["error"] == pytest.approx(relative(h, exact), rel=0.5, abs=1e-6 if name != "float64" else 1e-14)


def test_sums_in_the_dtype_leave_the_line(core: Core) -> None:
    """A running sum in float32 rounds at every step: at bias 6 the law does not hold; Kahan's sum helps, not wholly."""
    ratio = {sums: core("run({ ...s, scene: 5 })", bias=6, T=16384, sums=sums)["ratio"] for sums in ("wide", "same")}
    assert ratio["wide"] < 1 and ratio["same"] > 5
    kahan = core("s.T && last(closed(logF, x, arithmetic(s)).c)", bias=6, T=16384, sums="kahan")
    exact = core("logF.reduce((a, b) => a + b)", bias=6, T=16384)
    assert kahan == pytest.approx(exact, rel=2e-7)


def test_repairs_come_in_order(core: Core) -> None:
    curves = core("run({ ...s, scene: 6 }).curves", T=16384)
    end = {name: curve[-1] for name, curve in curves.items()}
    assert end["closed"] > 2 * end["tempting"] > 20 * end["blocks"] > 100 * end["scan"]
    assert len(curves["scan"]) == 15


def test_scan_pairs_logs(core: Core) -> None:
    """Gates that hardly forget: f in float32 has lost the digits of 1 - f, log f has not."""
    for form, low, high in (("scan", 0, 5e-7), ("gates", 3e-5, 1e-3)):
        worst = core(
            "(g => worst(errors(FORMS[s.form](g, x, arithmetic(s)), exactly(g, x))))(logF.fill(Math.fround(-1e-4)))",
            T=16384, form=form,
        )  # fmt: skip
        assert low <= worst <= high


def test_tree_has_the_states_and_the_rounds(core: Core) -> None:
    levels = core("run({ ...s, scene: 7 }).levels", dtype="float16", bias=-3)
    want = core.array("exactly(logF, x)", dtype="float16", bias=-3, T=16)
    assert [len(level["h"]) for level in levels] == [16, 8, 4, 2, 1]
    assert relative(torch.tensor(levels[0]["h"]), want) < 4e-3
    assert 0 in levels[-2]["weight"] and 0 not in levels[0]["weight"]
    assert core("[1, 2, 16, 1000, 1024].map(rounds)") == [0, 1, 7, 19, 19]


@pytest.mark.parametrize(("name", "bias", "T"), [("float64", 0, 256), ("float32", 0, 256), ("float32", -4, 1024)])
def test_autograd_loses_what_torch_loses(core: Core, name: str, bias: int, T: int) -> None:
    setting = {"dtype": name, "bias": bias, "T": T}
    log_f, x = core.sequence(**setting)
    g = core.array("x.map(drawing(s.seed + 1000)).map(arithmetic(s).round)", **setting).to(log_f.dtype)
    log_f.requires_grad_()
    log_h, _ = closed_form(log_f.unsqueeze(1), x.log().unsqueeze(1))
    (log_h[:, 0].exp() * g).sum().backward()
    exact = log_f.detach().double().requires_grad_()
    h = pool(exact.view(1, -1, 1), x.double().log().view(1, -1, 1), method="loop")
    (h[0, :, 0] * g.double()).sum().backward()

    def off(gradient: Tensor) -> float:
        return ((gradient.double() - exact.grad).norm() / exact.grad.norm()).item()

    result = core("run({ ...s, scene: 8 })", **setting)
    assert off(torch.tensor(result["want"], dtype=torch.float64)) < 1e-12
    assert result["error"]["autograd"] == pytest.approx(off(log_f.grad), rel=0.1)
    assert result["error"]["byHand"] < (1e-14 if name == "float64" else 2e-7)
    wrong = (log_f.grad.double() * exact.grad <= 0)[1:].double().mean().item()
    assert result["share"] == pytest.approx(wrong, abs=0.02)


@pytest.mark.parametrize("name", DTYPES)
def test_ruler_has_the_ticks_of_the_dtype(core: Core, name: str) -> None:
    for size in (1, 10, 1000, 30_000):
        result = core("run({ ...s, scene: 4 })", dtype=name, size=size)
        exact = torch.tensor([result["from"], result["to"]], dtype=torch.float64)
        assert exact[0] - exact[1] == pytest.approx(0.3)
        kept = exact.float().to(DTYPES[name]) if name != "float64" else exact
        assert result["kept"] == kept.tolist()
        one = torch.ones((), dtype=kept.dtype)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kept.element_size()]
        following = (kept[0].view(bits) + 1).view(kept.dtype)  # the next number away from 0
        assert result["gap"] == abs((following.double() - kept[0].double()).item())
        difference = (kept[1] - kept[0]) * one
        assert result["got"] == pytest.approx(difference.exp().item(), rel=2e-7)


def test_hook_counts_as_the_arrays_do(core: Core) -> None:
    rows = core("run({ ...s, scene: 0 }).rows", reach=10_000)
    assert [row["T"] for row in rows] == [1000, 10_000]
    for row in rows:
        log_f, x = core.sequence(T=row["T"])
        log_h, c = closed_form(log_f.unsqueeze(1), x.log().unsqueeze(1))
        exact = pool(log_f.double().view(1, -1, 1), x.double().log().view(1, -1, 1), method="loop")[0, :, 0]
        assert row["c"] == c[-1].item()
        assert row["error"] == pytest.approx(relative(log_h[:, 0].exp(), exact), rel=1e-2)
        assert row["got"] == pytest.approx(row["want"], rel=1.01 * row["error"])


SOLUTIONS = [  # for each scene: a setting that solves its question, and the answer
    ({"reach": 100_000}, 100_000),
    ({"gate9": 0}, None),
    ({"at": 16, "from": 1}, None),
    ({"dtype": "float16", "T": 64, "bias": 5}, None),
    ({"size": 100_000}, None),
    ({"bias": 6, "T": 16384, "sums": "same"}, None),
    ({"block": 1}, None),
    ({}, 19),
    ({"bias": -4, "T": 4096, "from": 100}, None),
    ({"bias": 6, "T": 16384}, None),
]


@pytest.mark.parametrize("scene", range(10))
def test_questions_have_an_answer_and_are_no_gift(core: Core, scene: int) -> None:
    solution, answer = SOLUTIONS[scene]
    check = f"(s => CHECKS[{scene}](s, run(s), s.answer))({{ ...s, scene: {scene} }})"
    assert core(check, **solution, answer=answer) is True
    assert core(check, answer=0) is False


def test_every_smallest_weight_is_right(core: Core) -> None:
    """A hard reset at step 9 makes every weight over it 0."""
    check = (
        "(r => [[16, 1], [12, 3], [9, 8], [9, 9], [16, 10], [8, 9]].map(([at, from]) => CHECKS[2]({ at, from }, r)))"
    )
    assert core(f"{check}(run({{ ...s, scene: 2 }}))", gate9=0) == [True, True, True, False, False, False]


# --- the page, in a browser ------------------------------------------------------------------------------------------


class Browser:
    """Drive one tab of headless Chromium by the DevTools protocol."""

    OPTIONS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
    )  # fmt: skip

    def __init__(self, program: str, profile: Path) -> None:
        command = [program, *self.OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = profile / "DevToolsActivePort"
        self.wait(lambda: port_file.exists() and "\n" in port_file.read_text(), "Chromium to start")
        with urllib.request.urlopen(f"http://127.0.0.1:{port_file.read_text().split()[0]}/json/list") as answer:
            tab = next(target for target in json.load(answer) if target["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], suppress_origin=True, timeout=60)
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=f"JSON.stringify({expression}, {PLAIN})", returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return plain(answer["result"].get("value", "null"))

    def wait(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            time.sleep(0.05)

    def open(self, address: str, width: int = 1280, height: int = 800) -> None:
        """Open the page anew at an address "#..." and wait for its result."""
        self.call("Page.navigate", url="about:blank")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.events.clear()
        self.call("Page.navigate", url=PAGE.as_uri() + address)
        self.result()

    def result(self) -> Any:
        ready = "document.readyState === 'complete' && typeof page !== 'undefined' && !!page.result"
        self.wait(lambda: self.evaluate(ready), "a result")
        return self.evaluate("page.result")

    def press(self, key: str, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={
                "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
            }[key], modifiers=8 * shift)  # fmt: skip

    def drag(self, *places: tuple[float, float]) -> None:
        """Press the mouse at the first place, move it over the others and let go."""
        (x, y), *_ = places
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button="left", buttons=1, clickCount=1)
        for x, y in places[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def place(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Scroll an element into view; return a place in it, given as shares of its width and height."""
        x, y, width, height = self.evaluate(
            "(node => (node.scrollIntoView({ block: 'center' }), node = node.getBoundingClientRect(),"
            f"[node.x, node.y, node.width, node.height]))(document.querySelector({json.dumps(selector)}))"
        )
        return x + across * width, y + down * height

    def complaints(self) -> list[dict[str, Any]]:
        """Return every console message, error and request over a network since the page was opened."""
        self.evaluate("0")  # collects what came in
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        requests = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        local = ("file:", "blob:", "data:")
        return [event for event in self.events if event.get("method") in said] + [
            event for event in requests if not event["params"]["request"]["url"].startswith(local)
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium: apt-get install chromium (or brew install --cask chromium) to test the page in it")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


CHANGE = "new Event('change', { bubbles: true })"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scene", range(10))
def test_every_scene_is_drawn_in_its_frame(browser: Browser, scene: int, width: int) -> None:
    browser.open(f"#scene={scene}", width)
    shown = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.offsetParent !== null)")
    assert shown == [i == scene for i in range(10)]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert len(browser.evaluate("document.querySelector('#caption').textContent")) > 30
    left, right, number = browser.evaluate(
        "(boxes => [Math.min(...boxes.map(b => b.left)), Math.max(...boxes.map(b => b.right)), boxes.length])"
        "([...document.querySelectorAll('svg *')].map(n => n.getBoundingClientRect()))"
    )
    assert number > 10 and left >= 0 and right <= width
    assert browser.complaints() == []


@pytest.mark.parametrize("scene", range(10))
def test_every_control_moves_the_state(browser: Browser, scene: int) -> None:
    browser.open(f"#scene={scene}")
    visible = "[...document.forms[0].elements].filter(input => input.name && input.offsetParent)"
    names = browser.evaluate(f"{visible}.map(input => input.name)")
    assert len(names) >= 2
    for name in names:
        before = browser.evaluate("page.state")
        field = f"document.forms[0].elements['{name}']"
        if browser.evaluate(f"{field}.type") == "range":
            browser.evaluate(f"{field}.focus()")
            at_the_end = browser.evaluate(f"{field}.value === {field}.max")
            browser.press("ArrowLeft" if at_the_end else "ArrowRight")
        else:  # the list itself is a window of the system
            browser.evaluate(f"({field}.selectedIndex += 1, {field}.dispatchEvent({CHANGE}))")
        browser.result()
        after = browser.evaluate("page.state")
        assert {key for key in after if after[key] != before[key]} == {name}
        assert f"{name}={after[name]}" in browser.evaluate("location.hash")
    assert browser.complaints() == []


def test_scene_9_agrees_with_the_library(browser: Browser, core: Core) -> None:
    changes = {"bias": -2}, {"T": 256}, {"dtype": "float64"}, {"dtype": "bfloat16"}, {"seed": 5}, {"gate100": 0}
    for change in ({}, *changes):
        for method in ("loop", "log", "blocked", "scan"):
            setting = {"T": 512, "block": 16, "method": method} | change
            browser.open("#scene=9&" + "&".join(f"{name}={value}" for name, value in setting.items()))
            log_f, x = (array.view(1, -1, 1) for array in core.sequence(**setting))
            h = pool(log_f, x.log(), method=method, block_size=16)
            assert browser.result()["pool"]["last"] == pytest.approx(h[0, -1, 0].item(), rel=1e-6)


def test_copied_python_gives_the_numbers(browser: Browser) -> None:
    browser.open("#scene=9&bias=-1.5&T=32&gate20=0&gate31=0.5&input30=1.5&method=blocked&block=8&seed=3")
    code = browser.evaluate("document.querySelector('#stage pre').textContent")
    assert 'method="blocked", block_size=8' in code
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    last, error = map(float, said.getvalue().split())
    result = browser.result()["pool"]
    assert last == pytest.approx(result["last"], rel=1e-6)
    assert error == pytest.approx(result["error"], abs=2e-7)
    browser.drag(browser.place("form button:nth-of-type(2)"))
    assert browser.evaluate("getSelection().toString()").split() == code.split()
    assert browser.complaints() == []


def test_long_sequences_are_computed_in_a_worker(browser: Browser) -> None:
    browser.open("#scene=6&T=4096")
    field = "document.forms[0].elements.T"
    browser.evaluate(f"({field}.stepUp(2), {field}.dispatchEvent(new Event('input', {{ bubbles: true }})))")
    time.sleep(1)  # long enough for the worker, which must not have started: the control is still held
    assert browser.evaluate("[page.state.T, page.result]") == [16384, None]
    browser.evaluate(f"{field}.dispatchEvent({CHANGE})")
    assert browser.result() == browser.evaluate("run(page.state)")
    assert browser.complaints() == []


def test_address_is_the_state(browser: Browser) -> None:
    browser.open("#scene=6&bias=-2.5&T=512&block=32&carry=blocks&dtype=bfloat16&sums=kahan&seed=9&gate90=0&input3=0.5")
    state = browser.evaluate("page.state")
    numbers = {"bias": -2.5, "T": 512, "block": 32, "seed": 9, "gate90": 0, "input3": 0.5}
    assert state.items() >= (numbers | {"carry": "blocks", "dtype": "bfloat16", "sums": "kahan"}).items()
    link = browser.evaluate("document.querySelectorAll('nav a')[7].hash")
    assert "gate90=0" in link and "input3=0.5" in link and "seed=9" in link and "dtype" not in link
    browser.evaluate("location.hash = '#scene=2&at=12&from=5'")
    browser.wait(lambda: browser.evaluate("page.state.scene") == 2, "scene 2")
    assert browser.evaluate("[page.state.at, page.state.from]") == [12, 5]


def test_every_scene_starts_in_its_own_way(browser: Browser) -> None:
    browser.open("#scene=3&bias=2&seed=7")
    assert browser.evaluate("[page.state.dtype, page.state.T, page.state.bias]") == ["float16", 64, 2]
    for scene in (4, 5):
        browser.press("ArrowRight")
        browser.wait(lambda scene=scene: browser.evaluate("page.state.scene") == scene, "the next scene")
    seen = "[page.state.dtype, page.state.T, page.state.bias, page.state.seed]"
    assert browser.evaluate(seen) == ["float32", 1024, 0, 7]
    browser.open("#scene=3&bias=2&seed=7&gate5=0.5")
    browser.drag(browser.place("form button:nth-of-type(3)"))  # start again
    assert browser.evaluate(seen) == ["float16", 64, 0, 1]
    assert browser.evaluate("[location.hash, page.state.gate5]") == ["#scene=3", None]


def test_nonsense_in_the_address_is_harmless(browser: Browser) -> None:
    browser.open("#scene=6&bias=x&T=1000&block=-3&dtype=float8&carry=&gate9=-1&gate0x=1&toString=1&submit=2&seed=1e9")
    state = browser.evaluate("page.state")
    assert state["T"] == 1024 and state["dtype"] == "float32" and state["seed"] == 99 and "gate9" not in state
    browser.open("#scene=77")
    assert browser.evaluate("page.state.scene") == 9
    assert browser.complaints() == []


def test_arrow_keys(browser: Browser) -> None:
    browser.open("#scene=0&reach=1000")
    browser.press("ArrowRight")
    browser.wait(lambda: browser.evaluate("page.state.scene") == 1, "the next scene")
    browser.evaluate("document.querySelector('svg').focus()")
    gate, put = browser.evaluate("page.result.f")[8], browser.evaluate("page.result.x")[8]
    browser.press("ArrowDown")
    browser.press("ArrowUp", shift=True)
    assert browser.evaluate("page.result.f")[8] == pytest.approx(gate - 0.05, abs=0.01)
    assert browser.evaluate("page.result.x")[8] == pytest.approx(put + 0.1, abs=0.01)
    browser.press("ArrowLeft")
    assert browser.evaluate("[page.state.scene, page.state.at]") == [1, 8]
    moves = (2, "ArrowDown", "at", 9, 10), (4, "ArrowRight", "size", 1000, 1260), (7, "ArrowRight", "round", 0, 1)
    for scene, key, name, before, after in moves:
        browser.open(f"#scene={scene}")
        browser.evaluate("document.querySelector('svg').focus()")
        assert browser.evaluate(f"page.state.{name}") == before
        browser.press(key)
        assert browser.evaluate(f"page.state.{name}") == after
    assert browser.complaints() == []


def test_mouse_and_touch(browser: Browser) -> None:
    browser.open("#scene=1")
    low, high = browser.place("svg", 4.5 / 16, 0.3), browser.place("svg", 6.5 / 16, 0.12)
    browser.drag(high, low)  # over gates 7, 5
    state = browser.evaluate("page.state")
    assert 0.4 < state["gate7"] <= 1 and state["gate5"] < 0.15 and not any(key.startswith("input") for key in state)
    browser.open("#scene=4")
    browser.drag(browser.place("svg", 0.5), browser.place("svg", 1.0))
    assert browser.evaluate("page.state.size") > 9e5
    browser.open("#scene=6&T=64")
    strip = [browser.place("svg", 0.5, 1 - 35 / browser.evaluate("document.querySelector('svg').clientHeight"))]
    browser.drag(*strip)
    resets = [name for name, y in browser.evaluate("page.state").items() if name.startswith("gate") and y == 0]
    assert len(resets) == 1 and 24 < int(resets[0][4:]) < 40
    browser.drag(*strip)
    assert resets[0] not in browser.evaluate("page.state")
    browser.open("#scene=2", 390)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = browser.place("svg rect:last-of-type", 0.5, -1.5)
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert browser.evaluate("page.state.at") == 7
    assert browser.complaints() == []


@pytest.mark.parametrize("scene", range(10))
def test_check_button(browser: Browser, scene: int) -> None:
    solution, answer = SOLUTIONS[scene]
    browser.open(f"#scene={scene}")
    ask = f"document.querySelectorAll('.ask')[{scene}]"
    press = f"({ask}.querySelector('button').click(), {ask}.querySelector('output').textContent)"
    assert "Not yet" in browser.evaluate(press)
    browser.open(f"#scene={scene}&" + "&".join(f"{name}={value}" for name, value in solution.items()))
    if answer is not None:
        browser.evaluate(f"{ask}.querySelector('input').value = {answer}")
    assert "✓" in browser.evaluate(press)


@pytest.mark.parametrize("scene", range(10))
def test_is_drawn_anew_in_another_window(browser: Browser, scene: int) -> None:
    browser.open(f"#scene={scene}")
    for width in (90, 700):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=500, deviceScaleFactor=1, mobile=False)
        browser.evaluate("dispatchEvent(new Event('resize'))")
    assert 240 < browser.evaluate("document.querySelector('svg').getBBox().width") <= 700
    assert browser.complaints() == []


def test_light_and_dark(browser: Browser) -> None:
    seen = []
    for scheme in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.open("#scene=1")
        corner = {"x": 0, "y": 0, "width": 9, "height": 9, "scale": 1}
        paper = browser.call("Page.captureScreenshot", clip=corner)["data"]
        seen.append((paper, browser.evaluate("getComputedStyle(document.querySelector('rect.gate')).fill")))
    browser.call("Emulation.setEmulatedMedia", features=[])
    (light, blue), (dark, lighter_blue) = seen
    assert light != dark and blue != lighter_blue
