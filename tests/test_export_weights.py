"""Storage: what a packed module computes, where its weights go in a graph, and autoencoders kept in fp16's range."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from torch import nn  # noqa: E402

from vega_edge.engines import open_engine  # noqa: E402
from vega_edge.errors import ExportError, UsageError  # noqa: E402
from vega_edge.export import graphs, needs, onnx_edit, parts, quantize, rescale, samples  # noqa: E402
from vega_edge.export.autoencoders import Autoencoders  # noqa: E402
from vega_edge.export.checkpoint import open_checkpoint  # noqa: E402
from vega_edge.export.packed import Packed, quantized  # noqa: E402
from vega_edge.export.precision import Precision, make_precision  # noqa: E402
from vega_edge.export.weights import place  # noqa: E402
from vega_edge.export.work import forward  # noqa: E402
from vega_edge.manifest import Parameter  # noqa: E402

from .kept_traces import keeping  # noqa: E402


class Net(nn.Module):
    """Every way in which a graph takes a weight: lookup, Conv, Gemm, transposed MatMul, norm, one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 36)
        self.bare = nn.Linear(36, 36, bias=False)
        self.twin = nn.Linear(36, 36, bias=False)
        self.twin.weight.data = self.bare.weight.data.clone()  # equal content is no reason to mix them up
        self.norm = nn.LayerNorm(36)
        self.conv = nn.Conv2d(1, 128, 3, padding=1)
        self.small = nn.Conv2d(128, 1, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(ids))
        x = self.bare(x) + self.twin(x).tanh()
        return self.small(self.conv(x[:, None]).tanh())


SPEC = graphs.GraphSpec({"ids": ("batch", 6)}, {"out": ("batch", 1, 6, 36)})


def wrapped(net: nn.Module) -> nn.Module:
    wrapper = nn.Module()
    wrapper.model = net
    wrapper.forward = lambda ids: wrapper.model(ids)  # type: ignore[method-assign]
    return wrapper


def made(weights: str, arithmetic: str, path: Path) -> tuple[Packed, dict[str, Parameter], Any]:
    torch.manual_seed(0)
    net = Net()
    packed = Packed("unet", net, weights)
    with packed.tracing(arithmetic):
        traced = graphs.trace("unet", wrapped(net), SPEC, {"ids": torch.zeros((3, 6), dtype=torch.int64)})
    onnx_edit.strip(traced.model)
    names = {"published": lambda name: f"p.{name}", "mapped": packed.matrices}
    placed = place(traced.model, traced.parameters, packed.stored, arithmetic, **names)
    onnx_edit.save(traced.model, path)
    return packed, placed.parameters, onnx.load(path)


@pytest.mark.parametrize(
    ("weights", "arithmetic", "kinds", "error"),
    [
        ("fp32", "fp32", {"FLOAT"}, 1e-6),
        ("fp16", "fp32", {"FLOAT16", "FLOAT"}, 1e-6),
        ("bf16", "fp32", {"BFLOAT16", "FLOAT"}, 1e-6),
        ("int8", "fp32", {"INT8", "FLOAT16", "FLOAT"}, 1e-6),
        ("fp16", "fp16", {"FLOAT16"}, 5e-3),
        ("int8", "fp16", {"INT8", "FLOAT16", "FLOAT"}, 5e-3),
    ],
)
def test_the_graph_computes_what_the_stored_weights_say(
    tmp_path: Path, weights: str, arithmetic: str, kinds: set[str], error: float
) -> None:
    packed, parameters, graph = made(weights, arithmetic, tmp_path / "model.onnx")
    ids = torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(1))
    with packed.computing() as module:
        wanted = module(ids).numpy()
    engine = open_engine(tmp_path / "model.onnx", "onnxruntime-cpu", threads=1)
    got = engine.run({"ids": ids.numpy()})["out"]
    engine.close()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=error * np.abs(wanted).max())
    onnx.checker.check_model(graph, full_check=True)
    stored = {i.name: onnx.TensorProto.DataType.Name(i.data_type) for i in graph.graph.initializer}
    floats = {n: k for n, k in stored.items() if k != "INT64"}
    assert set(floats.values()) == kinds
    large = {"p.table.weight", "p.bare.weight", "p.twin.weight", "p.conv.weight"}
    want = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "int8": "INT8"}[weights]
    assert {stored[name] for name in large} == {want}
    if weights == "int8":
        assert parameters.keys() == {"p.small.weight"}  # what is in eight bits can't be patched
    else:
        turned = {name: place.transposed for name, place in parameters.items()}
        assert turned == {
            "p.bare.weight": True, "p.twin.weight": True, "p.conv.weight": False, "p.small.weight": False,
        }  # fmt: skip
        assert all(name == place.initializer for name, place in parameters.items())


def test_a_packed_module_holds_one_copy_and_computes_with_the_stored_numbers() -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    packed = Packed("unet", net, "fp16")
    assert packed.changed == len([p for p in before.values() if not torch.equal(p.half().float(), p)]) > 5
    assert all(p.untyped_storage().nbytes() <= 4 for p in net.parameters())
    rounded = Net()
    rounded.load_state_dict({name: p.half().float() for name, p in before.items()})
    ids = torch.arange(12).reshape(2, 6)
    with packed.computing() as module, torch.no_grad():
        assert torch.equal(module(ids), rounded(ids))
    assert all(p.untyped_storage().nbytes() <= 4 for p in net.parameters())


def test_a_trace_that_the_tests_keep_is_the_trace() -> None:
    """Copies are equal to it and independent of it; other settings and another arithmetic are traced again."""
    traced: list[str] = []

    def trace(*arguments: Any) -> graphs.Traced:
        traced.append(arguments[-1])
        return graphs.trace(*arguments)

    def once(net: nn.Module, arithmetic: str = "fp32") -> graphs.Traced:
        packed = Packed("unet", net, "fp32")
        with packed.tracing(arithmetic):
            return kept("unet", wrapped(net), SPEC, {"ids": torch.zeros((3, 6), dtype=torch.int64)}, arithmetic)

    kept = keeping(trace, {})
    first = once(Net())
    wanted = ir.to_proto(first.model).SerializeToString()
    with Packed("unet", fresh := Net(), "fp32").tracing("fp32"):
        ids = {"ids": torch.zeros((3, 6), dtype=torch.int64)}
        again = graphs.trace("unet", wrapped(fresh), SPEC, ids, "fp32")
    assert ir.to_proto(again.model).SerializeToString() == wanted
    assert first.parameters.keys() == {name for name, _ in Net().named_parameters()}
    assert all(value in first.model.graph.inputs for value in first.parameters.values())
    onnx_edit.strip(first.model)
    place(first.model, first.parameters, Packed("unet", Net(), "fp32").stored, "fp32", published=str)
    assert ir.to_proto(once(Net()).model).SerializeToString() == wanted and traced == ["fp32"]
    other = Net()
    other.norm.eps = 1e-3
    assert ir.to_proto(once(other).model).SerializeToString() != wanted
    once(Net(), "fp16")
    assert traced == ["fp32", "fp32", "fp16"]


@pytest.mark.parametrize("kind", ["sd", "xl"])
def test_layers_that_are_kept_widened_give_the_same_ranges(checkpoints: dict[str, Path], kind: str) -> None:
    """Exactly, and so the same graph; and each layer is widened once instead of once a run."""
    checkpoint = open_checkpoint(checkpoints[kind])
    packed = parts.load_packed(checkpoint, "unet", "int8", {})
    wrapper, spec = graphs.Denoiser(packed.module), graphs.denoiser_spec(packed.module)
    random = torch.Generator().manual_seed(0)
    cases = []
    for batch, height, width in samples.latent_sizes(checkpoint.configs["unet"]):
        axes = {"batch": batch, "sequence_length": 77}
        shapes = {n: [axes.get(a, a) for a in a] for n, a in spec.inputs.items() if n not in ("sample", "timestep")}
        feeds = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
        cases.append((torch.zeros(batch, 4, height, width), feeds))
    eight_bits = [name for name in packed.matrices if packed.stored[name].scale is not None]
    found = []
    for keep in (False, True):
        with packed.computing(keep) as module:
            assert (module.conv_in.weight.untyped_storage().nbytes() > 4) == keep
            found.append(
                quantize.observe(
                    module,
                    eight_bits,
                    lambda: quantize.denoise(
                        lambda feeds: forward(wrapper, spec, feeds)["out_sample"], checkpoint.scheduler, cases
                    ),
                )
            )
        assert all(p.untyped_storage().nbytes() <= 4 for p in packed.module.parameters())
    assert found[0] == found[1] and len(found[0]) > 5
    assert packed.wide_bytes == sum(4 * p.numel() for p in packed.module.parameters())


def test_ranges_are_the_largest_magnitudes_of_either_sign() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False)}).requires_grad_(False)
    net["a"].weight.data = torch.tensor([[1.0, 1.0]])
    rows = [[-5.0, 3.0], [-1.0, -2.0], [4.0, 0.5]]
    seen = quantize.observe(net, ["a.weight"], lambda: [net["a"](torch.tensor([row])) for row in rows])
    assert seen == {"a.weight": (5.0, 4.5)}
    seen = quantize.observe(net, ["a.weight"], lambda: net["a"](torch.tensor([rows[1]])))
    assert seen == {"a.weight": (2.0, 3.0)}


@pytest.mark.parametrize(("dtype", "room", "kept"), [("int8", 0, True), ("int8", -1, False), ("fp32", 0, False)])
def test_layers_are_kept_widened_for_int8_if_memory_is_free(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, room: int, kept: bool
) -> None:
    class Enough(Exception):
        pass

    def stop(wrapper: Any, *_: Any) -> Any:
        seen.append(wrapper.model.conv_in.weight.untyped_storage().nbytes() > 4)
        raise Enough

    seen: list[bool] = []
    opened = open_checkpoint(checkpoint)
    made = parts.PartsExporter(opened, tmp_path, make_precision(dtype, None), {}, lambda *_: None, None)  # type: ignore[arg-type]
    made._latents = [torch.zeros(s.batch, 4, s.height, s.width) for s in samples.latent_sizes(opened.configs["unet"])]
    wide = parts.load_packed(opened, "unet", dtype, {}).wide_bytes
    free = SimpleNamespace(available=wide + needs.MEMORY_BASE + room, free=0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=10**12))  # never counted
    monkeypatch.setattr(parts, "forward", stop)
    with pytest.raises(Enough):
        made._unet()
    assert seen == [kept]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps them")
def test_holes_in_the_heap_are_given_back() -> None:
    script = """
import mmap
import numpy as np
from pathlib import Path
from vega_edge.export.heap import give_back
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6
blocks = [np.ones(8000) for _ in range(4000)]  # 64 kB: on the heap, not mapped
last = np.ones(8000)  # above them, so that the heap can't shrink
del blocks
before = resident_mb()
give_back()
print(before - resident_mb())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 200


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps them")
@pytest.mark.parametrize("mapped", [True, False])
def test_large_blocks_leave_no_holes(mapped: bool) -> None:
    script = f"""
import mmap
import numpy as np
from pathlib import Path
from vega_edge.export.heap import map_tensors
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 1e6
if {mapped}:
    map_tensors()
del (first := [np.ones(3_000_000)])[:]  # 24 MB: freed, it raises glibc's own limit
before, kept = resident_mb(), []
for _ in range(40):
    wide = np.ones(500_000)  # as a weight is widened, and made smaller again
    kept.append(np.ones(250_000))
    del wide
kept[:-1] = []
print(resident_mb() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (float(done.stdout) < 20) == mapped


def test_eight_bits_by_rows() -> None:
    weight = torch.tensor([[127.0, -63.2, 0.4], [0.0, 0.0, 0.0], [1e-3, -1e-3, 5e-4]])
    stored = quantized(weight)
    assert stored.data.tolist() == [[127, -63, 0], [0, 0, 0], [127, -127, 64]]
    np.testing.assert_allclose(
        stored.widened(torch.empty(3, 3)), [[127, -63, 0], [0, 0, 0], [1e-3, -1e-3, 64e-3 / 127]], atol=1e-9
    )


@pytest.mark.parametrize("numbers", [1023, 1024])
def test_vectors_keep_half_precision_whatever_their_length(numbers: int) -> None:
    """A full-size model's biases and norms are as long as a small matrix is large."""
    net = nn.ModuleList([nn.Linear(4, numbers), nn.Conv2d(2, numbers, 1), nn.LayerNorm(numbers)])
    stored = Packed("unet", net, "int8").stored
    for name in ("0.bias", "1.bias", "2.weight", "2.bias"):
        assert (stored[name].data.dtype, stored[name].scale, len(stored[name].data)) == (torch.float16, None, numbers)
    assert {stored[name].data.dtype for name in ("0.weight", "1.weight")} == {torch.int8}


@pytest.mark.parametrize(("numbers", "kind"), [(1023, torch.float16), (1024, torch.int8)])
@pytest.mark.parametrize(
    "layer", [lambda n: nn.Linear(n, 1), lambda n: nn.Conv2d(n, 1, 1), lambda n: nn.Embedding(n, 1)]
)
def test_matrices_kernels_and_embeddings_are_in_eight_bits_from_1024_numbers_on(
    numbers: int, kind: torch.dtype, layer: Any
) -> None:
    stored = Packed("unet", layer(numbers), "int8").stored["weight"]
    assert stored.data.dtype == kind and (stored.scale is not None) == (kind == torch.int8)


def test_weights_beyond_half_precision() -> None:
    net = Net()
    net.conv.weight.data[0, 0, 0, 0] = 7e4
    with pytest.raises(ExportError) as caught:
        Packed("unet", net, "fp16")
    assert str(caught.value) == ("unet: conv.weight holds 7e+04, beyond fp16's 65504; export with weights fp32 or bf16")


@pytest.mark.parametrize("weights", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(weights: str, value: float) -> None:
    net = Net()
    net.conv.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ExportError, match=r"conv\.weight holds values that are not finite"):
        Packed("unet", net, weights)


def test_precisions() -> None:
    assert make_precision("fp32", None) == Precision("fp32", "fp32")
    assert make_precision("int8", None).arithmetic == "fp32" and make_precision("int8", None).integer
    with pytest.raises(UsageError, match="unknown dtype 'half'"):
        make_precision("half", None)
    with pytest.raises(ExportError) as caught:
        make_precision("bf16", "fp16")
    assert str(caught.value) == (
        "weights fp16 with dtype bf16 is not a pair that is exported; with dtype bf16 weights can be bf16"
    )


def autoencoder(gain: float) -> AutoencoderKL:
    """Its residual sums grow with `gain`."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    for module in vae.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data += 0.05 * torch.randn(parameter.shape)
        if type(module).__name__ == "ResnetBlock2D":
            module.conv2.weight.data *= gain
    return vae.eval()


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_rescaling_changes_nothing_but_the_range(half: str) -> None:
    """Half precision overflows without it, and gives float32's results with it."""
    plain, scaled = autoencoder(1e5), autoencoder(1e5)
    rescale.rescale(getattr(scaled, half), 2.0**-9)
    x = torch.randn(2, 3 if half == "encoder" else 4, 12, 8, generator=torch.Generator().manual_seed(0))

    def run(vae: AutoencoderKL, x: Any) -> Any:
        with torch.no_grad():
            return vae.encode(x).latent_dist.parameters if half == "encoder" else vae.decode(x).sample

    wanted = run(plain, x)
    largest = float(wanted.abs().max())
    np.testing.assert_allclose(run(scaled, x), wanted, atol=2e-5 * largest)
    peaks = [rescale.largest_inner(getattr(vae, half), lambda vae=vae: run(vae, x)) for vae in (plain, scaled)]
    assert peaks[0] > rescale.LARGEST and peaks[1] / peaks[0] == pytest.approx(2.0**-9, rel=1e-3)
    assert not torch.isfinite(run(plain.half(), x.half())).all()
    np.testing.assert_allclose(run(scaled.half(), x.half()).float(), wanted, atol=2e-2 * largest)


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Autoencoders:
    """An autoencoder whose decoder overflows in fp16, ready to be exported in fp16."""
    monkeypatch.setattr("vega_edge.export.autoencoders.load_module", lambda *_: autoencoder(1e5))
    configs = {"vae": dict(autoencoder(1.0).config), "unet": {"block_out_channels": (8, 8), "sample_size": 8}}
    checkpoint: Any = SimpleNamespace(configs=configs, sdxl=False)
    sizes = samples.latent_sizes(configs["unet"])
    return Autoencoders(checkpoint, tmp_path, Precision("fp16", "fp16"), sizes, lambda *_: None)


def test_a_decoder_that_overflows_is_exported_in_range(wild: Autoencoders) -> None:
    """The export itself holds the fp16 graph, rounded after each node, against torch in float32."""
    latents = [torch.randn(size.batch, 4, size.height, size.width) * 0.2 for size in wild.sizes]
    done = wild.decoder("vae_decoder", "vae", latents)
    assert done.activation_scale < 2.0**-5 and done.report.dtype == "fp16" and done.report.max_relative_error < 1e-2
    assert wild.notes == [
        f"vae_decoder: inner values are scaled by {done.activation_scale:g} to stay in fp16's range; results are the same"
    ]


def test_without_rescaling_that_decoder_is_refused(wild: Autoencoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rescale, "scale_for", lambda *_: 1.0)
    latents = [torch.randn(size.batch, 4, size.height, size.width) * 0.2 for size in wild.sizes]
    with pytest.raises(ExportError, match=r"vae_decoder: sample is not finite \(overflow\)"):
        wild.decoder("vae_decoder", "vae", latents)


def test_the_scale_is_a_power_of_two_that_leaves_room() -> None:
    assert rescale.scale_for(1000.0, forced=False) == 1.0
    assert rescale.scale_for(9000.0, forced=False) == 2.0**-2
    assert rescale.scale_for(2e6, forced=False) * 2e6 * rescale.HEADROOM <= rescale.LARGEST
    assert rescale.scale_for(1000.0, forced=True) == 1.0  # sixteen times that is far from the end of the range
