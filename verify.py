"""Is a bundle whole, and does it run here? Hashes, the parts that a picture needs, one small run of each graph at the
shapes its configurations promise.

Needs no torch: it repeats on the machine that runs a bundle what its export checked on the machine that made it. What
the numbers should be is not known here; that they are numbers, and of the right shape, is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle, check_files
from .engines import (
    Engine,
    built_graphs,
    built_shapes,
    check_dtype,
    check_engine,
    choose_engine,
    open_engine,
    takes_attention_form,
)
from .errors import BundleError, EngineError, VegaEdgeError
from .manifest import INDEX, plain_form
from .runtime.decoder import Scaling
from .runtime.scheduler_config import check_drawable, read_scheduler_config
from .runtime.tokenizer import TOKENS, ClipTokenizer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """One graph, or another file of the bundle that a picture needs. dtype, weights: a graph's, as the manifest says;
    fault: '' if all is well, else what is wrong, in one line; cure: what to do, where the fault does not say it."""

    graph: str
    dtype: str
    weights: str
    bytes: int
    seconds: float
    fault: str
    cure: str = ""


@dataclass(frozen=True)
class Verdict:
    """files: how many were compared with their hashes; 0 for a bundle without manifest, which has none."""

    path: str
    name: str
    engine: str
    files: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not any(check.fault for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


@dataclass(frozen=True)
class _Smoke:
    """What to feed a graph, and the shapes that must come out (outputs that are not named here only have to be finite)."""

    feeds: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, Shape]


def verify(path: str | os.PathLike[str], engine: str = "auto", device: str | None = None) -> Verdict:
    """`device`: cpu, cuda or cuda:N; None for what the engine runs on. Raises BundleError for a bundle that can't be read or whose files are not those of its manifest, EngineError if
    there is no engine; what a graph does wrong is in its check's `fault`."""
    bundle = Bundle.open(path, verify=False)
    if bundle.manifest:
        check_files(bundle.path, bundle.manifest)  # every byte: what is remembered of unchanged files is no proof
    if engine == "auto":
        size = sum(file.stat().st_size for file in bundle.path.glob("*/*.onnx*"))
        engine = choose_engine(size, device=device, precision=bundle.precision)
    check_engine(engine, device)
    check_dtype(engine, *bundle.precision)
    files = sum(len(part.files) for part in bundle.manifest.parts.values()) if bundle.manifest else 0
    # Of some parts no engine of TensorRT is built but of the graph that a pipeline runs.
    files_run = built_graphs(bundle.path) if engine.startswith("tensorrt") else bundle.path.glob("*/*.onnx")
    graphs = sorted(file.relative_to(bundle.path).as_posix() for file in files_run)
    if not takes_attention_form(engine):
        graphs = [graph for graph in graphs if graph == plain_form(graph)]
    checks = (*(_graph(bundle, graph, engine, device) for graph in graphs), *_others(bundle, graphs))
    name = bundle.manifest.name if bundle.manifest else bundle.path.name
    return Verdict(str(bundle.path), name, engine, files, checks)


def _graph(bundle: Bundle, graph: str, engine: str, device: str | None) -> Check:
    def judge() -> str:
        if not bundle.has(graph):
            return "the manifest does not list it"
        with contextlib.closing(open_engine(bundle.path / graph, engine, device=device)) as opened:
            return _fault(opened, _smoke(bundle, graph, built_shapes(bundle.path / graph, engine, device)))

    return _check(graph, _files(bundle.path / graph), judge, _precision(bundle, graph.partition("/")[0]), engine)


def _others(bundle: Bundle, graphs: list[str]) -> Iterator[Check]:
    """What a picture needs besides `graphs`: by the model index, as the pipeline reads it."""
    if unnamed := [
        part for part in ("text_encoder", "tokenizer", "unet", "scheduler") if part not in bundle.model_index
    ]:
        fault = f"names no {', '.join(unnamed)}"
        yield _check(INDEX, [bundle.path / INDEX], lambda: fault)
    suffixes = ("", "_2") if bundle.sdxl else ("",)
    for graph in (*(f"text_encoder{s}/model.onnx" for s in suffixes), "unet/model.onnx", "vae_decoder/model.onnx"):
        forms = {graph, graph.replace("decoder/model", "decoder/pixels")}
        if not (forms & {*graphs} or any(map(bundle.has, forms))):
            yield _check(graph, [], lambda: "is missing")
    for part in (f"tokenizer{s}" for s in suffixes):
        files = [file for file in (bundle.path / part).glob("*") if file.is_file()]
        yield _check(part, files, partial(_tokenizer_fault, bundle, part))
    files = list(bundle.path.glob("scheduler/scheduler_config.json"))
    yield _check("scheduler", files, partial(_scheduler_fault, bundle))


def _tokenizer_fault(bundle: Bundle, part: str) -> str:
    ClipTokenizer(bundle.file(f"{part}/vocab.json").parent)  # raises what is wrong with it
    return ""


def _scheduler_fault(bundle: Bundle) -> str:
    """Its noise levels, by the scheduler that a picture would be drawn with."""
    config = read_scheduler_config(bundle)
    if "_class_name" not in config:
        return "scheduler_config.json names no scheduler: it has no _class_name"
    check_drawable(config, bundle.manifest.defaults if bundle.manifest else {})
    return ""


def _check(
    name: str, files: list[Path], judge: Callable[[], str], precision: tuple[str, str] = ("", ""), engine: str = ""
) -> Check:
    start, cure = time.perf_counter(), "export the bundle again"
    try:
        fault = judge()
    except VegaEdgeError as failure:
        fault = str(failure)
        if isinstance(failure, EngineError) and engine.startswith("tensorrt"):
            cure = ""  # it is what was built of the graph that fails, and says what to do
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        ArithmeticError,
    ) as failure:  # what a garbled configuration does
        fault = f"its configuration can't be used: {type(failure).__name__}: {failure}"
    return Check(
        name,
        *precision,
        sum(file.stat().st_size for file in files),
        time.perf_counter() - start,
        fault,
        cure if fault else "",
    )


def _fault(engine: Engine, smoke: _Smoke) -> str:
    feeds = {name: value.astype(spec.dtype) for name, spec in engine.inputs.items() if (value := smoke.feeds.get(name)) is not None}  # fmt: skip
    if "timestep" in feeds:  # other tools export it as a scalar
        feeds["timestep"] = feeds["timestep"].reshape((1,) * len(engine.inputs["timestep"].shape))
    got = engine.run(feeds)
    for name, shape in smoke.outputs.items():
        if name not in got:
            return f"gives no {name}; it gives {', '.join(got)}"
        if got[name].shape != shape:
            return f"{name} has shape {list(got[name].shape)}, its configuration promises {list(shape)}"
    broken = [name for name, value in got.items() if not np.isfinite(value).all()]
    return f"{broken[0]} is not finite" if broken else ""


def _smoke(bundle: Bundle, graph: str, built: Mapping[str, Shape]) -> _Smoke:
    """`built`: the shapes that an engine is tuned for; where it takes any, one small picture."""
    part, _, file = plain_form(graph).partition("/")
    random = np.random.default_rng(0)
    if part.startswith("text_encoder"):
        # 0 to 76 are ids in any vocabulary; the largest id ends a text for CLIP's pooling
        count = built.get("input_ids", (1,))[0]
        ids = np.tile(
            np.minimum(np.arange(TOKENS), bundle.number(part, "vocab_size", 1 << 20) - 1).astype(np.int64), (count, 1)
        )
        return _Smoke({"input_ids": ids}, {"last_hidden_state": (count, TOKENS, bundle.number(part, "hidden_size"))})
    side = 2 * 2 ** (bundle.levels("unet") - 1)
    channels = bundle.number("unet", "in_channels")
    n, _, high, wide = next((shape for shape in built.values() if len(shape) == 4), (1, 0, side, side))
    if part == "unet":
        latents = random.standard_normal((n, channels, high, wide))
        return _Smoke(
            _unet_feeds(bundle, latents, random), {"out_sample": (n, bundle.number(part, "out_channels"), high, wide)}
        )
    if part not in ("vae_encoder", "vae_decoder", "tiny_vae_decoder"):
        raise BundleError(f"{graph} is of no part that is known: it can't be run")
    scale = 2 ** (bundle.levels(part) - 1)
    Scaling.read(bundle, part)
    if part == "vae_encoder":
        high, wide = (high // scale, wide // scale) if built else (high, wide)  # what it was built for is in pixels
        picture = random.uniform(-1, 1, (n, 3, high * scale, wide * scale))
        return _Smoke({"sample": picture}, {"latent_parameters": (n, 2 * channels, high, wide)})
    feeds = {"latent_sample": random.standard_normal((n, channels, high, wide))}
    if file == "pixels.onnx":
        return _Smoke(feeds, {"pixels": (n, high * scale, wide * scale, 3)})
    return _Smoke(feeds, {"sample": (n, 3, high * scale, wide * scale)})


def _unet_feeds(bundle: Bundle, latents: NDArray[Any], random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Feeds of both kinds; those that the graph does not have are left out."""
    width = bundle.number("unet", "cross_attention_dim")
    feeds = {
        "sample": latents,
        "timestep": np.array([500.0]),
        "encoder_hidden_states": random.standard_normal((len(latents), TOKENS, width)),
    }
    if bundle.config("unet").get("addition_embed_type") == "text_time":
        sizes = 6 * bundle.number("unet", "addition_time_embed_dim")
        width = bundle.number("unet", "projection_class_embeddings_input_dim") - sizes
        feeds["text_embeds"] = random.standard_normal((len(latents), width))
        feeds["time_ids"] = np.tile([512.0, 512, 0, 0, 512, 512], (len(latents), 1))
    return feeds


def _precision(bundle: Bundle, part: str) -> tuple[str, str]:
    if bundle.manifest is None or part not in bundle.manifest.parts:
        return "", ""
    told = bundle.manifest.parts[part]
    return told.dtype or bundle.manifest.dtype, told.weights or bundle.manifest.weights


def _files(graph: Path) -> list[Path]:
    """A graph and, for the part's own, the weights beside it."""
    return [graph, *(file for file in [graph.with_name(f"{graph.name}_data")] if file.is_file())]


def render(verdict: Verdict) -> str:
    """The table for people; no final newline."""
    rows = [("graph", "dtype, weights", "size", "time", "")]
    for check in verdict.checks:
        precision = (
            f"{check.dtype}, {check.weights}" if check.dtype else "not said" if check.graph.endswith(".onnx") else ""
        )
        rows.append(
            (check.graph, precision, f"{check.bytes / 1e6:.1f} MB", f"{check.seconds:.1f} s", check.fault or "ok")
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}  {r[4]}".rstrip()
        for r in rows
    ]
    files = (
        f"{verdict.files} files are as the manifest says" if verdict.files else "no manifest: nothing to compare with"
    )
    faulty = sum(bool(check.fault) for check in verdict.checks)
    state = f"{faulty} of {len(verdict.checks)} checks failed" if faulty else "all checks passed"
    return "\n".join([*lines, f"{verdict.name} on {verdict.engine}: {files}; {state}"])


def raise_for(verdict: Verdict) -> None:
    """EngineError if a check failed: the first one's fault."""
    for check in verdict.checks:
        if check.fault:
            cure = f"; {check.cure}" if check.cure else ""
            raise EngineError(f"bundle {verdict.path}, {check.graph}: {check.fault}{cure}")
