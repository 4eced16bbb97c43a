"""What only a GPU can show. Each test says what it lacks where it is skipped; none needs a network or a trained model.

The first part needs any NVIDIA GPU and cuda-python: our CUDA calls beneath a program made of copies. The second needs an
engine library that this GPU is one of.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import threading

import numpy as np
import pytest

from vega_edge import Pipeline, engines
from vega_edge.bench.gpu_report import captured
from vega_edge.bundle import Bundle
from vega_edge.engines import Spec, nvidia
from vega_edge.engines.plan_engine import PlanEngine
from vega_edge.engines.plan_range import Rebuild
from vega_edge.errors import EngineError
from vega_edge.models import recipes

pytestmark = pytest.mark.gpu
F32 = np.dtype(np.float32)
# Largest difference from onnxruntime-cpu of the final latents after 4 steps, relative to their largest value. The
# embedded model computes in float32; TensorRT and CUDA may use TF32 (10 bits of mantissa, 2^-11 a product) in some
# convolutions, and every kernel sums in an order of its own, which four steps amplify.
TOLERANCES = {"tensorrt-rtx": 2e-2, "tensorrt": 2e-2, "onnxruntime-cuda": 5e-3, "onnxruntime-tensorrt": 2e-2}
STATES = {state.name: state for state in engines.available()}


@pytest.fixture
def device():
    try:
        nvidia.devices()
    except EngineError as why:
        pytest.skip(str(why))
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    from vega_edge.engines.cuda import CudaDevice

    return CudaDevice(0)


class CopyProgram:
    """y = x, by a copy on the device's stream: what a plan is to the part that decides."""

    def __init__(self, device):
        self.device, self.profiles = device, [{}]
        self.inputs = self.outputs = {"x": Spec(F32, (None, None))}
        self.outputs = {"y": Spec(F32, (None, None))}

    def context(self, profile, shapes):
        return CopyContext(self.device, shapes)

    def close(self):
        pass


class CopyContext:
    def __init__(self, device, shapes):
        self.device, self.outputs, self.scratch_bytes = device, {"y": shapes["x"]}, 1 << 20

    def bind(self, addresses, scratch):
        self.addresses = dict(addresses)

    def check_capturable(self):
        pass

    def enqueue(self):
        from cuda.bindings import runtime

        size = int(np.prod(self.outputs["y"])) * 4
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        (code,) = runtime.cudaMemcpyAsync(self.addresses["y"], self.addresses["x"], size, kind, self.device.stream)
        assert int(code) == 0

    def close(self):
        pass


def copier(device, **options):
    return PlanEngine(CopyProgram(device), device, Rebuild(""), **options)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("graphs", [True, False])
def test_what_goes_in_comes_out(device, graphs):
    engine = copier(device, graphs=graphs)
    for seed in range(4):
        for shape in ((1, 8), (3, 100), (2, 70000)):
            given = random(*shape, seed=seed)
            np.testing.assert_array_equal(engine.run({"x": given})["y"], given)
    engine.close()


def test_graphs_are_really_captured(device):
    engine = copier(device)
    for seed in range(3):
        engine.run({"x": random(2, 8, seed=seed)})
    assert [prepared.graph is not None for prepared in engine._prepared.values()] == [True]
    assert engine._graphs
    engine.close()


def test_a_writable_feed_changed_in_place(device):
    engine, given = copier(device), random(4, 4)
    engine.run({"x": given})
    given[:] = 7
    assert (engine.run({"x": given})["y"] == 7).all()
    engine.close()


def test_memory_stays_and_is_freed(device):
    from vega_edge.engines.cuda import CudaDevice

    watcher = CudaDevice(0)
    first = copier(CudaDevice(0))
    for seed in range(3):  # what CUDA takes once and keeps, such as for graphs
        first.run({"x": random(4, 1 << 20, seed=seed)})
    first.close()
    before = watcher.memory()[0]
    engine = copier(device)
    engine.run({"x": random(4, 1 << 20)})
    during = watcher.memory()[0]
    for seed in range(500):
        engine.run({"x": random(1 + seed % 4, 1 << 10, seed=seed)})
    assert abs(watcher.memory()[0] - during) < 4 << 20
    engine.close()
    assert before - watcher.memory()[0] < 4 << 20
    assert not device._pinned
    watcher.close()


def test_two_at_once(device):
    from vega_edge.engines.cuda import CudaDevice

    wrong = []

    def work(index):
        engine = copier(CudaDevice(0))
        for seed in range(100):
            given = random(2, 4096, seed=1000 * index + seed)
            if not np.array_equal(engine.run({"x": given})["y"], given):
                wrong.append((index, seed))
        engine.close()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_too_little_memory_says_how_much_is_free(device):
    with pytest.raises(
        EngineError, match=r"^GPU 0 has too little memory for 1000000000 MB: [\d.]+ of [\d.]+ GB are free; close "
    ):
        device.allocate(10**15)


def test_no_such_gpu(device):
    from vega_edge.engines.cuda import CudaDevice

    count = len(nvidia.devices())
    with pytest.raises(EngineError, match=rf"^there is no cuda:{count}; this machine has {count} NVIDIA GPUs"):
        CudaDevice(count)


# engines


@pytest.fixture(scope="module", params=list(TOLERANCES))
def engine_name(request):
    if not STATES[request.param].ok:
        pytest.skip(f"{request.param}: {STATES[request.param].why_not}")
    return request.param


@pytest.fixture(scope="module")
def bundle(engine_name, tmp_path_factory):
    """The embedded model's, with engines where the backend runs what was built; refittable ones, which need a GPU."""
    folder = tmp_path_factory.mktemp(engine_name) / "demo"
    shutil.copytree(recipes()["demo-vegart"].bundle_path, folder)
    if engine_name.startswith("tensorrt"):
        from vega_edge.export.trt_build import BuildOptions, build_engines
        from vega_edge.export.trt_profiles import bundle_sizes

        opened = Bundle.open(folder)
        for flags in ((), ("refit",)):
            build_engines(opened, BuildOptions(engine_name, bundle_sizes(opened), flags=flags))
    return folder


def latents(folder, engine, prompt="a big red star on a blue background", **options):
    pipe = Pipeline.open(folder, engine, **{k: options.pop(k) for k in ("loras",) if k in options})
    with contextlib.closing(pipe):
        return pipe(prompt, **{"steps": 4, "seed": 7, **options}).latents


@pytest.mark.parametrize("options", [{}, {"samples": 4}, {"guidance": 3.0}, {"width": 192, "height": 96}], ids=str)
def test_the_same_as_on_the_cpu(engine_name, bundle, options):
    want, got = latents(bundle, "onnxruntime-cpu", **options), latents(bundle, engine_name, **options)
    assert np.abs(got - want).max() / np.abs(want).max() < TOLERANCES[engine_name]


def test_auto_takes_what_was_built(engine_name, bundle, caplog):
    if engine_name not in engines.choice.AUTO:
        pytest.skip(f"{engine_name} is not among those that auto takes")
    chosen = engines.choose_engine(None, engines.BuiltFor(bundle))
    assert engines.choice.AUTO.index(chosen) <= engines.choice.AUTO.index(engine_name)


def test_a_lora_taken_off_leaves_the_original_bit_for_bit(engine_name, bundle, tmp_path):
    """A known defect elsewhere: NVIDIA/TensorRT#3628."""
    file = lora_for(bundle, tmp_path / "lora.safetensors")
    before = latents(bundle, engine_name)
    with_lora = latents(bundle, engine_name, loras=[(file, 1.0)])
    want = latents(bundle, "onnxruntime-cpu", loras=[(file, 1.0)])
    assert np.abs(with_lora - want).max() / np.abs(want).max() < TOLERANCES[engine_name]
    assert np.abs(with_lora - before).max() > 10 * TOLERANCES[engine_name] * np.abs(before).max()
    np.testing.assert_array_equal(latents(bundle, engine_name), before)


def lora_for(folder, file):
    """A LoRA of rank 4 on a few of the UNet's matrices, large enough to be seen."""
    safetensors = pytest.importorskip("safetensors.numpy")
    from vega_edge.onnx_file import read_weights

    bundle = Bundle.open(folder)
    weights, rng, tensors = read_weights(bundle.graph("unet")), np.random.default_rng(0), {}
    places = bundle.manifest.parts["unet"].parameters
    for name in [n for n in places if n.endswith(("to_q.weight", "to_v.weight"))][:12]:
        shape = weights[places[name].initializer].shape
        out, into = shape[::-1] if places[name].transposed else shape
        module = f"unet.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((4, into)).astype(np.float32) * 0.2
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((out, 4)).astype(np.float32) * 0.2
    safetensors.save_file(tensors, file)
    return file


def test_500_pictures_in_constant_memory(engine_name, bundle, device):
    pipe = Pipeline.open(bundle, engine_name)
    for seed in range(10):
        pipe("a star", steps=1, seed=seed)
    before = device.memory()[0]
    for seed in range(500):
        pipe("a star", steps=1, seed=seed)
    assert abs(device.memory()[0] - before) < 16 << 20
    pipe.close()


def unet_feeds(spec, seed=0):
    """Feeds of one 128x128 picture for the embedded UNet."""
    rng = np.random.default_rng(seed)
    shapes = {"sample": (1, 4, 16, 16), "timestep": (1,), "encoder_hidden_states": (1, 77, None)}
    found = {}
    for name, (dtype, shape) in spec.items():
        wanted = shapes.get(name, (1, None))
        filled = [size if isinstance(size, int) else wanted[axis] for axis, size in enumerate(shape)]
        found[name] = rng.standard_normal(filled).astype(dtype)
    return {**found, "timestep": np.full_like(found["timestep"], 500)}


def test_a_cuda_graph_changes_nothing(engine_name, bundle):
    """The first run of a shape has none, the second captures one, the third replays it."""
    engine = engines.open_engine(bundle / "unet" / "model.onnx", engine_name)
    with contextlib.closing(engine):
        feeds, other = unet_feeds(engine.inputs), unet_feeds(engine.inputs, seed=1)
        without = engine.run(feeds)["out_sample"]
        assert captured(engine) == 0
        engine.run(other)
        replayed = engine.run(feeds)["out_sample"]
        assert captured(engine) == (0 if engine_name == "onnxruntime-tensorrt" else 1)
    limit = (
        TOLERANCES[engine_name] / 100 * np.abs(without).max()
    )  # the same kernels; some sum in another order each time
    assert np.abs(replayed - without).max() <= limit


def test_a_prompt_and_a_size_that_change_after_the_capture(engine_name, bundle):
    """The classic fault of a captured graph: it reads a buffer that moved, or the values of another run."""
    prompts = "a big red star on a blue background", "a small green circle on a white background"
    wanted = [(prompt, side, samples) for prompt in prompts for side in (128, 160) for samples in (1, 2)]
    with contextlib.closing(Pipeline.open(bundle, engine_name)) as pipe:
        for _ in range(3):  # warm-up, capture, replay
            drawn = [
                pipe(prompt, steps=2, seed=3, width=side, height=side, samples=samples).latents
                for prompt, side, samples in wanted
            ]
    for (prompt, side, samples), got in zip(wanted, drawn, strict=True):
        want = latents(
            bundle, "onnxruntime-cpu", prompt=prompt, steps=2, seed=3, width=side, height=side, samples=samples
        )
        assert np.abs(got - want).max() / np.abs(want).max() < TOLERANCES[engine_name]


def test_two_pipelines_at_once(engine_name, bundle):
    want, got = latents(bundle, engine_name), {}

    def draw(index):
        got[index] = [latents(bundle, engine_name) for _ in range(5)]

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [0, 1]
    for each in (*got[0], *got[1]):
        assert np.abs(each - want).max() <= TOLERANCES[engine_name] / 10 * np.abs(want).max()


def test_all_of_it_is_freed_at_close(engine_name, bundle, device):
    latents(bundle, engine_name, steps=1, samples=4)  # what is loaded once and kept: CUDA's modules for these kernels
    gc.collect()
    before = device.memory()[0]
    pipe = Pipeline.open(bundle, engine_name)
    pipe("a star", steps=1, samples=4)
    during = device.memory()[0]
    pipe.close()
    del pipe
    gc.collect()
    assert before - during > 8 << 20  # the embedded model's weights and buffers
    assert before - device.memory()[0] < 4 << 20
