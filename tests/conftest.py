"""The markers of the tests that need more than a plain machine, and what many files need once: checkpoints, exports."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

EXPORT_GB = 2.0  # of memory, and of disk: what a test that exports a tiny checkpoint may take
# What a test was skipped for want of, by its reason; the first that is found counts.
WANTS = (
    (r"GB of (memory|disk)", "memory or disk"),
    (r"Chromium|playwright", "a browser"),
    (r"axios", "npm's axios"),
    (r"test-interop", "optimum (make test-interop)"),
    (r"test-full|full-size", "full-size models (make test-full)"),
    (r"NVIDIA|GPU|CUDA|cuda|sm_\d", "an NVIDIA GPU"),
    (r"bf16|VNNI|AMX", "instructions of the CPU"),
    (r"not installed|could not import|\bneeds torch\b|No module named", "a package"),
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped, with the reason, where there is none")
    config.addinivalue_line("markers", "full: needs full-size bundles and gigabytes of memory; part of make test-full")
    config.addinivalue_line(
        "markers",
        "needs(memory_gb=0, disk_gb=0): free memory, and free disk for temporary files; skipped, with the figure",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"exported", "checkpoints"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.needs(memory_gb=EXPORT_GB, disk_gb=EXPORT_GB))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        if missing := too_little(**marker.kwargs):
            pytest.skip(missing)


def too_little(memory_gb: float = 0, disk_gb: float = 0) -> str | None:
    """Return what this machine has too little of at the moment, with the figures. None if there is enough."""
    from vega_edge.runtime.memory import free_bytes

    folder = tempfile.gettempdir()
    free = {"memory": free_bytes(), f"disk in {folder}": shutil.disk_usage(folder).free}
    for (name, have), want in zip(free.items(), (memory_gb, disk_gb), strict=True):
        if have is not None and have < want * 1e9:
            return f"needs {want:g} GB of {name}, {have / 1e9:.1f} GB are free"
    return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """Print one line on what was skipped, after pytest's own list and before its last line."""
    yield
    reports = terminalreporter.stats.get("skipped", ())
    if line := skips_in_one_line(r.longrepr[2] if isinstance(r.longrepr, tuple) else str(r.longrepr) for r in reports):
        terminalreporter.write_line(line)


def skips_in_one_line(reasons: Iterable[str]) -> str | None:
    """Return how many tests were skipped for want of what. A file that is skipped counts as one."""
    counts = Counter(next((want for pattern, want in WANTS if re.search(pattern, r)), "") for r in reasons)
    others = counts.pop("", 0)
    parts = [f"{count} for want of {want}" for want, count in counts.most_common()]
    parts += [f"{others} for another reason"] if others else []
    return f"Skipped: {', '.join(parts)}." if parts else None


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell's background job has SIGINT ignored, and so would every process that tests start and interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_logging_of_an_earlier_test() -> None:
    """The command line logs to the stderr it finds, which is closed after its test; a server's thread may still log.
    `serve` silences what quotes prompts."""
    logging.getLogger("vega_edge.runtime.text").setLevel(logging.NOTSET)
    for logger in (logging.getLogger(), logging.getLogger("vega_edge.serve.requests")):
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def home_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests compile and remember is not kept among the user's files, unless VEGA_EDGE_HOME asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        if "VEGA_EDGE_HOME" not in os.environ:
            patch.setenv("VEGA_EDGE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def kept_traces() -> Iterator[None]:
    """Exports of a network that this process traced before take that trace; the first of each kind is made as always."""
    pytest.importorskip("torch", reason="exporting needs torch (the export extra)")
    from vega_edge.export import graphs

    from .kept_traces import keeping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "trace", keeping(graphs.trace, {}))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, kept_traces: None) -> dict[str, Path]:
    """Tiny random checkpoints of both kinds. Not to be changed: all tests share them."""
    from .checkpoints import make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(root / f"tiny-{kind}", sdxl=kind == "xl") for kind in ("xl", "sd")}


@pytest.fixture(scope="session")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["sd"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, kept_traces: None) -> Callable[..., Path]:
    """exported(SOURCE, OPTION, ...): the bundle that `vega-edge export` makes of it, once. Not to be changed either."""
    from vega_edge.cli import main

    root, done = tmp_path_factory.mktemp("exported"), dict[tuple[str, ...], Path]()

    def export(*arguments: str | Path) -> Path:
        key = tuple(map(str, arguments))
        if key not in done:
            bundle = root / str(len(done)) / Path(key[0]).name
            bundle.parent.mkdir()
            assert main(["export", *key, "-o", str(bundle)]) == 0
            done[key] = bundle
        return done[key]

    return export


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Any]]:
    """make_worker(DRAWER, OPTION=...): a server's worker that draws with it, stopped at the end."""
    from vega_edge.serve.metrics import Metrics
    from vega_edge.serve.residents import Residents
    from vega_edge.serve.worker import Worker

    workers = []

    def new(drawer: Any, **options: Any) -> Worker:
        worker = Worker(Residents(lambda name: drawer, lambda name: 1), Metrics(), **options)
        worker.start()
        workers.append(worker)
        return worker

    yield new
    for worker in workers:
        worker.stop(0)
        assert worker.join(20)


@pytest.fixture(scope="module")  # no longer: other tests can't run an event loop while it is there
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page_of(browser: Any) -> Iterator[Callable[..., Any]]:
    """page_of(SERVER, PATH, before=..., OPTION=...): a page of a server's; `before(page)` is called before it is opened."""
    faults: list[str] = []
    contexts = []

    def open_page(
        server: Any, path: str = "/", before: Callable[[Any], Any] = lambda page: None, **options: Any
    ) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((server.url, "blob:")) else None)
        before(page)
        page.goto(server.url + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []  # no script error, and nothing was fetched from anywhere else
