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
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import records
from ..errors import EngineError
from ..known_hashes import known_sha256
from ..models.storage import folder_named_by
from ..whole_file import PART, sha256_of, writing
from .plan import Plan, PlanLora, part_of
from .plan_hash import graph_hash

__all__ = ["Plan", "PlanLora", "PlanStore", "graph_hash", "part_of"]

INDEX, FORMAT = "engines.json", 1
REVISION = 1  # of how plans are built, raised where the same `Plan` gives another engine
FOLDER_VARIABLE = "VEGA_EDGE_ENGINES"
_STRAY_AFTER_S = 600
RANGES = ".ranges"  # ends the names of what fp8 is scaled by: PART.GRAPH-HASH.LORAS.ranges
BUILD_PREFIX = ".build-"  # of the folders that changed copies of graphs are written to, for the time of a build
_LOCK_AFTER_S = 86400


@dataclass(frozen=True)
class _Index:
    format: int
    plans: tuple[Plan, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class PlanStore:
    """The plans of the bundle at `bundle`; `folder` is made when the first plan is written."""

    bundle: Path

    @property
    def folder(self) -> Path:
        """BUNDLE.engines beside the bundle; in the folder that VEGA_EDGE_ENGINES names, BUNDLE-HASH.engines, by a hash of
        the bundle's path: bundles of one name elsewhere have their own there."""
        bundle, elsewhere = self.bundle.resolve(), folder_named_by(FOLDER_VARIABLE)
        if elsewhere is None:
            return self.beside
        place = hashlib.sha256(os.fsencode(bundle)).hexdigest()[:8]
        return elsewhere / f"{bundle.name}-{place}.engines"

    @property
    def beside(self) -> Path:
        """Where engines come along with their bundle, built on another machine: read, whatever `folder` is."""
        bundle = self.bundle.resolve()  # also of "..", and of a link to it
        return bundle.with_name(f"{bundle.name}.engines")

    def plans(self) -> tuple[Plan, ...]:
        """Those listed, whether their files are there or not. Raises EngineError for a damaged manifest."""
        own = self.own()
        if self.beside == self.folder:
            return own
        names = {plan.file for plan in own}
        return (*own, *(plan for plan in self._listed(self.beside) if plan.file not in names))

    def own(self) -> tuple[Plan, ...]:
        """Of `plans` those that this store writes and removes: in `folder`."""
        return self._listed(self.folder)

    def path(self, plan: Plan) -> Path:
        """Its file; it may be missing."""
        own = self.folder / plan.file
        return own if own.is_file() else self.beside / plan.file

    def _listed(self, folder: Path) -> tuple[Plan, ...]:
        path = folder / INDEX
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
            raise EngineError(f"{path}: {failure}; remove {folder} and build again") from failure
        return index.plans

    def read(self, plan: Plan) -> memoryview:
        """The plan's bytes, mapped from its file, as `check` found them."""
        path = self.path(plan)
        self.check(plan)
        with open(path, "rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), plan.bytes, access=mmap.ACCESS_READ))

    def check(self, plan: Plan) -> None:
        """Raises EngineError unless the file is there and what the manifest says. It is read once, unless it changes
        (see `known_hashes`): --memory low opens a plan again for each picture."""
        path = self.path(plan)
        try:
            size = path.stat().st_size
            if size < plan.bytes:
                raise EngineError(f"{path} is truncated ({size} of {plan.bytes} bytes); {self._rebuild(plan)}")
            got = known_sha256(path)
        except OSError as failure:
            raise EngineError(f"{path} can't be read ({failure.strerror}); {self._rebuild(plan)}") from failure
        if got != plan.sha256:
            raise EngineError(
                f"{path} is not the engine that was built here (sha256 {got[:12]}, {INDEX} says {plan.sha256[:12]}) "
                f"and is not loaded, because an engine is code; {self._rebuild(plan)}"
            )

    def fault(self, plan: Plan, installed: Mapping[str, str] = MappingProxyType({})) -> str:
        """Why the plan is of no use any more: its file is gone or altered, the bundle's graph is another now, or its
        library is `installed` (name -> version) in another version. '' if it is of use."""
        if gap := self.gap(plan):
            return gap
        try:
            if known_sha256(self.path(plan)) != plan.sha256:
                return "altered since it was built"
        except OSError as failure:
            return f"can't be read ({failure.strerror})"
        if installed.get(plan.library, plan.version) != plan.version:
            return f"of {plan.library} {plan.version}, and {installed[plan.library]} is installed"
        graph = self.bundle / plan.graph
        if not graph.is_file():
            return f"the bundle has no {plan.graph}"
        return "" if graph_hash(graph) == plan.graph_hash else f"{plan.graph} has changed since"

    def gap(self, plan: Plan) -> str:
        """What is missing of its file, '' for nothing. Reads none of it."""
        try:
            size = self.path(plan).stat().st_size
        except FileNotFoundError:
            return "its file is missing"
        except OSError as failure:
            return f"can't be read ({failure.strerror})"
        return f"truncated, {size} of {plan.bytes} bytes" if size < plan.bytes else ""

    def _rebuild(self, plan: Plan) -> str:
        return f"build it again: vega-edge build {self.bundle} --engine {plan.library} --part {part_of(plan.graph)}"

    def add(self, plan: Plan, content: bytes | memoryview | Path, seconds: float) -> Plan:
        """Writes a plan and lists it, in place of one with the same key, of whatever revision; what is not known of it
        before is filled in. A file, whole, in this folder or below it, is moved."""
        name = f"{plan.graph.replace('/', '.').removesuffix('.onnx')}.{plan.key[:16]}.{plan.library}.plan"
        if isinstance(content, Path):
            size, digest = content.stat().st_size, sha256_of(content)
            os.replace(content, self.folder / name)
        else:
            size, digest = len(memoryview(content).cast("B")), hashlib.sha256(content).hexdigest()
            self.write(self.folder / name, content)
        plan = dataclasses.replace(plan, file=name, bytes=size, sha256=digest, seconds=round(seconds, 2))
        with self.lock(INDEX):
            others = self.own()
            kept = [each for each in others if dataclasses.replace(each, revision=plan.revision).key != plan.key]
            self._list([*kept, plan])
        return plan

    def remove(self, plans: tuple[Plan, ...]) -> None:
        """Takes them off the manifest first: a file that is not listed is never loaded."""
        with self.lock(INDEX):
            own = self.own()
            gone = [
                plan for plan in own if plan in plans
            ]  # not one that was built again meanwhile, under the same name
            self._list([plan for plan in own if plan not in gone])
            for plan in gone:
                (self.folder / plan.file).unlink(missing_ok=True)

    def stray(self, installed: Mapping[str, str] = MappingProxyType({})) -> list[Path]:
        """What a build left when it was killed, plans that the manifest does not list, locks that nobody took for a day,
        timings of libraries that are `installed` (name -> version) in another version now, and ranges of other graphs.

        Not files of the last minutes, which another process may be about to name or to list, nor folders in which one
        builds.
        """
        listed, now = {plan.file for plan in self.own()}, time.time()
        files = (p for p in self.folder.glob("*") if p.name.endswith((PART, ".plan")) and p.name not in listed)
        old = [path for path in files if now - _written(path) > _STRAY_AFTER_S]
        old += [path for path in self.folder.glob(f"{BUILD_PREFIX}*") if not self._in_use(path)]
        locks = (p for p in self.folder.glob(".*.lock") if p.name != f".{INDEX}.lock")
        old += [path for path in locks if now - _written(path) > _LOCK_AFTER_S]
        if "tensorrt" in installed:  # TensorRT-RTX has no timings
            current = f"tensorrt-{installed['tensorrt']}-"
            old += [p for p in self.folder.glob("tensorrt-*.timing") if not p.name.startswith(current)]
        old += [path for path in self.folder.glob(f"*{RANGES}") if not self._has_graph(*path.name.split(".")[:2])]
        return sorted(old)

    def _has_graph(self, part: str, digest: str) -> bool:
        graph = self.bundle / part / "model.onnx"
        return graph.is_file() and graph_hash(graph).startswith(digest)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Held by one process at a time, and by none after it died."""
        self._make_folder()
        lock = self._file_lock(name)
        try:
            lock.acquire()
        except OSError as failure:
            raise self._not_ours(failure) from failure
        try:
            yield
        finally:
            lock.release()

    def _file_lock(self, name: str, timeout_s: float = -1) -> Any:
        try:
            from filelock import FileLock
        except ImportError as failure:
            raise EngineError(
                'engines need filelock, not installed here: pip install "vega-edge[tensorrt-rtx]"'
            ) from failure
        return FileLock(self.folder / f".{name}.lock", timeout_s)

    def _in_use(self, folder: Path) -> bool:
        """Whether the one who made it, see `building`, still holds its lock."""
        key = folder.name.removeprefix(BUILD_PREFIX).partition("-")[0]
        if not (self.folder / f".{key}.lock").is_file():
            return False
        try:
            with self._file_lock(key, timeout_s=0):
                return False
        except TimeoutError:
            return True

    @contextlib.contextmanager
    def building(self, key: str) -> Iterator[Path]:
        """The lock `key` and, for as long, a folder to work in; without what others, who were killed, left in theirs."""
        with self.lock(key):
            for left in self.folder.glob(f"{BUILD_PREFIX}{key}-*"):
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{BUILD_PREFIX}{key}-", dir=self.folder) as folder:
                yield Path(folder)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise self._not_ours(failure) from failure

    def _not_ours(self, failure: OSError) -> EngineError:
        done = "written to" if self.folder.is_dir() else "made"
        return EngineError(
            f"{self.folder} can't be {done} ({failure.strerror}); copy the bundle to a folder of yours, or set "
            f"{FOLDER_VARIABLE} to one where engines may be kept"
        )

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


def _written(path: Path) -> float:
    """When, in seconds since 1970; of a file that another process has renamed meanwhile, never long ago."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _check_names(plans: tuple[Plan, ...]) -> None:
    for plan in plans:
        if not plan.file or set(plan.file) & set("/\\:\0") or plan.file.startswith("."):
            raise records.RecordError(f"{plan.file!r} is not the name of a file in this folder")
