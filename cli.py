"""The command line: `vega-edge generate|serve|bench|export|build|engines|cache|verify|models|doctor`. Results go to
stdout, all else to stderr.

Exit status: 0 done, 1 an error of ours in one line, 2 a wrong argument, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import VegaEdgeError
from .verbs import bench, build, cache, doctor, engines, export, generate, models, serve, verify

_VERBS = (
    ("generate", generate, "draw pictures from a prompt", "Draw pictures from a prompt."),
    (
        "export",
        export,
        "turn a checkpoint into a bundle of ONNX graphs",
        "Turn a model, a diffusers folder or a single file into a bundle of ONNX graphs. Needs the export extra.",
    ),
    (
        "serve",
        serve,
        "serve Segmind's API and a live page on this machine",
        "Serve Segmind's HTTP API on this machine, and a page that draws while you type. Needs the serve extra.",
    ),
    (
        "bench",
        bench,
        "say how fast a model draws here",
        "Draw some pictures on each engine that works here, and say how long each stage took. `bench gpu` draws beside diffusers "
        "on a GPU: see bench gpu --help.",
    ),
    (
        "verify",
        verify,
        "say whether a bundle is whole and runs here",
        "Compare a bundle's files with its manifest, and run each of its graphs once. Needs no torch.",
    ),
    (
        "build",
        build,
        "build TensorRT engines from a bundle",
        "Build TensorRT-RTX engines (no GPU needed) or TensorRT engines (for the GPU here) from a bundle's graphs.",
    ),
    ("engines", engines, "list or remove built engines", "List or remove a bundle's built engines."),
    (
        "cache",
        cache,
        "show or clear what engines compiled",
        "Show how much the engines keep of what they compiled, and the most that it may be, or remove it.",
    ),
    ("models", models, "list the models", "List the models this version knows."),
    (
        "doctor",
        doctor,
        "say what works here, and why the rest does not",
        "Say which engines work here and, for each other, why not and what to install.",
    ),
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Parser(argparse.ArgumentParser):
    """Says a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses here what is left over: a verb's parser hands it to the one above, whose help does not help."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    _open_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    beside_diffusers = words[:2] == ["bench", "gpu"]  # has a command line of its own, and needs torch to read it
    arguments = (
        argparse.Namespace(run=lambda _: bench.gpu(words[2:])) if beside_diffusers else _parser().parse_args(words)
    )
    level = logging.INFO if getattr(arguments, "verbose", False) else logging.WARNING
    logging.basicConfig(level=level, format="vega-edge: %(message)s", stream=sys.stderr, force=True)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name that the output's encoding lacks must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    heard: list[int] = []
    try:
        with _heard_ctrl_c(heard):
            arguments.run(arguments)
        sys.stdout.flush()
    except ImportError:
        if not heard:
            raise
        print("vega-edge: interrupted", file=sys.stderr)
        return 130
    except VegaEdgeError as error:
        print(f"vega-edge: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("vega-edge: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            if error.errno not in _NO_ROOM:
                raise
            print(f"vega-edge: the output can't be written: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(
            OSError
        ):  # the reader of stdout went away, or it is full: nothing more, not even at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


@contextlib.contextmanager
def _heard_ctrl_c(heard: list[int]) -> Iterator[None]:
    """Note each Ctrl-C in `heard`: of one that comes while numpy is imported, numpy makes an ImportError of its own."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_streams() -> None:
    """Where the caller closed a standard stream, what is written to it vanishes; no picture's file gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)


def _one_line(text: object) -> str:
    """An error quotes what it was given, which may have lines of its own."""
    return " ".join(str(text).split("\n"))


def _parser() -> _Parser:
    parser = _Parser(prog="vega-edge", description="Distilled text-to-image models on your own device.")
    parser.add_argument("--version", action="version", version=f"vega-edge {__version__}")
    verbs = parser.add_subparsers(dest="name", metavar="VERB", required=True)
    for name, verb, short, description in _VERBS:
        verb.add(verbs.add_parser(name, help=short, description=description))
    return parser


if __name__ == "__main__":
    sys.exit(main())
