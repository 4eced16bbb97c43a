"""The environments that `make` makes: what they install is pinned, and one that was half made is made again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

import vega_edge

from . import conftest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(vega_edge.__file__).parent
PINS = ROOT / "pins"
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = TABLES["project"]
EXTRAS = PROJECT["optional-dependencies"]
SYSTEMS = {"linux": ("linux", "Linux", "x86_64", "posix"), "win32": ("win32", "Windows", "AMD64", "nt")}
RUNTIME = ("cpu", "openvino", "tensorrt-rtx", "serve")
EXPORT = ("cuda", "export", "train", "test", "reference")
# (file, extras, Pythons)
COVERED = [
    ("main.txt", RUNTIME, ("3.10", "3.11", "3.12", "3.13", "3.14")),
    ("main.txt", EXPORT, ("3.11", "3.12", "3.13", "3.14")),
    ("oldest.txt", (*RUNTIME, "test"), ("3.10", "3.11", "3.12")),
    ("jetson.txt", ("jetson", "serve"), ("3.10",)),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pins_{name}", PINS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


environment = load("environment")


def markers(python: str, system: str, machine: str | None = None) -> dict[str, str]:
    platform, name, usual, os_name = SYSTEMS[system]
    return {
        "python_version": python, "python_full_version": f"{python}.7", "sys_platform": platform, "os_name": os_name,
        "platform_system": name, "platform_machine": machine or usual, "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "extra": "",
    }  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(file: str, where: dict[str, str]) -> dict[str, str]:
    """Return name: version of the lines that count there."""
    found: dict[str, str] = {}
    for line in (PINS / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(where):
            assert normal(requirement.name) not in found, line
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[normal(requirement.name)] = specifier.version
    return found


def outside(rows: list[str], pins: dict[str, str], where: dict[str, str]) -> list[str]:
    """Return the requirements of `rows` that have no pin there, or one that they do not allow."""
    wanted = [r for r in map(Requirement, rows) if r.marker is None or r.marker.evaluate(where)]
    versions = {r: pins.get(normal(r.name)) for r in wanted}
    return [str(r) for r, v in versions.items() if v is None or not r.specifier.contains(v, prereleases=True)]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("file", "extras", "python"),
    [(file, extras, python) for file, extras, each in COVERED for python in each],
    ids=lambda v: "+".join(v) if isinstance(v, tuple) else v,
)
def test_the_pins_are_what_pyproject_allows(file: str, extras: tuple[str, ...], python: str, system: str) -> None:
    if file == "jetson.txt" and system == "win32":
        pytest.skip("a Jetson has Linux")
    where = markers(python, system, "aarch64" if file == "jetson.txt" else None)
    pins = pinned(file, where)
    rows = [*TABLES["build-system"]["requires"], *PROJECT["dependencies"], *(r for e in extras for r in EXTRAS[e])]
    assert outside(rows, pins, where) == []
    assert outside(["numpy>=99", "vega-edge-unheard-of", "pillow; python_version < '3'"], pins, where) == [
        "numpy>=99",
        "vega-edge-unheard-of",
    ]


def test_every_extra_has_pins() -> None:
    """All but TensorRT's, which takes what TensorRT-RTX's takes."""
    assert {extra for _, extras, _ in COVERED for extra in extras} == set(EXTRAS) - {"tensorrt"}
    assert set(EXTRAS["tensorrt"]) <= set(EXTRAS["tensorrt-rtx"])


def test_the_peers_pins_are_what_its_requirements_allow() -> None:
    rows = [r for line in (PINS / "interop.in").read_text().splitlines() if (r := line.partition("#")[0].strip())]
    assert len(rows) > 4
    for python in ("3.11", "3.12"):
        where = markers(python, "linux")
        assert outside(rows, pinned("interop.txt", where), where) == []


def test_the_lowest_versions_are_the_lowest() -> None:
    """Where a range begins with a version, that version is the one that make test-oldest installs."""
    pins, rows = pinned("oldest.txt", markers("3.11", "linux")), PROJECT["dependencies"]
    rows = [*rows, *(r for extra in RUNTIME for r in EXTRAS[extra])]
    for requirement in map(Requirement, rows):
        (lowest,) = (s.version for s in requirement.specifier if s.operator in (">=", "=="))
        assert re.match(rf"{re.escape(lowest)}(\.\d+)*$", pins[normal(requirement.name)]), requirement


@pytest.mark.parametrize("file", sorted(p.name for p in PINS.glob("*.txt") if p.name != "apt.txt"))
def test_pins_name_no_place(file: str) -> None:
    """They hold versions alone: nothing of the machine that made them, and no hash, since torch has several builds."""
    text = (PINS / file).read_text(encoding="utf-8")
    assert text.startswith("# Made by `make pins` for Python 3.") and environment.pythons(PINS / file)
    for line in text.splitlines()[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+( ; [^#@/]+)?", line), line
        _ = Marker(line.split(" ; ")[1]) if " ; " in line else None
    assert "resolved" not in (PINS / "axios" / "package-lock.json").read_text(encoding="utf-8")


PINNED = {
    "pip": r"(-c|--constraint) \S*pins/[\w-]+\.txt|--no-deps --target \S+ \.$",
    "npm": r"npm ci .*--prefix build/axios",  # a copy of pins/axios, with its lock file
    "apt-get": r"apt-get install .*\$\(cat pins/apt\.txt\)",
}


def unpinned(text: str) -> list[str]:
    """Return the commands in a Makefile or a script that install something without its pins."""
    commands = re.split(r"\n|&&|;|\|\|", re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*$", "", text)))
    found = []
    for command in map(str.strip, commands):
        for tool, pattern in PINNED.items():
            installs = re.search(rf"\b{tool}\b.*\b(install|ci|i|add|sync|download)\b", command)
            if installs and not re.search(pattern, command):
                found.append(command)
    return found


@pytest.mark.parametrize(
    "file", ["Makefile", ".ci/run", *(f"docker/{n}.Dockerfile" for n in ("cpu", "cuda", "jetson"))]
)
def test_every_installation_is_pinned(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.startswith("docker/"):  # Debian's packages are those of the base image's release
        text = re.sub(r"apt-get install[^&]*", "", text)
    assert unpinned(text) == []
    assert re.search(r"\b(install|pins/environment\.py)\b", text)


def test_an_installation_without_pins_is_noticed() -> None:
    text = (
        "a:\n\tpython -m pip install --quiet numpy\n\tnpm install axios\n\tapt-get install -y \\\n\t  chromium && ls\n"
    )
    assert unpinned(text) == [
        "python -m pip install --quiet numpy",
        "npm install axios",
        "apt-get install -y  \t  chromium",
    ]
    assert unpinned("pip install -c pins/main.txt x && npm ci --prefix build/axios") == []


def steps(name: str) -> Iterator[tuple[str, ...]]:
    yield from environment.ENVIRONMENTS[name].steps


@pytest.mark.parametrize(
    ("name", "runtime"),
    [("demo", "onnxruntime"), ("test", "onnxruntime"), ("oldest", "onnxruntime"), ("newest", "onnxruntime"),
     ("gpu", "onnxruntime-gpu")],
)  # fmt: skip
def test_each_environment_has_one_onnxruntime(name: str, runtime: str) -> None:
    """onnxruntime and onnxruntime-gpu overwrite each other's files."""
    there: set[str] = set()
    for step in steps(name):
        if step[0] == "install":
            for extra in ",".join(re.findall(r"\.\[([^\]]*)\]", " ".join(step))).split(","):
                there |= {n for row in EXTRAS.get(extra, ()) if (n := Requirement(row).name).startswith("onnxruntime")}
        elif step[0] == "uninstall":
            there -= set(step)
    assert there == {runtime}


def dry_run(target: str) -> list[str]:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--no-print-directory", target]
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # these tests may be run by make
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return told.stdout.splitlines()


@pytest.mark.parametrize(
    ("target", "name"),
    [("demo", "demo"), ("test", "test"), ("check", "test"), ("test-full", "test"), ("test-oldest", "oldest"),
     ("test-newest", "newest"), ("test-gpu", "gpu"), ("pins", "pins")],
)  # fmt: skip
def test_each_target_uses_the_environment_that_it_makes(target: str, name: str) -> None:
    lines = dry_run(target)
    assert lines[0].endswith(f" pins/environment.py {name}")
    used = {found for line in lines[1:] for found in re.findall(r"\.venv[\w-]*(?=/)", line)}
    assert used == {environment.ENVIRONMENTS[name].folder}


def test_the_interop_test_has_both_environments() -> None:
    assert [line.split()[-1] for line in dry_run("test-interop")[:2]] == ["test", "interop"]


def test_on_a_gpu_every_engine_that_is_there_runs_the_parametrised_tests() -> None:
    told = dry_run("test-gpu")[-1].split(" -m pytest ")[1].split()
    assert told == ["tests/test_gpu.py", "tests/test_gpu_plans.py", "tests/test_engines.py"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, whose environment `one` is a virtual environment with nothing in it."""
    (tmp_path / "pins").mkdir()
    (tmp_path / "pins" / "one.txt").write_text("# Made for Python 3.10 to 3.14\nnumpy==2.0.0\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "PINS", tmp_path / "pins")
    use(monkeypatch, ("--version",))
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, *steps: tuple[str, ...], pins: str = "one.txt") -> None:
    one = environment.Environment(".venv-one", pins, steps)
    monkeypatch.setattr(environment, "ENVIRONMENTS", {"one": one})


@pytest.fixture
def creations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that environments were created in, by a stand-in that is quicker than ensurepip."""
    made: list[Path] = []

    def create(folder: Path, log: Any) -> None:
        made.append(folder)
        python = environment.interpreter(folder)
        python.parent.mkdir()
        if os.name == "nt":
            shutil.copy(sys.executable, python)
        else:
            python.symlink_to(sys.executable)

    monkeypatch.setattr(environment, "create", create)
    return made


def test_an_environment_is_made_once(root: Path, creations: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    environment.make("one")
    environment.make("one")
    assert creations == [root / ".venv-one"]
    (root / ".venv-one" / "left-over").touch()
    with (root / "pins" / "one.txt").open("a") as file:
        file.write("pillow==12.0.0\n")
    environment.make("one")
    assert len(creations) == 2 and not (root / ".venv-one" / "left-over").exists()
    use(monkeypatch, ("--version",), ("--help",))
    environment.make("one")
    assert len(creations) == 3
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    (root / "pyproject.toml").write_text(text.replace('"tqdm>=', '"tqdm>=4.61,>='), encoding="utf-8")
    environment.make("one")
    assert len(creations) == 4


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, environment.Refused])
def test_a_half_made_environment_is_made_again(
    root: Path, creations: list[Path], monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    def stopped(*_: Any) -> None:
        (root / ".venv-one" / "half").touch()
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(environment, "pip", stopped)
        with pytest.raises(end):
            environment.make("one")
    environment.make("one")
    assert len(creations) == 2 and not (root / ".venv-one" / "half").exists()


def test_a_removal_that_was_interrupted_is_finished(
    root: Path, creations: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.make("one")

    def stopped(folder: Path, **_: Any) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    (root / "pins" / "one.txt").write_text("# Made for Python 3.10 to 3.15\n")
    with monkeypatch.context() as patch:
        patch.setattr(environment.shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            environment.make("one")
    environment.make("one")
    assert len(creations) == 2 and [p.name for p in root.glob(".venv*")] == [".venv-one"]


def test_an_environment_of_the_users_own_is_left_alone(root: Path, creations: list[Path]) -> None:
    own = root / ".venv-one" / "bin" / "activate"
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(environment.Refused):
        environment.make("one")
    assert own.exists() and not creations


def test_clean_removes_what_make_made_and_nothing_else(
    root: Path, creations: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.make("one")
    users = [root / ".venv-two" / "pyvenv.cfg", root / ".venv-others" / "pyvenv.cfg"]
    for file in [*users, root / "build" / "types" / "x"]:
        file.parent.mkdir(parents=True)
        file.touch()
    made = environment.ENVIRONMENTS["one"]
    monkeypatch.setattr(environment, "ENVIRONMENTS", {"one": made, "two": made._replace(folder=".venv-two")})
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["environment.py", "clean"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert environment.main() == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [".venv-two"]
    assert all(file.exists() for file in users)
    assert not (root / "build").exists() and not (root / ".venv-one").exists()
    assert dry_run("clean")[-1].endswith(" pins/environment.py clean")


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_pip_ends_with_the_command_that_started_it(root: Path, tmp_path: Path) -> None:
    """A pip that went on would write into the environment that is made next."""
    script = tmp_path / "sleep.py"
    script.write_text("import os, time, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(60)\n")
    code = (
        "import importlib.util, pathlib, signal, sys\n"
        f"spec = importlib.util.spec_from_file_location('e', {str(PINS / 'environment.py')!r})\n"
        "sys.modules['e'] = e = importlib.util.module_from_spec(spec); spec.loader.exec_module(e)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"root = e.ROOT = pathlib.Path({str(root)!r}); (root / 'v').mkdir()\n"
        "e.interpreter = lambda folder: root / 'python'\n"
        "e.pip(root / 'v', ('x',), None, open(root / 'v' / 'pip.log', 'a'))\n"
    )
    python = root / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {script}\n")
    python.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", code]) as running:
        try:
            pid = wait_for(lambda: (root / "pid").read_text() if (root / "pid").exists() else "")
            running.terminate()
            assert running.wait(20) == 143
        finally:
            running.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def wait_for(found: Callable[[], str]) -> str:
    for _ in range(400):
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError("not there after 20 s")


def test_what_pins_are_for_is_looked_at_first(root: Path, creations: list[Path]) -> None:
    for first_line in ("# Made for Python 3.10", "# Made for Python 3.98 to 3.99", "numpy==2.0.0"):
        (root / "pins" / "one.txt").write_text(first_line + "\n")
        with pytest.raises(environment.Refused):
            environment.check_python("one", environment.ENVIRONMENTS["one"], (3, 11))
    (root / "pins" / "one.txt").unlink()
    with pytest.raises(environment.Refused, match=r"pins/one\.txt"):
        environment.make("one")
    assert creations == []


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<x>: Failed to establish a "
            "new connection: [Errno -3] Temporary failure in name resolution')': /simple/pillow/\n"
            "ERROR: Could not find a version that satisfies the requirement pillow>=10.1 (from versions: none)\n"
            "ERROR: No matching distribution found for pillow>=10.1\n",
            ("pillow>=10.1", "no package index could be reached"),
        ),
        (
            "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(host='x', port=443): Max retries "
            "exceeded with url: /a.whl (Caused by ReadTimeoutError('Read timed out.'))\n",
            ("a package", "no package index could be reached"),
        ),
        ("ERROR: No matching distribution found for numpy==9\n", ("numpy==9", "no index has it for Python 3.")),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'ReadTimeoutError(\"Read timed out.\")': /simple/x/\n"
            "ERROR: Cannot install a and b because these package versions have conflicting dependencies.\n",
            ("Cannot install a and b because",),
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
            ("disk is full", "GB"),
        ),
        ("  error: subprocess-exited-with-error\n", ("subprocess-exited-with-error",)),
        ("", ("status 7",)),
    ],
)
def test_why_pip_failed_is_one_line(log: str, words: tuple[str, ...]) -> None:
    told = environment.reason(log, 7)
    assert all(word in told for word in words) and "\n" not in told


def test_skips_are_counted_by_what_is_missing() -> None:
    line = conftest.skips_in_one_line(
        ["Skipped: Chromium is not installed (Debian: apt-get install chromium)"] * 3
        + ["no NVIDIA GPU: cuInit found none"] * 2
        + ["Skipped: node with axios is not installed: npm install axios", "needs 2 GB of memory, 0.3 GB are free"]
        + ["Skipped: could not import 'torch': No module named 'torch'", "this machine has no IPv6"]
    )
    assert line == (
        "Skipped: 3 for want of a browser, 2 for want of an NVIDIA GPU, 1 for want of npm's axios, 1 for want of memory or "
        "disk, 1 for want of a package, 1 for another reason."
    )
    assert conftest.skips_in_one_line([]) is None


def test_a_run_ends_with_what_was_skipped() -> None:
    """With several processes too, and pytest's own summary stays the last line."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "VEGA_EDGE_"))}
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "tests/test_full_engines.py"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    before, last = done.stdout.splitlines()[-2:]
    assert re.search(r"\d+ skipped", last)
    assert re.match(r"Skipped: \d+ for want of (full-size models \(make test-full\)|a package)", before)


@pytest.mark.parametrize(
    ("needs", "skipped"), [({"memory_gb": 1e6}, True), ({"disk_gb": 1e6}, True), ({"disk_gb": 0}, False)]
)
def test_too_little_is_told_with_the_figure(needs: dict[str, float], skipped: bool) -> None:
    told = conftest.too_little(**needs)
    assert (told is not None) == skipped
    if told:
        assert re.match(r"needs 1e\+06 GB of (memory|disk in .*), \d+\.\d GB are free$", told)
