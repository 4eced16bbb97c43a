"""Runs steps one after another: each in a process of its own, with a time limit, and a line in the results at once.

A step that hangs is killed with its children, a failure is recorded with the end of its output, and the next one goes on.
What succeeded before is not run again. Needs Python and Linux alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .steps import Attempt, Step

RESULTS = "results.jsonl"
_TAIL = 3000  # characters of a failed step's output
_LEAST = 10  # seconds that must be left to begin a step


def run(
    steps: Sequence[Step], root: Path, store: Path, seconds: float, back: Path | None = None, again: bool = False
) -> list[dict[str, Any]]:
    """Run `steps` within `seconds`; returns the lines that were recorded. `back`: a second folder for the results.

    again: also what succeeded before.
    """
    root, store = root.resolve(), store.resolve()
    for folder in (store / "logs", store / "work", store / "tree", *([back] if back else [])):
        folder.mkdir(parents=True, exist_ok=True)
    link = store / "tree" / "vega_edge"
    if not link.is_symlink():
        link.symlink_to(root)
    if back is not None and (store / RESULTS).is_file():
        shutil.copyfile(store / RESULTS, back / RESULTS)
    _end_orphans(store)
    end, made = time.monotonic() + seconds, list[dict[str, Any]]()
    for step in _ordered(steps, read(store)):
        with _alone(store, step.name, end) as alone:
            lines = read(store)
            if not alone:
                print(f"{step.name}: another process still runs it", flush=True)
                continue
            if not again and succeeded(lines, step.name) and not stands_in(lines, step.name):
                continue
            left = end - time.monotonic()
            if left < _LEAST:
                print(f"{step.name}: left for the next command, {max(left, 0):.0f} s remain", flush=True)
                continue
            lacking = [name for name in step.needs if not succeeded(lines, name)]
            if lacking:
                made.append(record(store, back, {"step": step.name, "status": "skipped", "why": f"needs {', '.join(lacking)}"}))  # fmt: skip
                continue
            for number, attempt in enumerate(step.attempts):
                left = end - time.monotonic()
                if left < _LEAST:
                    break
                line = _try(step, number, attempt, store, min(step.limit, left), _environment(store, lines))
                made.append(record(store, back, line))
                if line["status"] == "ok":
                    break
    if back is not None and (store / RESULTS).is_file():  # with lines of the background
        shutil.copyfile(store / RESULTS, back / RESULTS)
    return made


def _ordered(steps: Sequence[Step], lines: Sequence[Mapping[str, Any]]) -> list[Step]:
    """What failed before, and nothing else needs, comes after what was never tried."""
    tried = {line["step"] for line in lines if line["status"] in ("failed", "timeout")}
    needed = {name for step in steps for name in step.needs}
    return sorted(steps, key=lambda step: step.name in tried and step.name not in needed)


def succeeded(lines: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether the step's last line is a success."""
    states = [line["status"] for line in lines if line.get("step") == name and line["status"] != "skipped"]
    return bool(states) and states[-1] == "ok"


def stands_in(lines: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether the step's last result is a stand-in for what was wanted, which is tried again with what has come since."""
    results = [line.get("result", {}) for line in lines if line.get("step") == name and line["status"] != "skipped"]
    return bool(results) and bool(results[-1].get("embedded"))


def read(store: Path, name: str = RESULTS) -> list[dict[str, Any]]:
    """Return the recorded lines; one that a killed process left unfinished is no line."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (store / name).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def record(store: Path, back: Path | None, line: dict[str, Any]) -> dict[str, Any]:
    """Append one line, on disk when this returns, and print what it says in short."""
    line = {"time": time.strftime("%H:%M:%S"), **line}
    for folder in (store, back):
        if folder is None:
            continue
        file = folder / RESULTS
        torn = file.is_file() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
        with file.open("a", encoding="utf-8") as out:
            out.write(("\n" if torn else "") + json.dumps(line) + "\n")
            out.flush()
            os.fsync(out.fileno())
    print(" ".join(str(line[key]) for key in ("time", "step", "status", "seconds", "why") if key in line), flush=True)
    return line


def report(results: Path) -> str:
    """Return the recorded lines for people: one for each attempt, then what was measured."""
    lines = read(results.parent, results.name)
    text = [
        f"{line.get('step', ''):24} {line['status']:8} {line.get('seconds', ''):>7} {_short(line)}" for line in lines
    ]
    for line in lines:
        rows = line.get("result", {}).get("rows", [])
        for row in rows:
            sides = ", ".join(f"{name} {side['p50_s']:.4f} s" for name, side in row["sides"].items())
            text.append(
                f"{row['model']} {row['width']}x{row['height']} batch {row['batch']}, {row['steps']} steps: {sides}"
            )
    return "\n".join(text)


def _short(line: Mapping[str, Any]) -> str:
    return str(line.get("why") or (line.get("tail", "").strip().splitlines() or [""])[-1])[:100]


def start(words: Sequence[str], root: Path, store: Path, seconds: float) -> int:
    """Run steps in a session of their own, which goes on when this command ends; returns the process's id."""
    (store / "logs").mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_kit",
        "run",
        *words,
        "--seconds",
        str(seconds),
        "--store",
        str(store),
    ]
    with (store / "logs" / f"background-{'-'.join(words)}.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)  # fmt: skip
    (store / f"background-{'-'.join(words)}.pid").write_text(str(process.pid))
    return process.pid


def stop(word: str, store: Path) -> None:
    """Kill what `start` began under this name, if it still runs, with all its children."""
    file = store / f"background-{word}.pid"
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid = int(file.read_text())
        with contextlib.suppress(OSError):
            if b"benchmarks.gpu_kit" in Path(f"/proc/{pid}/cmdline").read_bytes():
                kill_tree(pid)
        file.unlink()


def kill_tree(pid: int) -> None:
    """Kill a process and all that descend from it, whatever groups and sessions they are in."""
    doomed = [pid, *_descendants(pid)]
    for each in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGSTOP)  # none of them begins another meanwhile
    doomed = list(dict.fromkeys([*doomed, *_descendants(pid)]))
    for each in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            text = stat.read_text()
            parents.setdefault(int(text[text.rindex(")") + 2 :].split()[1]), []).append(int(stat.parent.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def _try(
    step: Step, number: int, attempt: Attempt, store: Path, limit: float, environment: dict[str, str]
) -> dict[str, Any]:
    log, result = store / "logs" / f"{step.name}-{number}.log", store / "work" / f"{step.name}-{number}.json"
    result.unlink(missing_ok=True)
    begin, status = time.monotonic(), "failed"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *attempt.words], cwd=store / "work", stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env={**environment, **attempt.env, "GPU_KIT_RESULT": str(result)}, preexec_fn=_as_a_group,
        )  # fmt: skip
        pid = store / "work" / f"{step.name}.pid"
        pid.write_text(str(process.pid))
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:  # on an interruption too
            _end_group(process.pid, tree=process.poll() is None)
            process.wait()
            pid.unlink()
    line: dict[str, Any] = {"step": step.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
    line |= {"attempt": number, "words": list(attempt.words[2:]), "rc": process.returncode}
    if attempt.env:
        line["env"] = dict(attempt.env)
    if status != "ok":
        line["tail"] = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        line["result"] = json.loads(result.read_text(encoding="utf-8"))
    return line


def _as_a_group() -> None:
    """In a step's process before it begins: a group that can be killed, which ends with this runner."""
    os.setpgrp()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_group(pid: int, tree: bool) -> None:
    """Kill a step's group, and with `tree`, while it runs, also what it started elsewhere."""
    if tree:
        kill_tree(pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _end_orphans(store: Path) -> None:
    """Kill what a runner that was killed has left behind: steps whose lock nobody holds."""
    for file in (store / "work").glob("*.pid"):
        with _alone(store, file.stem, 0) as alone, contextlib.suppress(FileNotFoundError, ValueError):
            if alone:
                _end_group(int(file.read_text()), tree=False)
                file.unlink()


def _environment(store: Path, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The steps': the store's packages and caches, no network, and what earlier attempts found necessary."""
    store = store.resolve()
    found: dict[str, str] = {}
    for line in lines:
        if line["status"] == "ok":
            found |= line.get("env", {})
    return {
        **os.environ, **found,
        "PYTHONPATH": f"{store / 'site'}:{store / 'tree'}", "PYTHONUNBUFFERED": "1",
        "GPU_KIT_STORE": str(store), "VEGA_EDGE_HOME": str(store / "home"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(store / "inductor"), "TRITON_CACHE_DIR": str(store / "triton"),
    }  # fmt: skip


@contextlib.contextmanager
def _alone(store: Path, name: str, end: float) -> Iterator[bool]:
    """Hold the step's lock, which ends with its holder: a step that runs in the background is waited for until `end`.
    Gives whether it is held."""
    with (store / "work" / f"{name}.lock").open("w") as lock:
        held = False
        while not held:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(0.2)
        yield held
