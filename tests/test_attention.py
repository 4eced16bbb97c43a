"""Graphs with MultiHeadAttention nodes: what is recognized, that they compute the same, and which engine is given them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from vega_edge.bundle import Bundle, describe_files, write_manifest  # noqa: E402
from vega_edge.engines import open_engine, takes_attention_form, tiles_attention  # noqa: E402
from vega_edge.export.attention import fuse, save_attention  # noqa: E402
from vega_edge.manifest import Manifest, Part, Source, attention_form, plain_form  # noqa: E402
from vega_edge.models import find_bundle  # noqa: E402
from vega_edge.onnx_file import read_weights  # noqa: E402
from vega_edge.runtime import parts  # noqa: E402
from vega_edge.runtime.parts import Parts  # noqa: E402

HEADS, WIDTH, TOKENS, TEXT = 3, 8, 20, 7


def attention(**changes: Any) -> Any:
    """q [1, 20, 24], k and v [1, 7, 24] -> y, as torch's exporter writes it; `changes` spoil one step."""
    steps = {
        "scale of k": "c", "mask": False, "axes of k": [0, 2, 1], "axes of v": [0, 2, 1, 3],
        "axes of y": [0, 2, 1, 3], "joined": "q joined", "heads of k": HEADS, "uses": 1, **changes
    }  # fmt: skip
    shape = {"q": TOKENS, "k": TEXT, "v": TEXT}
    nodes, axes = [], {"q": [0, 2, 1, 3], "k": [0, 2, 1, 3], "v": steps["axes of v"]}
    for x in "qkv":
        nodes.append(helper.make_node("Reshape", [x, f"{x} split"], [f"{x}1"]))
        nodes.append(helper.make_node("Transpose", [f"{x}1"], [f"{x}2"], perm=axes[x]))
    nodes += [
        helper.make_node("Mul", ["q2", "c"], ["q3"]),
        helper.make_node("Reshape", ["k2", "flat"], ["k3"]),
        helper.make_node("Transpose", ["k3"], ["k4"], perm=steps["axes of k"]),
        helper.make_node("Reshape", ["k4", "back"], ["k5"]),
        helper.make_node("Mul", ["k5", steps["scale of k"]], ["k6"]),
        helper.make_node("MatMul", ["q3", "k6"], ["logits"]),
        *([helper.make_node("Add", ["logits", "mask"], ["masked"])] if steps["mask"] else []),
        helper.make_node("Softmax", ["masked" if steps["mask"] else "logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v2"], ["o1"], name="the product"),
        helper.make_node("Transpose", ["o1"], ["o2"], perm=steps["axes of y"]),
        helper.make_node("Reshape", ["o2", steps["joined"]], ["y"]),
    ]
    constants: dict[str, Any] = {f"{x} split": np.int64([1, n, HEADS, WIDTH]) for x, n in shape.items()}
    constants["k split"] = np.int64([1, TEXT, steps["heads of k"], -1])
    constants["kept split"] = np.int64([1, TOKENS, HEADS, WIDTH])
    constants |= {"flat": np.int64([HEADS, TEXT, WIDTH]), "back": np.int64([1, HEADS, WIDTH, TEXT])}
    constants |= {"q joined": np.int64([1, TOKENS, HEADS * WIDTH]), "c": np.float32([0.7]), "d": np.float32([0.6])}
    constants["mask"] = np.where(np.arange(TEXT) < TEXT - 2, 0, -1e9).astype(np.float32)[None, None].repeat(TOKENS, 1)
    value = lambda name, n: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, n, HEADS * WIDTH])  # noqa: E731
    outputs = [value("y", TOKENS)]
    if steps["uses"] > 1:
        outputs.append(helper.make_tensor_value_info("weights", TensorProto.FLOAT, [1, HEADS, TOKENS, TEXT]))
        nodes.append(helper.make_node("Identity", ["weights"], ["seen"]))
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", [value(x, n) for x, n in shape.items()], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def feeds() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    shapes = {"q": TOKENS, "k": TEXT, "v": TEXT}
    return {x: draw.standard_normal((1, n, HEADS * WIDTH)).astype(np.float32) for x, n in shapes.items()}


def relative(got: Any, want: Any) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())


def test_one_node_that_computes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "unet" / "model.onnx"
    path.parent.mkdir()
    onnx.save(attention(), path)
    before = path.read_bytes()
    made = save_attention(path)
    assert made == path.with_name("model.mha.onnx") and path.read_bytes() == before
    model = onnx.load(made)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("com.microsoft", "MultiHeadAttention")
    assert (list(node.input), list(node.output)) == (["q", "k", "v"], ["y"])
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 18), ("com.microsoft", 1)}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"num_heads": HEADS, "scale": pytest.approx(0.49)}
    want, got = (open_engine(graph, "onnxruntime-cpu").run(feeds())["y"] for graph in (path, made))
    assert relative(got, want) <= 1e-5


@pytest.mark.parametrize(
    "spoilt",
    [
        {"scale of k": "d"},
        {"mask": True},
        {"axes of k": [1, 2, 0]},
        {"axes of v": [0, 1, 2, 3]},
        {"axes of y": [0, 1, 2, 3]},
        {"joined": "kept split"},
        {"heads of k": 2 * HEADS},
        {"uses": 2},
    ],
    ids=str,
)
def test_what_is_not_quite_it_stays(spoilt: dict[str, Any], tmp_path: Path) -> None:
    model = ir.from_proto(attention(**spoilt))
    before = [node.op_type for node in model.graph]
    assert fuse(model) == 0 and [node.op_type for node in model.graph] == before and model.opset_imports[""] == 18
    onnx.save(attention(**spoilt), tmp_path / "model.onnx")
    assert save_attention(tmp_path / "model.onnx") is None
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's, with its attention form beside it."""
    folder = tmp_path_factory.mktemp("attention") / "unet"
    shutil.copytree(find_bundle("demo-vegart") / "unet", folder)
    made = save_attention(folder / "model.onnx")
    assert made is not None
    return folder / "model.onnx"


def test_a_lora_fits_both_forms(unet: Path) -> None:
    """The same names, places and values, so that what replaces a weight in one replaces it in the other."""
    fused = unet.with_name(attention_form(unet.name))
    assert {name: w for name, w in read_weights(unet).items() if w.external} == {
        name: w for name, w in read_weights(fused).items() if w.external
    }
    draw = np.random.default_rng(1)
    listed = Bundle.open(find_bundle("demo-vegart"), verify=False).manifest
    assert listed is not None
    names = [p.initializer for n, p in (listed.parts["unet"].parameters or {}).items() if ".attn" in n]
    weights = read_weights(unet)
    patched = {name: (draw.standard_normal(weights[name].shape) / 8).astype(np.float16) for name in names}
    assert len(patched) > 100
    outputs = []
    for graph, replaced in ((unet, {}), (unet, patched), (fused, patched)):
        engine = open_engine(graph, "onnxruntime-cpu", weights=replaced)
        outputs.append(predicted(engine))
    plain, want, got = outputs
    assert relative(got, want) <= 1e-5
    assert relative(plain, want) > 1e-2


def predicted(engine: Any) -> Any:
    """What a U-Net gives for random inputs, the same ones each time."""
    draw = np.random.default_rng(2)
    sizes = {"batch": 2, "height": 8, "width": 16, "sequence_length": 77}
    given = {
        name: draw.standard_normal([sizes.get(str(n), n) for n in spec.shape]).astype(spec.dtype)
        for name, spec in engine.inputs.items()
    }
    return engine.run(given)["out_sample"]


def test_the_prepared_graph_of_little_memory_has_the_same_form(unet: Path, tmp_path: Path) -> None:
    fused = unet.with_name(attention_form(unet.name))
    outputs = []
    for options in ({}, {"low_memory": True, "cache": tmp_path}):
        with contextlib.closing(open_engine(fused, "onnxruntime-cpu", **options)) as engine:
            outputs.append(predicted(engine))
    assert relative(outputs[1], outputs[0]) <= 1e-5
    (prepared,) = tmp_path.rglob("*.onnx")
    kinds = [node.op_type for node in onnx.load(prepared, load_external_data=False).graph.node]
    assert kinds.count("MultiHeadAttention") > 0 and "Softmax" not in kinds


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """unet with both forms, vae_decoder with one."""
    for file in ("model_index.json", "unet/model.onnx", "unet/model.mha.onnx", "vae_decoder/model.onnx"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    listed = {part: Part(describe_files(tmp_path, part)) for part in ("config", "unet", "vae_decoder")}
    write_manifest(tmp_path, Manifest("x", "test", "fp32", "fp32", Source("x"), {}, {}, listed))
    return Bundle.open(tmp_path)


def opened(bundle: Bundle, engine: str, file: str, monkeypatch: pytest.MonkeyPatch) -> str:
    paths: list[Path] = []

    def open_engine(path: Path, *arguments: Any, **options: Any) -> Any:
        paths.append(path)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(parts, "open_engine", open_engine)
    with Parts(bundle, engine).part(file).running():
        pass
    return paths[0].relative_to(bundle.path).as_posix()


@pytest.mark.parametrize(
    ("engine", "file", "given"),
    [
        ("onnxruntime-cpu", "unet/model.onnx", "unet/model.mha.onnx"),
        ("onnxruntime-cuda", "unet/model.onnx", "unet/model.mha.onnx"),
        ("onnxruntime-cpu", "vae_decoder/model.onnx", "vae_decoder/model.onnx"),  # has no other
        ("onnxruntime-tensorrt", "unet/model.onnx", "unet/model.onnx"),
        ("openvino", "unet/model.onnx", "unet/model.onnx"),
        ("tensorrt-rtx", "unet/model.onnx", "unet/model.onnx"),
    ],
)
def test_which_engine_is_given_it(
    bundle: Bundle, engine: str, file: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert opened(bundle, engine, file, monkeypatch) == given


def test_one_that_the_manifest_does_not_list_is_not_opened(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.path / "vae_decoder" / "model.mha.onnx").write_text("from elsewhere")
    assert opened(bundle, "onnxruntime-cuda", "vae_decoder/model.onnx", monkeypatch) == "vae_decoder/model.onnx"


def test_names() -> None:
    assert attention_form("vae_decoder/pixels.onnx") == "vae_decoder/pixels.mha.onnx"
    assert plain_form("vae_decoder/pixels.mha.onnx") == plain_form("vae_decoder/pixels.onnx")
    assert not takes_attention_form("openvino")


def beyond(graph: Path, given: dict[str, Any]) -> int:
    """Bytes that running a graph takes beyond what is resident once it is open, in a process of its own."""
    code = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from vega_edge.engines import open_engine\n"
        "status = lambda key: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key)) * 1024\n"
        "opened, feeds = open_engine(Path(sys.argv[1]), 'onnxruntime-cpu'), dict(np.load(sys.argv[2]))\n"
        "before = status('VmRSS')\n"
        "opened.run(feeds)\n"
        "print(status('VmHWM') - before)\n"
    )
    np.savez(graph.parent / "feeds.npz", **given)
    command = [sys.executable, "-c", code, str(graph), str(graph.parent / "feeds.npz")]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from Linux's /proc")
def test_scores_are_never_all_in_memory(tmp_path: Path) -> None:
    """SD's first level at 512 px, one sample: its scores are 4096 x 4096 for each of 8 heads, 537 MB."""
    if not tiles_attention("onnxruntime-cpu"):
        pytest.skip("onnxruntime has no tiled attention where the system does not report a level 2 cache")
    from vega_edge.bench.attention import feeds as layer_feeds
    from vega_edge.bench.attention import make

    layer = (4096, 8, 40)
    plain, fused = make(*layer, tmp_path).values()
    assert beyond(plain, layer_feeds(*layer)) > 500e6
    assert beyond(fused, layer_feeds(*layer)) < 60e6


@pytest.mark.parametrize("engine", ["onnxruntime-cpu"])
def test_an_integer_graph_has_a_second_form_that_opens(engine: str, tmp_path: Path) -> None:
    """One layer of Small-SD's width, rounded to integers as the exporter does it.

    As ONNX `Attention` nodes of opset 23 it could not be opened: onnxruntime rounded the softmax inside to uint8 with
    nodes that say int8.
    """
    pytest.importorskip("torch")
    from .precision_graphs import attention_layer

    plain, given, wanted = attention_layer(tmp_path, tokens=96, heads=8, width=40)
    fused = save_attention(plain)
    assert fused is not None
    for graph in (plain, fused):
        with contextlib.closing(open_engine(graph, engine)) as opened:
            assert relative(opened.run(given)["y"], wanted) < 0.05, graph
