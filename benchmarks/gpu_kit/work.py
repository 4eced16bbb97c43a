"""What a step does, in its own process: `python -m vega_edge.benchmarks.gpu_kit.work NAME ...`.

Writes its numbers to the file that GPU_KIT_RESULT names. GPU_KIT_DEVICE=cpu rehearses the same on a CPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "torch", "onnx", "onnxscript", "onnxruntime", "transformers", "diffusers", "vega_edge")
NEEDED = ("numpy", "onnxruntime", "vega_edge")  # without these there is nothing to measure
TESTS = ("tests/test_gpu.py", "tests/test_cuda.py", "tests/test_onnxruntime_cuda.py", "tests/test_gpu_plans.py")
DEVICE = os.environ.get("GPU_KIT_DEVICE", "cuda:0")
CPU = DEVICE == "cpu"
ENGINE = "onnxruntime-cpu" if CPU else "onnxruntime-cuda"
RUNS, WARM = (2, 1) if CPU else (10, 3)


def store() -> Path:
    return Path(os.environ["GPU_KIT_STORE"])


def bundle(name: str) -> Path:
    return store() / "bundles" / name


def save(result: Any) -> None:
    """Keep what is known so far: a step that is killed has it in its line too."""
    file = Path(os.environ["GPU_KIT_RESULT"])
    part = file.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(file)


def imports(words: Sequence[str]) -> None:
    """Import what the run needs, and say what it is. --apart: each in a process of its own, and only NEEDED must work."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "gpu": _nvidia_smi(), "packages": {}, "faults": {}}
    for name in PACKAGES:
        start = time.perf_counter()
        try:
            found["packages"][name] = _version(name, apart="--apart" in words)
        except Exception as failure:
            found["faults"][name] = f"{type(failure).__name__}: {failure}"[:500]
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 2)
        save(found)
    print(json.dumps(found, indent=1))
    wanted = NEEDED if "--apart" in words else PACKAGES
    if lacking := [name for name in wanted if name in found["faults"]]:
        raise SystemExit(f"can't be imported: {', '.join(lacking)}")


def _version(name: str, apart: bool) -> str:
    if apart:
        code = f"import {name}; print({name}.__version__, {name}.__file__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise ImportError((done.stderr.strip() or "it crashed").splitlines()[-1])
        return done.stdout.strip().splitlines()[-1]
    module = __import__(name)
    return f"{module.__version__} {module.__file__}"


def _nvidia_smi() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        return subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return ""


def session(words: Sequence[str]) -> None:
    """One node on the GPU's provider, as the engine opens it."""
    import onnxruntime as ort  # type: ignore[import, unused-ignore]

    from ...engines import onnxruntime as engine

    provider = "CPUExecutionProvider" if CPU else engine.CUDA
    engine._require(provider)
    engine.try_provider(provider, {})
    save({"onnxruntime": ort.__version__, "provider": provider, "libraries": _loaded()})


def _loaded() -> list[str]:
    """The files of CUDA's and onnxruntime's libraries that this process has open."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    names = ("libcu", "libnv", "libonnxruntime", "libtensorrt")
    return sorted({line.split()[-1] for line in lines if any(name in line for name in names)})


def export(words: Sequence[str]) -> None:
    """MODEL [--any-memory]: fp16, random weights unless the model's are in the package.

    --any-memory: whatever the system says is free; a virtual machine's memory may grow as it is used.
    """
    from ...cli import main
    from ...export import needs

    model, *more = words
    if "--any-memory" in more:
        more.remove("--any-memory")
        needs._available_memory = lambda: 1 << 40
    made = [] if model.startswith("demo-") else ["--random-weights", "0"]
    dtype = "fp32" if CPU else "fp16"
    command = ["export", model, *made, "--dtype", dtype, *more, "-o", str(bundle(model)), "--overwrite", "--json"]
    bundle(model).parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if main(command):
        raise SystemExit(f"export of {model} failed")
    save({"seconds": round(time.perf_counter() - start, 1), "dtype": dtype})


def embedded(words: Sequence[str]) -> None:
    """The bundle inside the package, in place of one that was exported here."""
    from ...models import find_bundle

    shutil.rmtree(bundle("demo-vegart"), ignore_errors=True)
    shutil.copytree(find_bundle("demo-vegart"), bundle("demo-vegart"))
    save({"embedded": True})


def tests(words: Sequence[str]) -> None:
    """The tests in `TESTS`, on the GPU; each outcome is kept as it comes."""
    import importlib.util

    import pytest

    outcomes: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}

    class Collect:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.outcome == "failed":
                outcomes["failed"][report.nodeid.rpartition("/")[2]] = report.longreprtext[-600:]
            elif report.outcome == "skipped":
                why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                outcomes["skipped"][why] = outcomes["skipped"].get(why, 0) + 1
            elif report.when == "call":
                outcomes["passed"] += 1
            save(outcomes)

    # by the name of the package, whatever the folder of the working tree is called
    root = store() / "tree" / "vega_edge"
    files = [str(root / file) for file in words or TESTS]
    options = ["-q", "-ra", "-p", "no:cacheprovider", f"--rootdir={root}", f"--confcutdir={root}", "-c", str(root / "pyproject.toml")]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout"):  # the step has a limit of its own
        options += ["--timeout=90"]
    if code := pytest.main([*options, *files], plugins=[Collect()]):
        raise SystemExit(int(code))


def beside(words: Sequence[str]) -> None:
    """MODEL and options of `vega-edge bench gpu`: ours beside diffusers. A goal that is missed is a result, not a fault."""
    from ...bench import gpu

    model, *options = words
    out = store() / "work" / f"beside-{os.getpid()}.json"
    runs = ["--runs", str(RUNS), "--warm", str(WARM), "--no-first-picture"]
    missed = ""
    try:
        gpu.main([str(bundle(model)), "--engine", ENGINE, "--device", DEVICE, *runs, *options, "-o", str(out)])
    except SystemExit as judged:
        missed = str(judged)
        if not out.is_file():
            raise
    save({**json.loads(out.read_text(encoding="utf-8")), "missed": missed})
    print(missed)


def first(words: Sequence[str]) -> None:
    """MODEL: seconds from a new process to its first picture."""
    from ...bench.gpu import first_picture

    save({"seconds": first_picture(bundle(words[0]), ENGINE, DEVICE)})


class Configs:
    """A model's configurations, as a bundle gives them, without a bundle."""

    manifest = None

    def __init__(self, model: str) -> None:
        from ...export import model_source

        self._configs = model_source(model, random_weights=0).open().configs
        self.parts = (*self._configs, "vae_decoder")

    def config(self, part: str) -> dict[str, Any]:
        return dict(self._configs["vae" if part == "vae_decoder" else part])


def warm(words: Sequence[str]) -> None:
    """MODEL SIZE: compile the peer once, so that torch's caches have its kernels."""
    from ...bench.gpu_peers import peer
    from ...models import recipes

    model, size = words
    guidance = recipes()[model].defaults["guidance"]
    settings = {"steps": 1, "guidance": guidance, "width": int(size), "height": int(size)}
    start = time.perf_counter()
    made: Any = peer(Configs(model), settings, DEVICE, compile_mode="reduce-overhead", batch=1)  # type: ignore[arg-type]
    made(0)
    save({"seconds": round(time.perf_counter() - start, 1)})
    made.close()


def forms(words: Sequence[str]) -> None:
    """MODEL SIZE: the U-Net with CUDA graphs and without, bound and not, plain and with MultiHeadAttention nodes, taking turns."""
    model, size = words[0], int(words[1])
    with contextlib.ExitStack() as stack:
        sides = dict[str, Callable[[], Any]]()
        faults = dict[str, str]()
        feeds = dict[str, Any]()
        for form in ("plain", "attention"):
            graph = _graph(model, "unet", form)
            if graph is None:
                continue
            try:
                for name, engine in _opened(graph):
                    stack.callback(engine.close)
                    feeds = feeds or unet_feeds(engine.inputs, size)
                    sides[f"{form}, {name}"] = functools.partial(engine.run, feeds)
            except Exception as failure:
                faults[form] = f"{type(failure).__name__}: {failure}"[:800]
        taken: dict[str, list[float]] = {name: [] for name in sides}
        outputs = dict[str, Any]()
        for i in range(WARM + RUNS):
            for name, side in list(sides.items()):
                start = time.perf_counter()
                try:
                    outputs[name] = side()["out_sample"]
                except Exception as failure:
                    faults[name] = f"{type(failure).__name__}: {failure}"[:800]
                    del sides[name]
                    continue
                if i >= WARM:
                    taken[name].append(time.perf_counter() - start)
            save(_forms_result(model, size, taken, outputs, faults))
        result = _forms_result(model, size, taken, outputs, faults)
    save(result)
    print(json.dumps(result, indent=1))
    if not any(taken.values()):
        raise SystemExit("no form ran")


def _forms_result(model: str, size: int, taken: Any, outputs: Any, faults: Any) -> dict[str, Any]:
    import numpy as np

    apart = dict[str, float]()
    for name, value in outputs.items():
        first = next(iter(outputs.values()))
        apart[name] = float(np.abs(value.astype(np.float64) - first).max() / np.abs(first).max())
    seconds = {name: round(statistics.median(each), 5) for name, each in taken.items() if each}
    return {"model": model, "size": size, "unet_s": seconds, "apart": apart, "faults": faults}


def _opened(graph: Path) -> Iterator[tuple[str, Any]]:
    """(name, engine) of each way to run `graph`. The session without CUDA graphs serves two of them."""
    if CPU:
        from ...engines import open_engine

        yield "cpu", open_engine(graph, ENGINE)
        return
    from ...engines import onnxruntime as common
    from ...engines import onnxruntime_cuda as cuda
    from ...engines.protocol import Opening

    captured = cuda.open_graph(graph, common.CUDA, Opening())
    yield ("graph" if captured._captures else "graph refused: bound"), captured
    settings = {"device_id": 0, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    plain = cuda._session(graph, Opening(), [(common.CUDA, settings)])
    yield "bound", cuda.BoundEngine(plain, 0, captures=False)
    yield "not bound", common.OnnxRuntimeEngine(plain)
    channels_last = cuda._session(graph, Opening(), [(common.CUDA, {**settings, "prefer_nhwc": 1})])
    yield "bound, channels last", cuda.BoundEngine(channels_last, 0, captures=False)


def _graph(model: str, part: str, form: str) -> Path | None:
    from ...manifest import attention_form

    plain = bundle(model) / part / "model.onnx"
    graph = plain if form == "plain" else plain.with_name(attention_form(plain.name))
    return graph if graph.is_file() else None


def unet_feeds(inputs: Any, size: int) -> dict[str, Any]:
    """Random feeds for one picture of `size` px, without guidance."""
    import numpy as np

    draw, found = np.random.default_rng(0), dict[str, Any]()
    shapes: dict[str, tuple[Any, ...]] = {
        "sample": (1, 4, size // 8, size // 8),
        "encoder_hidden_states": (1, 77, None),
        "timestep": (1,),
    }
    for name, spec in inputs.items():
        wanted = shapes.get(name, (1, None))
        shape = [axis if isinstance(axis, int) else wanted[i] for i, axis in enumerate(spec.shape)]
        found[name] = draw.standard_normal(shape).astype(spec.dtype)
    found["timestep"] = np.full_like(found["timestep"], 500)
    if "time_ids" in found:
        found["time_ids"] = np.array([[size, size, 0, 0, size, size]], found["time_ids"].dtype)
    return found


def profile(words: Sequence[str]) -> None:
    """MODEL SIZE: the kernels of a U-Net's run and of a decoder's, by the time they take."""
    import numpy as np

    from ...engines import open_engine

    model, size = words[0], int(words[1])
    result: dict[str, Any] = {"model": model, "size": size}
    for part in ("unet", "vae_decoder"):
        form = _graph(model, part, "attention") or _graph(model, part, "plain")
        if form is None:
            raise SystemExit(f"there is no bundle of {model}")
        with contextlib.closing(open_engine(form, ENGINE)) as engine:
            if part == "unet":
                feeds = unet_feeds(engine.inputs, size)
            else:
                (name,) = engine.inputs
                channels = engine.inputs[name].shape[1]
                shape = (1, channels if isinstance(channels, int) else 4, size // 8, size // 8)
                feeds = {name: np.random.default_rng(0).standard_normal(shape).astype(engine.inputs[name].dtype)}
            for _ in range(3):
                engine.run(feeds)
            start = time.perf_counter()
            engine.run(feeds)
            result[part] = {"graph": form.name, "seconds": round(time.perf_counter() - start, 5)}
            save(result)
            result[part]["kernels_ms"] = _kernels(functools.partial(engine.run, feeds))
            save(result)
    print(json.dumps(result, indent=1))


def _kernels(run: Callable[[], Any]) -> dict[str, list[float]]:
    """[ms, calls] of the 25 costliest kernels of one run. torch's profiler sees those of every library in the process."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CPU if CPU else ProfilerActivity.CUDA]) as seen:
        run()
    taken: dict[str, list[float]] = {}
    for event in seen.key_averages():
        micro = event.self_cpu_time_total if CPU else event.self_device_time_total
        if micro:
            taken[event.key[:120]] = [round(micro / 1000, 3), event.count]
    return dict(sorted(taken.items(), key=lambda each: -each[1][0])[:25])


def rtx(words: Sequence[str]) -> None:
    """TensorRT-RTX on a GPU that it does not list: what it answers, recorded step by step; no answer is a failure."""
    answers = dict[str, Any]()

    def ask(name: str, question: Callable[[], Any]) -> Any:
        answer = None
        try:
            answer = question()
            answers[name] = answer if isinstance(answer, (str, int, list)) else "it works"
        except (Exception, SystemExit) as failure:
            answers[name] = f"{type(failure).__name__}: {failure}"[:1500]
        save(answers)
        return answer

    def built() -> Any:
        from ...bundle import Bundle
        from ...export.trt_build import BuildOptions, build_engines
        from ...export.trt_profiles import bundle_sizes

        folder = store() / "bundles" / "rtx" / "demo-vegart"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle("demo-vegart"), folder)
        opened = Bundle.open(folder)
        build_engines(opened, BuildOptions("tensorrt-rtx", bundle_sizes(opened)))
        return folder

    def loaded() -> list[str]:
        import tensorrt_rtx as trt  # type: ignore[import, unused-ignore]

        from ...engines.trt_logger import logger

        said, found = list[str](), list[str]()
        runtime = trt.Runtime(logger(trt, said, print))
        for plan in sorted((store() / "bundles" / "rtx").rglob("*.plan")):
            content = plan.read_bytes()
            validity = runtime.get_engine_validity(content[: runtime.engine_header_size])
            engine = runtime.deserialize_cuda_engine(content)
            found.append(f"{plan.name}: {validity}, {'loaded' if engine is not None else 'not loaded'}")
        return [*found, *dict.fromkeys(said)][:20]

    def drawn() -> Any:
        from ... import Pipeline

        with contextlib.closing(Pipeline.open(store() / "bundles" / "rtx" / "demo-vegart", "tensorrt-rtx")) as pipe:
            pipe("a red star")

    def version() -> str:
        import tensorrt_rtx as trt  # type: ignore[import, unused-ignore]

        return str(trt.__version__)

    def state() -> str:
        from ...engines import available

        found = next(each for each in available() if each.name == "tensorrt-rtx")
        return f"{'usable' if found.ok else 'not usable'}: {found.why_not or found.device}"

    ask("version", version)
    ask("engine", state)
    if ask("build", built):
        ask("load", loaded)
        ask("draw", drawn)
    print(json.dumps(answers, indent=1))


WORK = {f.__name__: f for f in (imports, session, export, embedded, tests, beside, first, warm, forms, profile, rtx)}

if __name__ == "__main__":
    WORK[sys.argv[1]](sys.argv[2:])
