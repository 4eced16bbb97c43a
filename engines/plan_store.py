"""Built engines (TensorRT calls them plans) on disk: one folder beside each bundle, with a manifest of hashes.

A plan is code that runs on the GPU, so none is ever loaded unless `engines.json` lists its sha256. What is written is
whole or not there: a plan gets its name when it is complete, and is listed after that. Two processes may build at once:
each holds a lock for the plan it makes, and another for the moment it changes the manifest. Knows no TensorRT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from .. import records
from ..errors import EngineError
from ..whole_file import PART, writing
from .plan_hash import file_hash, graph_hash

__all__ = ["Plan", "PlanLora", "PlanStore", "graph_hash", "part_of"]

INDEX, FORMAT = "engines.json", 1
REVISION = 1  # of how plans are built, raised where the same `Plan` gives another engine
FOLDER_VARIABLE = "VEGA_EDGE_ENGINES"
_STRAY_AFTER_S = 600
BUILD_PREFIX = ".build-"  # of the folders that changed copies of graphs are written to, for the time of a build
_BUILD_AFTER_S = 86400

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, best, most


@dataclass(frozen=True)
class PlanLora:
    sha256: str
    strength: float


@dataclass(frozen=True)
class Plan:
    """One built engine, and everything that its `key` covers.

    graph: 'unet/model.onnx'; graph_hash: of it and its weights; loras: that changed these, in the order they were added.
    targets: 'sm_89', or 'ampere+' for every RTX GPU from Ampere on. profile: input -> [least, best, most] shape, of
    every input with a free axis. flags: static, refit, stripped, weight-streaming. unit_px:
    pixels for each step of its inputs' height and width. revision: the `REVISION` that it was built with. bytes and
    sha256 are of the file.
    """

    file: str
    sha256: str
    bytes: int
    graph: str
    graph_hash: str
    library: str
    version: str
    targets: tuple[str, ...]
    profile: Mapping[str, tuple[tuple[int, ...], ...]]
    precision: str = "graph"
    flags: tuple[str, ...] = ()
    loras: tuple[PlanLora, ...] = ()
    seconds: float = 0.0
    unit_px: int = 1
    revision: int = 0

    @property
    def key(self) -> str:
        """Hex; two plans share it only if one can stand for the other."""
        unkeyed = ("file", "sha256", "bytes", "seconds", "unit_px")
        facts = {k: v for k, v in records.encode(self).items() if k not in unkeyed}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Index:
    format: int
    plans: tuple[Plan, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class PlanStore:
    """The plans of the bundle at `bundle`; its folder is made when the first plan is written."""

    bundle: Path

    @property
    def folder(self) -> Path:
        """BUNDLE.engines beside the bundle; in the folder that VEGA_EDGE_ENGINES names, BUNDLE-HASH.engines, by a hash of
        the bundle's path: bundles of one name elsewhere have their own there."""
        bundle, elsewhere = self.bundle.absolute(), os.environ.get(FOLDER_VARIABLE)
        if not elsewhere:
            return bundle.with_name(f"{bundle.name}.engines")
        place = hashlib.sha256(os.fsencode(bundle.resolve())).hexdigest()[:8]
        return Path(elsewhere) / f"{bundle.name}-{place}.engines"

    def plans(self) -> tuple[Plan, ...]:
        """Those listed, whether their files are there or not. Raises EngineError for a damaged manifest."""
        path = self.folder / INDEX
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ()
        except (OSError, UnicodeDecodeError) as failure:
            raise EngineError(f"{path} can't be read: {failure}") from failure
        try:
            index = records.decode(_Index, records.parse(text))
            if index.format != FORMAT:
                raise records.RecordError(f"format {index.format} is not {FORMAT}, the one this version reads")
            _check_names(index.plans)
        except records.RecordError as failure:
            raise EngineError(f"{path}: {failure}; remove {self.folder} and build again") from failure
        return index.plans

    def read(self, plan: Plan) -> memoryview:
        """The plan's bytes, mapped from its file, as `check` found them."""
        path = self.folder / plan.file
        self.check(plan)
        with open(path, "rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), plan.bytes, access=mmap.ACCESS_READ))

    def check(self, plan: Plan) -> None:
        """Raises EngineError unless the file is there and what the manifest says. This process reads it once, unless it
        changes: --memory low opens a plan again for each picture."""
        path = self.folder / plan.file
        try:
            state = path.stat()
            if state.st_size < plan.bytes:
                raise EngineError(f"{path} is truncated ({state.st_size} of {plan.bytes} bytes); {self._rebuild(plan)}")
            got = file_hash(path, state)
        except OSError as failure:
            raise EngineError(f"{path} can't be read ({failure.strerror}); {self._rebuild(plan)}") from failure
        if got != plan.sha256:
            raise EngineError(
                f"{path} is not the engine that was built here (sha256 {got[:12]}, {INDEX} says {plan.sha256[:12]}) "
                f"and is not loaded, because an engine is code; {self._rebuild(plan)}"
            )

    def fault(self, plan: Plan, installed: Mapping[str, str] = MappingProxyType({})) -> str:
        """Why the plan is of no use any more: its file is gone, the bundle's graph is another now, or its library is
        `installed` (name -> version) in another version. '' if it is of use."""
        if not (self.folder / plan.file).is_file():
            return "its file is missing"
        if installed.get(plan.library, plan.version) != plan.version:
            return f"of {plan.library} {plan.version}, and {installed[plan.library]} is installed"
        graph = self.bundle / plan.graph
        if not graph.is_file():
            return f"the bundle has no {plan.graph}"
        return "" if graph_hash(graph) == plan.graph_hash else f"{plan.graph} has changed since"

    def _rebuild(self, plan: Plan) -> str:
        return f"build it again: vega-edge build {self.bundle} --engine {plan.library} --part {part_of(plan.graph)}"

    def add(self, plan: Plan, content: bytes | memoryview, seconds: float) -> Plan:
        """Writes a plan and lists it, in place of one with the same key, of whatever revision; what is not known of it
        before is filled in."""
        size = len(memoryview(content).cast("B"))
        name = f"{plan.graph.replace('/', '.').removesuffix('.onnx')}.{plan.key[:16]}.{plan.library}.plan"
        digest = hashlib.sha256(content).hexdigest()
        plan = dataclasses.replace(plan, file=name, bytes=size, sha256=digest, seconds=round(seconds, 2))
        self.write(self.folder / name, content)
        with self.lock(INDEX):
            others = self.plans()
            kept = [each for each in others if dataclasses.replace(each, revision=plan.revision).key != plan.key]
            self._list([*kept, plan])
        return plan

    def remove(self, plans: tuple[Plan, ...]) -> None:
        """Takes them off the manifest first: a file that is not listed is never loaded."""
        files = {plan.file for plan in plans}
        with self.lock(INDEX):
            self._list([plan for plan in self.plans() if plan.file not in files])
        for file in files:
            (self.folder / file).unlink(missing_ok=True)

    def stray(self, installed: Mapping[str, str] = MappingProxyType({})) -> list[Path]:
        """What a build left when it was killed, plans that the manifest does not list, locks that nobody took for a day,
        and timings of libraries that are `installed` (name -> version) in another version now.

        Not files of the last minutes, which another process may be about to name or to list, nor folders of the last
        day, in which one may build.
        """
        listed, now = {plan.file for plan in self.plans()}, time.time()
        files = (p for p in self.folder.glob("*") if p.name.endswith((PART, ".plan")) and p.name not in listed)
        old = [path for path in files if now - path.stat().st_mtime > _STRAY_AFTER_S]
        dated = (*self.folder.glob(f"{BUILD_PREFIX}*"), *self.folder.glob(".*.lock"))
        old += [p for p in dated if now - p.stat().st_mtime > _BUILD_AFTER_S and p.name != f".{INDEX}.lock"]
        if "tensorrt" in installed:  # TensorRT-RTX has no timings
            current = f"tensorrt-{installed['tensorrt']}-"
            old += [p for p in self.folder.glob("tensorrt-*.timing") if not p.name.startswith(current)]
        return sorted(old)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time, and by none after it died."""
        try:
            from filelock import FileLock
        except ImportError as failure:
            raise EngineError(
                'engines need filelock, not installed here: pip install "vega-edge[tensorrt-rtx]"'
            ) from failure
        self._make_folder()
        with FileLock(self.folder / f".{name}.lock"):
            yield

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise EngineError(
                f"{self.folder} can't be made ({failure.strerror}); copy the bundle to a folder of yours, or set "
                f"{FOLDER_VARIABLE} to one where engines may be kept"
            ) from failure

    def _list(self, plans: list[Plan]) -> None:
        text = json.dumps(records.encode(_Index(FORMAT, tuple(sorted(plans, key=lambda p: p.file)))), indent=2)
        self.write(self.folder / INDEX, text.encode() + b"\n")

    def write(self, target: Path, content: bytes | memoryview) -> None:
        """Whole or not at all."""
        self._make_folder()
        try:
            with writing(target) as stream:
                stream.write(content)
        except OSError as failure:
            raise EngineError(f"{target} can't be written ({failure.strerror}); free some space there") from failure


def part_of(graph: str) -> str:
    return graph.split("/")[0]


def _check_names(plans: tuple[Plan, ...]) -> None:
    for plan in plans:
        if not plan.file or set(plan.file) & set("/\\:\0") or plan.file.startswith("."):
            raise records.RecordError(f"{plan.file!r} is not the name of a file in this folder")
