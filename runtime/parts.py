"""A bundle's graphs, opened on one engine: patched with LoRAs, cached, all at once or one after another.

Knows no diffusion: a part is a graph that someone runs for a while.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle
from ..engines import Engine, LazyWeights, check_engine, compiled, library_calls, open_engine, takes_attention_form
from ..errors import EngineError, unknown
from ..manifest import attention_form, part_of
from ..models import compiled_folder
from .patches import Patches

MEMORY = ("normal", "low")
VAES = ("full", "tiny")


def check_opening(engine: str, memory: str, vae: str, device: str | None) -> None:
    """Raises what `Pipeline.open` would for any bundle: UsageError, or EngineError for an engine that is not here."""
    for kind, value, allowed in (("memory", memory, MEMORY), ("vae", vae, VAES)):
        if value not in allowed:
            raise unknown(kind, value, allowed)
    check_engine(engine, device)


class Part:
    """One graph. It is open while somebody is inside `with part.running() as engine`, and if `keep`, from then on.

    Any thread may use it, and close it: who is inside then gets an EngineError from the engine's next run.
    """

    def __init__(self, open_graph: Callable[[], Engine], keep: bool) -> None:
        self._open, self._keep = open_graph, keep
        self._engine: Engine | None = None
        self._users = 0
        self._closed = False
        self._turn = threading.RLock()  # to open and to free in; not held while somebody is inside

    def load(self) -> None:
        """Opens it now, unless it would not be kept."""
        if self._keep:
            with self.running():
                pass

    @contextlib.contextmanager
    def running(self) -> Iterator[Engine]:
        with library_calls, self._turn:  # in this order: a thread that is stopped at Python's end holds no turn
            if self._closed:
                raise EngineError("this pipeline was closed; open it again")
            if self._engine is None:
                self._engine = self._open()
            engine = self._engine
            self._users += 1
        try:
            yield engine
        finally:
            with library_calls, self._turn:
                self._users -= 1
                if not self._keep and not self._users:
                    self._free()

    def close(self) -> None:
        with library_calls, self._turn:
            self._closed = True
            self._free()

    def _free(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


@dataclass(frozen=True)
class Parts:
    """Opens the graphs of `bundle` on `engine`, one of ENGINES.

    `low_memory`: each is open only while it runs. `cache`: the folder for what engines compile, None for none.
    `device`: cpu, cuda or cuda:N; None for what the engine runs on. `openers`: file -> what opens it instead.
    """

    bundle: Bundle
    engine: str
    patches: Patches | None = None
    low_memory: bool = False
    cache: Path | None = None
    device: str | None = None
    openers: Mapping[str, Callable[[], Engine]] = field(default_factory=dict)
    _made: dict[str, Part] = field(default_factory=dict)
    _opened: set[str] = field(default_factory=set)

    def part(self, file: str) -> Part:
        """`file`: such as "unet/model.onnx"; BundleError if the bundle has none. Nothing is opened yet."""
        path = self.bundle.file(file)
        made = Part(self.openers.get(file) or partial(self._open, file, path), keep=not self.low_memory)
        self._made[file] = made
        return made

    def _open(self, file: str, path: Path) -> Engine:
        weights = weights_of(self.patches, part_of(file)) if self.patches else {}
        self._opened.add(part_of(file))
        fused = attention_form(file)
        if self.bundle.has(fused) and takes_attention_form(self.engine):
            path = self.bundle.file(fused)
        return open_engine(
            path, self.engine, cache=self.cache, identity=self._identity(file, path.name), weights=weights,
            low_memory=self.low_memory, device=self.device, cache_needs=self._cache_needs(),
        )  # fmt: skip

    def _cache_needs(self) -> int:
        """With little memory, what the cache must hold of all networks, or they would drive out each other: those that
        every image needs, and of the autoencoder's what was opened so far."""
        if not self.low_memory or self.cache is None:
            return 0
        return int(1.1 * sum(size for part, size in self._sizes.items() if "vae" not in part or part in self._opened))

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Bytes of each part in the cache. A part's graphs are the same network, of which one is drawn with."""
        sizes: dict[str, int] = {}
        for file in self._made:
            sizes[part_of(file)] = max(sizes.get(part_of(file), 0), compiled.prepared_bytes(self.bundle.file(file)))
        return sizes

    def _identity(self, file: str, opened: str) -> str:
        """The hashes that the manifest has of the part's files, with the LoRAs'; '' where there is no manifest.

        opened: the name of the graph that is opened, of the two forms.
        """
        part = part_of(file)
        if self.bundle.manifest is None:
            return ""
        hashes = [f"{name} {entry.sha256}" for name, entry in self.bundle.manifest.parts[part].files.items()]
        patched = self.patches.key if self.patches and part in self.patches.parts else ""
        return "\n".join([file, opened, *sorted(hashes), patched])

    def close(self) -> None:
        for part in self._made.values():
            part.close()


def weights_of(patches: Patches, part: str) -> Mapping[str, NDArray[Any]]:
    """What the LoRAs make of a part's weights, when somebody looks; {} for a part that they do not touch."""
    return LazyWeights(partial(patches.of, part), patches.hashes) if part in patches.parts else {}


def cache_folder() -> Path | None:
    """Beside the exported bundles; None where VEGA_EDGE_CACHE_GB is 0."""
    return None if compiled.chosen_bytes() == 0 else compiled_folder()
