"""A process under watch: whom it contacts, and which files it writes.

By strace where that is installed and allowed. Elsewhere by Python's audit events, which do not see what a library's own
code does; the files that it leaves are compared then, too.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CALLS = "connect,sendto,sendmsg,sendmmsg,openat,open,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
# -y: a folder's number with its path; --seccomp-bpf: other calls are not slowed down
_OPTIONS = ("-f", "-qq", "-y", "-s", "4096", "--seccomp-bpf", "-e", "signal=none")
_ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')
_NAMES = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')
_WRITES = re.compile(r"^\d+ +(?:open(?:at)?\(.*O_(?:WRONLY|RDWR|CREAT)|(?:creat|mkdir|rename|link|symlink)\w*\()")
_DNS = 53
RESOLVER = "/run/systemd/resolve/"  # sockets by which nss-resolve looks names up; their messages are not readable
_HOOK = """
import os, sys
_log, _busy = os.open(os.environ["WATCHED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), []
def _heard(event, arguments):
    if _busy or event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "open"):
        return
    _busy.append(event)
    try:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                os.write(_log, f"write {os.path.abspath(os.fsdecode(path))}\\n".encode())
        else:
            told = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
            os.write(_log, f"{event} {told!r}\\n".encode())
    finally:
        _busy.clear()
sys.addaudithook(_heard)
"""


@dataclass
class Seen:
    """contacts: addresses beyond this machine and names that were looked up. written: files, by their whole paths."""

    status: int = 0
    stdout: str = ""
    stderr: str = ""
    contacts: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    def written_outside(self, *folders: Path) -> list[Path]:
        allowed = [Path(os.path.realpath(folder)) for folder in (*folders, Path("/dev"), Path("/proc"))]
        real = [Path(os.path.realpath(path.parent)) / path.name for path in self.written]
        return sorted({path for path in real if not any(path == a or a in path.parents for a in allowed)})


def has_strace() -> bool:
    """Whether it is installed and may trace a process: in many containers it may not."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", *_OPTIONS, "-o", os.devnull, "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def watched(
    arguments: Sequence[str], folder: Path, env: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], Seen]]:
    """Runs Python with `arguments` in `folder`, with no environment but `env`. What was seen is there when the block has
    ended. A process that still runs then is waited for, 300 s at most, and killed: interrupt it inside the block."""
    log = folder.parent / f"{folder.name}.log"
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **env}
    command = [sys.executable, *arguments]
    if by_strace := has_strace():
        command = ["strace", *_OPTIONS, "-e", f"trace={_CALLS}", "-o", str(log), *command]
    else:
        hook = folder.parent / f"{folder.name}-hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(_HOOK, encoding="utf-8")
        paths = [str(hook), *filter(None, [env.get("PYTHONPATH")])]
        env |= {"WATCHED_LOG": str(log), "PYTHONPATH": os.pathsep.join(paths)}
    seen = Seen()
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process, seen
        seen.stdout, seen.stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    seen.status = process.returncode
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    (read_strace if by_strace else _read_events)(lines, seen, folder)


def read_strace(lines: list[str], seen: Seen, folder: Path) -> None:
    for line in lines:
        for port, address in _ADDRESS.findall(line):
            if int(port) == _DNS or not ipaddress.ip_address(address).is_loopback:
                seen.contacts.append(f"{address}:{port}")
        if " connect(" in line and f'sun_path="{RESOLVER}' in line:
            seen.contacts.append(RESOLVER)
        if _WRITES.match(line) and " = -1 " not in line:
            base, name = _NAMES.findall(line)[-1]
            seen.written.append(folder / base / os.fsdecode(name.encode().decode("unicode_escape").encode("latin-1")))


def _read_events(lines: list[str], seen: Seen, folder: Path) -> None:
    for line in lines:
        event, _, told = line.partition(" ")
        if event == "write":
            seen.written.append(Path(told))
        elif not re.match(r"\('(127\.|::1'|localhost')|'/|b'/|\(None", told):
            seen.contacts.append(line)
