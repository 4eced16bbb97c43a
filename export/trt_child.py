"""One plan built in a process of its own, which the caller can end at any moment: the library's longest phase calls nobody
back for most of its time, so that nothing inside the process could stop it. Its memory goes back to the system, too.

What the two say to each other are pickles over the child's stdin and stdout; the plan itself is written to a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ..errors import EngineError, VegaEdgeError
from .trt_library import cure, load_library
from .trt_network import Job, Progress, build_to, where

_TICK_S = 0.5  # how often progress is told anew while the library says nothing
_log = logging.getLogger(__name__)


def build_apart(job: Job, plan: Path, progress: Progress) -> bytes:
    """`build_to` in a child. Its errors are raised here. After KeyboardInterrupt, which comes at once, the child is gone."""
    # The same modules as here, wherever they came from. In a group or session of its own, because Ctrl-C in a terminal
    # goes to a whole group and the child would say something of its own about it.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    alone: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **alone)
    assert child.stdin is not None and child.stdout is not None
    said: queue.Queue[tuple[Any, ...]] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child.stdout, said), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(OSError):  # it ended already: `_follow` says so
            told = replace(job, library=None)  # type: ignore[arg-type] # a module can't be sent
            pickle.dump((job.library.name, told, plan, _log.getEffectiveLevel()), child.stdin)
            child.stdin.flush()
        return _follow(child, said, job, progress)
    finally:
        child.kill()
        child.wait()
        reader.join()
        child.stdout.close()
        with contextlib.suppress(OSError):
            child.stdin.close()


def _read(stream: IO[bytes], said: queue.Queue[tuple[Any, ...]]) -> None:
    try:
        with contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                said.put(pickle.load(stream))
    finally:
        said.put(("ended",))


def _follow(child: subprocess.Popen[bytes], said: queue.Queue[tuple[Any, ...]], job: Job, progress: Progress) -> bytes:
    share, phase = 0.0, "starting"
    while True:
        try:
            kind, *what = said.get(timeout=_TICK_S)  # with a time: else Windows would not hear Ctrl-C
        except queue.Empty:
            kind = "quiet"
        if kind == "ended":
            if (status := child.wait()) == 1:
                raise EngineError(f"{where(job)}: the process that builds it failed, as is said above")
            why = f"the process that builds it ended with status {status}, as it does where memory runs out"
            raise EngineError(f"{where(job)}: {why}; {cure(['out of memory'], ())}")
        if kind == "failed":
            raise what[0]
        if kind == "done":
            return bytes(what[0])
        if kind == "log":
            _log.log(what[0], "%s", what[1])
        else:
            share, phase = what if kind == "progress" else (share, phase)
            progress(share, phase)


def main() -> None:
    """The child."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not get between
    name, told, plan, level = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    talk = threading.Lock()  # the library calls back from threads of its own

    def say(*message: Any) -> None:
        with talk:
            pickle.dump(message, out)
            out.flush()

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say("log", record.levelno, self.format(record))

    logging.basicConfig(level=level, handlers=[Teller()], format="%(message)s")
    try:
        job = replace(told, library=load_library(name))
        say("done", build_to(job, plan, lambda share, phase: say("progress", share, phase)))
    except VegaEdgeError as failure:  # any other is a defect, and keeps its traceback
        say("failed", failure)


def _end_with_parent() -> None:
    """One that was killed closes the pipe and says nothing. Not through sys.stdin, whose lock this would hold at exit."""
    os.read(0, 1)
    os._exit(1)
