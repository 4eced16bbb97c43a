"""Which of a bundle's plans runs here; if none, why not, and the command that builds one. Knows no TensorRT."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import EngineError
from . import nvidia
from .plan_range import Rebuild
from .plan_store import Plan, PlanStore, graph_hash, part_of
from .protocol import LazyWeights

_PORTABLE, TURING = "ampere+", "sm_75"
RUN_GRAPHS = ("pixels.onnx", "model.onnx")  # of each part the first that is there is what a pipeline runs


@dataclass(frozen=True)
class Here:
    """`capability` of the GPU, 'sm_87'; `known`: those that the library runs on, none where it does not say."""

    library: str
    version: str
    capability: str
    known: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Chosen:
    """`refit`: the replaced weights go in after loading. `rebuild`: what builds it for other shapes."""

    plan: Plan
    refit: bool
    rebuild: Rebuild


def choose_plans(store: PlanStore, graph: Path, here: Here, weights: Mapping[str, NDArray[Any]]) -> list[Chosen]:
    """The plans of `graph` that fit, one or more: those as exact as the graph first, of these the one built last first.
    EngineError says why none does, and what to run.

    `weights` are told by their LoRAs and not looked at: making those of a large network takes longer than a picture.
    Where these are not known, only a plan that can be refitted takes them.
    """
    name = f"{graph.parent.name}/{graph.name}"
    built = sorted(store.plans(), key=lambda plan: _built_at(store, plan), reverse=True)
    part = part_of(name) if any(_runs(plan, here) for plan in built) else ""  # else all parts have to be built
    there = [plan for plan in built if plan.graph == name and plan.library == here.library]
    current = graph_hash(graph) if there else ""
    faults = [_fault(plan, current, here) for plan in there]
    faults = [fault or _weights_fault(plan, weights) for plan, fault in zip(there, faults, strict=True)]
    gaps = [store.gap(plan) for plan in there]  # of a copy that was not finished
    faults = [fault or (gap and f"listed, but {gap}") for fault, gap in zip(faults, gaps, strict=True)]
    fitting = [plan for plan, fault in zip(there, faults, strict=True) if not fault]
    if not fitting:
        why = f"the one there is {faults[0]}" if faults else "none has been built"
        command = build_command(store.bundle, here, part, there[0] if there else None, lora=bool(weights))
        raise EngineError(f"no engine of {name} can be used here: {why}; run: {command}")
    fitting.sort(
        key=lambda plan: (plan.precision != "graph", not _holds(plan, weights))
    )  # stays in that order otherwise
    return [Chosen(plan, not _holds(plan, weights), _rebuild(store, plan, here, bool(weights))) for plan in fitting]


def _rebuild(store: PlanStore, plan: Plan, here: Here, lora: bool) -> Rebuild:
    """`static` is the shapes' matter, and so theirs to say."""
    like = dataclasses.replace(plan, flags=tuple(flag for flag in plan.flags if flag != "static"))
    command = build_command(store.bundle, here, part_of(plan.graph), like, lora)
    return Rebuild(command, plan.unit_px, plan.pictures, "static" in plan.flags)


@dataclass(frozen=True)
class BuiltFor:
    """What plans must have been built for. `unused`: parts of the bundle that will not run. `weights`: part -> its
    initializers that a LoRA replaces.
    """

    bundle: Path
    unused: frozenset[str] = frozenset()
    weights: Callable[[str], Mapping[str, NDArray[Any]]] = lambda part: {}


def lacking(wanted: BuiltFor, here: Here) -> str:
    """Why the bundle's engines can't be used here, '' if all can: each graph that a pipeline runs needs one."""
    store = PlanStore(wanted.bundle)
    for graph in needed_graphs(wanted.bundle):
        if graph.parent.name in wanted.unused:
            continue
        try:
            choose_plans(store, graph, here, wanted.weights(graph.parent.name))
        except EngineError as failure:
            return str(failure)
    return ""


def needed_graphs(bundle: Path) -> list[Path]:
    """Those that text to picture needs, with previews; the tiny decoder makes these wherever there is one."""
    parts = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "tiny_vae_decoder")
    return [graph for graph in built_graphs(bundle) if graph.parent.name in parts]


def built_graphs(bundle: Path) -> list[Path]:
    """Of each part the one that a build makes an engine of, which is what a pipeline runs."""
    found = {file.parent: file for name in reversed(RUN_GRAPHS) for file in bundle.glob(f"*/{name}")}
    return [found[folder] for folder in sorted(found)]


def build_command(bundle: Path, here: Here, part: str = "", like: Plan | None = None, lora: bool = False) -> str:
    """Of all parts, or of one; for `here`, else as `like` was built."""
    words = ["vega-edge build", shlex.quote(str(bundle)), "--engine", here.library, *(["--part", part] if part else [])]
    targets: tuple[str, ...] = ()
    if here.capability == TURING and here.known:
        targets = (TURING,)
    elif like is not None and not {_PORTABLE, TURING} & {*like.targets} and here.capability in here.known:
        targets = like.targets if here.capability in like.targets else (here.capability,)
    if like is not None:
        words += [f"--{flag}" for flag in like.flags]
        if like.precision != "graph" and _computes(like.precision, here):
            words += ["--precision", like.precision]
    words += [f"--target {target}" for target in targets]
    return " ".join([*words, *(["--lora FILE:STRENGTH"] if lora else [])])


def _computes(precision: str, here: Here) -> bool:
    """Whether a plan of these few bits can be built for the GPU: see `check_targets` in export/trt_library.py."""
    if precision == "fp8":
        return nvidia.has_fp8(here.capability)
    return not (here.known and here.capability == TURING)


def _fault(plan: Plan, current: str, here: Here) -> str:
    if plan.version != here.version:
        return f"of {plan.library} {plan.version}, and this is {here.version}"
    if not _fits(plan.targets, here):
        return f"built for {', '.join(plan.targets)}, and this GPU is {here.capability}"
    if plan.graph_hash != current:
        return "of another export of the bundle"
    return ""


def _runs(plan: Plan, here: Here) -> bool:
    return plan.library == here.library and plan.version == here.version and _fits(plan.targets, here)


def _fits(targets: tuple[str, ...], here: Here) -> bool:
    if here.known and here.capability not in here.known:
        return False
    return here.capability in targets or (_PORTABLE in targets and here.capability != TURING)


def _holds(plan: Plan, weights: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the plan was built of these weights."""
    loras = weights.loras if isinstance(weights, LazyWeights) else ()
    return tuple((lora.sha256, lora.strength) for lora in plan.loras) == loras and bool(loras) == bool(weights)


def _weights_fault(plan: Plan, weights: Mapping[str, NDArray[Any]]) -> str:
    """A plan that can be refitted takes any weights, if it was built of the bundle's own."""
    if _holds(plan, weights) or (not plan.loras and "refit" in plan.flags):
        return ""
    return "built with another LoRA" if plan.loras else "built without this LoRA"


def _built_at(store: PlanStore, plan: Plan) -> float:
    path = store.path(plan)
    return path.stat().st_mtime if path.is_file() else 0.0
