"""Every error this project raises on purpose.

    VegaEdgeError           base: its text is one line for the user; the command line exits with 1
    ├── UsageError          a value that was given is not allowed (exit 2)
    ├── BundleError         a bundle is missing, damaged, altered, or from a newer version
    ├── EngineError         an engine is not installed, or could not open or run a graph
    │   └── NotFiniteError  a network gave NaN or infinity; says at which step and on which engine
    ├── NotEnoughMemoryError  the networks can't fit the memory that is free; said before they are opened
    ├── CheckpointError     a file of weights, such as a LoRA, is missing, damaged, or not one for this model
    └── ExportError         a checkpoint can't be exported, or a part differs from torch by too much

An error says which thing it is about, what was got, what is allowed, and what to do. Anything else that is raised
is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class VegaEdgeError(Exception):
    exit_code = 1


class UsageError(VegaEdgeError):
    exit_code = 2


class BundleError(VegaEdgeError):
    pass


class EngineError(VegaEdgeError):
    pass


class NotFiniteError(EngineError):
    pass


class NotEnoughMemoryError(VegaEdgeError):
    pass


class CheckpointError(VegaEdgeError):
    pass


class ExportError(VegaEdgeError):
    pass


def unknown(kind: str, got: object, known: Iterable[str]) -> UsageError:
    """ "unknown scheduler 'Eular'; did you mean 'Euler'? there are: DDIM, Euler, LCM". A name that alone has `got` for
    one of its words is near too: 'cuda' of 'onnxruntime-cuda'."""
    names = sorted(known, key=str.lower)
    lowered = {name.lower(): name for name in names}
    text = got.lower() if isinstance(got, str) else ""
    near = [lowered[n] for n in difflib.get_close_matches(text, lowered, n=1, cutoff=0.6)]
    having = [name for n, name in lowered.items() if text in re.split(r"[\W_]+", n)]
    near = near or (having if len(having) == 1 and text else [])
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {got!r}; {hint}there are: {', '.join(names) or 'none'}")
