"""Make one of the environments that `make` uses, from its pins: `python pins/environment.py NAME`; `clean` removes all.

An environment is ready once its stamp is written, which is the last step. The stamp is a hash of everything that the
environment is made of; if it is missing or differs, the folder is removed and made again. Only the standard library is
needed, and any Python 3.7 can read this file, so that an older one is refused in one line.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "pins"
STAMP, MARK, LOG = "installed", "made-by-make", "pip.log"
OLD_STAMPS = (STAMP, "demo-installed", "made")  # of the environments that earlier Makefiles made
EXPORT_PYTHON = (3, 11)  # diffusers 0.42 needs it, so exports and their tests do
# The reference of the web UI's samplers. Its one file of them is read alone; what it needs for training is not installed.
K_DIFFUSION = "k-diffusion==0.1.1.post1"
RUNTIME = "cpu,openvino,tensorrt-rtx,serve"


class Environment(NamedTuple):
    folder: str
    pins: str | None  # a file of constraints in pins/; None: the newest releases that pyproject.toml allows
    steps: tuple[tuple[str, ...], ...]  # arguments of pip, one call each
    python: tuple[int, int] = (3, 10)


def editable(extras: str) -> tuple[tuple[str, ...], ...]:
    """Return pip's steps for the package with these extras. Its build backend comes from the pins too, so it goes first."""
    return ("install", "--upgrade", "setuptools"), ("install", "--no-build-isolation", "--editable", f".[{extras}]")


ALONE = ("install", "--no-deps", K_DIFFUSION)
ENVIRONMENTS = {
    "demo": Environment(".venv", "main.txt", editable("cpu")),
    "test": Environment(
        ".venv-test", "main.txt", (*editable(f"{RUNTIME},export,test,reference"), ALONE), EXPORT_PYTHON
    ),
    "newest": Environment(".venv-newest", None, (*editable(f"{RUNTIME},export,test,reference"), ALONE), EXPORT_PYTHON),
    "oldest": Environment(".venv-oldest", "oldest.txt", editable(f"{RUNTIME},test")),
    # The extra `export` compares what it exports on onnxruntime, and onnxruntime-gpu has files of the same names: both
    # go, and the one for GPUs comes back, which has the CPU's provider too.
    "gpu": Environment(
        ".venv-gpu",
        "main.txt",
        (
            *editable("cuda,tensorrt-rtx,serve,export,test,reference"),
            ("uninstall", "--yes", "onnxruntime", "onnxruntime-gpu"),
            *editable("cuda")[1:],
        ),
        EXPORT_PYTHON,
    ),
    "interop": Environment(".venv-interop", "interop.txt", (("install", "--requirement", "pins/interop.in"),)),
    "pins": Environment(".venv-pins", "uv.txt", (("install", "uv"),)),
}


class Refused(Exception):
    """One line on why there is no environment."""


def interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pythons(pins: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the oldest and the newest Python that a file of pins is for, by its first line."""
    try:
        text = pins.read_text(encoding="utf-8")
    except OSError as fault:
        raise Refused(f"{name_of(pins)}: {fault.strerror or fault}; get it back with git, or run make pins") from None
    found = re.match(r"#.* for Python 3\.(\d+)(?: to 3\.(\d+))?", text)
    if not found:
        raise Refused(f"{name_of(pins)} does not say which Python it is for; get it back with git, or run make pins")
    first = int(found[1])
    return (3, first), (3, int(found[2] or first))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def check_python(name: str, environment: Environment, version: tuple[int, int]) -> None:
    first, last = environment.python, (3, 99)
    if environment.pins:
        oldest, last = pythons(PINS / environment.pins)
        first = max(first, oldest)
    if not first <= version <= last:
        wanted = f"{first[0]}.{first[1]}" + (f" to {last[0]}.{last[1]}" if environment.pins else " or newer")
        have = f"{version[0]}.{version[1]}"
        raise Refused(f"the {name} environment is for Python {wanted}, this is {have}; name one with make PYTHON=...")


def project() -> str:
    """Return the parts of pyproject.toml that an installation depends on, as text."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    try:
        import tomllib
    except ImportError:  # Python 3.10
        return text
    tables = tomllib.loads(text)
    return repr((tables["build-system"], tables["project"], tables["tool"]["setuptools"]))


def digest(environment: Environment) -> str:
    files = [PINS / environment.pins] if environment.pins else []
    files += [ROOT / step[-1] for step in environment.steps if "--requirement" in step]
    parts = [repr(environment), sys.version, sys.base_prefix, str(ROOT), project()]
    return hashlib.sha256("\0".join([*parts, *(f.read_text(encoding="utf-8") for f in files)]).encode()).hexdigest()


def is_ours(folder: Path) -> bool:
    """Return whether an environment was made here before; an empty folder is nobody's, and may go."""
    return folder.is_dir() and (not any(folder.iterdir()) or any((folder / n).is_file() for n in (MARK, *OLD_STAMPS)))


def remove(folder: Path) -> None:
    """Remove an environment that was made here before. Anything else of that name is the user's own."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a removal that was interrupted
    if not folder.exists() and not folder.is_symlink():
        return
    if not is_ours(folder):
        raise Refused(f"{folder.name} was not made by make; move it away, so that it can be made")
    folder.replace(old)  # what is half removed has another name, and is not taken for an environment
    shutil.rmtree(old)


def create(folder: Path, log: Any) -> None:
    command = [sys.executable, "-m", "venv", str(folder)]
    if subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=own_environment()).returncode:
        log.flush()
        why = reason((folder / LOG).read_text(encoding="utf-8", errors="replace"), 1)
        full = why if why.startswith("the disk") else "Debian needs its package python3-venv for that"
        raise Refused(f"{folder.name}: this Python made no virtual environment; {full}")


def own_environment() -> dict[str, str]:
    """Return the variables for pip, without those that would show it another environment's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def pip(folder: Path, step: tuple[str, ...], pins: Path | None, log: Any) -> None:
    command = [str(interpreter(folder)), "-m", "pip", *step]
    if step[0] == "install":
        command += ["--no-input", "--disable-pip-version-check", *(["--constraint", str(pins)] if pins else [])]
    begun = log.tell()
    child = subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=own_environment(), cwd=str(ROOT)
    )
    try:
        status = child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise
    if status:
        log.flush()
        with open(log.name, encoding="utf-8", errors="replace") as file:
            file.seek(begun)
            raise Refused(f"{folder.name}: {reason(file.read(), status)}; pip's own words are in {folder.name}/{LOG}")


# What pip prints, and its library for HTTP, where the index or a proxy does not answer
UNREACHABLE = re.compile(
    r"(Failed to resolve|Failed to establish|name resolution|Name or service not known|getaddrinfo failed|Network is unreachable"
    r"|Connection refused|ConnectTimeout|timed out|Max retries exceeded|ProxyError|Connection reset|RemoteDisconnected"
    r"|Cannot connect to proxy|Connection aborted|CERTIFICATE_VERIFY_FAILED)"
)


def reason(log: str, status: int) -> str:
    """Return why pip failed, from what it printed: what could not be fetched, or its own first error."""
    if "No space left on device" in log:
        return f"the disk is full: {shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free"
    errors = re.findall(r"(?mi)^\s*ERROR: (.*)", log)
    wanted = re.findall(r"No matching distribution found for (\S+)", log)
    silent = any(UNREACHABLE.search(e) for e in errors) or ("(from versions: none)" in log and UNREACHABLE.search(log))
    if silent:
        return f"could not fetch {wanted[-1] if wanted else 'a package'}: no package index could be reached"
    if wanted:
        return f"could not fetch {wanted[-1]}: no index has it for Python {sys.version_info[0]}.{sys.version_info[1]}"
    return errors[0].rstrip(".") if errors else f"pip ended with status {status}"


def make(name: str) -> None:
    environment = ENVIRONMENTS[name]
    check_python(name, environment, sys.version_info[:2])
    folder, stamp = ROOT / environment.folder, digest(environment)
    if (folder / STAMP).is_file() and (folder / STAMP).read_text(encoding="utf-8") == stamp:
        return
    begun = time.time()
    print(f"Making {folder.name}: {LOG} in it shows how far it is.", flush=True)
    remove(folder)
    pins = PINS / environment.pins if environment.pins else None
    folder.mkdir()
    (folder / MARK).touch()
    with open(folder / LOG, "a", encoding="utf-8") as log:
        create(folder, log)
        for step in environment.steps:
            pip(folder, step, pins, log)
    (folder / STAMP).write_text(stamp, encoding="utf-8")
    print(f"Made {folder.name} in {time.time() - begun:.0f} s.", flush=True)


def clean() -> None:
    """Remove the environments that were made here, and the folder `build`. Others of those names stay."""
    for environment in ENVIRONMENTS.values():
        folder = ROOT / environment.folder
        if folder.exists() and not is_ours(folder):
            print(f"{folder.name} was not made by make; it stays.")
            continue
        remove(folder)
    shutil.rmtree(ROOT / "build", ignore_errors=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if len(sys.argv) != 2 or sys.argv[1] not in (*ENVIRONMENTS, "clean"):
        print(f"usage: python pins/environment.py {'|'.join((*ENVIRONMENTS, 'clean'))}", file=sys.stderr)
        return 2
    try:
        if sys.argv[1] == "clean":
            clean()
        else:
            make(sys.argv[1])
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    except OSError as fault:
        print(f"{fault.filename or ROOT}: {fault.strerror or fault}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; it will be made again next time", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
