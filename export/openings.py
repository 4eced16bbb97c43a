"""Every graph that was written is opened on each engine here that it is for, before its part counts as finished.

The comparison with torch (`check.py`) runs a graph node by node, as it stands. An engine first rewrites it for itself,
and may refuse what comes of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..engines import ENGINES, check_graph, missing_here, runs_on_cpu, takes_attention_form
from ..engines.dtypes import TABLE, YES
from ..errors import EngineError, ExportError
from ..manifest import plain_form
from .check import BF16_ENGINE
from .precision import Precision


def check_opens(part: str, folder: Path, precision: Precision) -> None:
    """Open the graphs in a part's folder. ExportError names the first one that an engine refuses, and the engine.

    Graphs in bf16 are left out on openvino: they were compared with torch on it, opened as users open them.
    """
    for graph in sorted(folder.glob("*.onnx")):
        for library, name in engines_for(graph.name, precision).items():
            if precision.dtype == "bf16" and library == ENGINES[BF16_ENGINE].module:
                continue
            try:
                check_graph(graph, name)
            except EngineError as failure:
                raise ExportError(
                    f"{part}: {graph.name} was written, and {failure}; this is a defect of the export: please report it"
                ) from failure


def engines_for(file: str, precision: Precision) -> Mapping[str, str]:
    """Of each installed library that reads ONNX files here, an engine that is known to run such a graph (`dtypes.TABLE`).

    One for each library: openvino reads a graph alike for either arithmetic.
    """
    found: dict[str, str] = {}
    for name, row in TABLE.items():
        known = row[precision.dtype, precision.weights] == YES
        if (
            known
            and runs_on_cpu(name)
            and (file == plain_form(file) or takes_attention_form(name))
            and missing_here(name) is None
        ):
            found.setdefault(ENGINES[name].module, name)
    return found
