"""One file that every installed engine passes, on tiny graphs made here; then what is said when one can't be had."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vega_edge import engines
from vega_edge.errors import EngineError, UsageError

F32, I64, U8, F16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8, TensorProto.FLOAT16
STATES = {state.name: state for state in engines.available()}


@pytest.fixture(params=list(engines.ENGINES))
def name(request, monkeypatch):
    """Every engine; one that this machine does not have is skipped, and the reason says why."""
    if not STATES[request.param].ok:
        pytest.skip(STATES[request.param].why_not)
    if request.param.startswith("tensorrt"):
        monkeypatch.setattr(engines, "open_engine", built_first(engines.open_engine))
    return request.param


def built_first(open_engine):
    """Those that run plans: one is built of the graph as it is now, for every free axis from 1 to 128."""
    from vega_edge.engines.plan_store import Plan, PlanStore, graph_hash
    from vega_edge.export.trt_library import check_targets, load_library
    from vega_edge.export.trt_network import Job, build_plan, read_inputs

    def open_built(path, name, **options):
        if not path.is_file():  # nothing to build of: what is said is the opening's
            return open_engine(path, name, **options)
        library = load_library(name)
        targets = check_targets(library, (), "graph")
        free = {n: shape for n, shape in read_inputs(library, path).items() if -1 in shape}
        ranges = {
            n: tuple(tuple(size if axis < 0 else axis for axis in shape) for size in (1, 4, 128))
            for n, shape in free.items()
        }
        graph = f"{path.parent.name}/{path.name}"
        plan = Plan("", "", 0, graph, graph_hash(path), name, library.version, targets, ranges)
        PlanStore(path.parent.parent).add(plan, build_plan(Job(library, path, ranges, targets)).content, 0)
        return open_engine(path, name, **options)

    return open_built


def value(name, dtype, *shape):
    return helper.make_tensor_value_info(name, dtype, shape)


def save(path, nodes, inputs, outputs, **initializers):
    tensors = [numpy_helper.from_array(array, key) for key, array in initializers.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def affine(tmp_path):
    """y = x * 2 + b, x float32[batch, 4, height, width]."""
    nodes = [helper.make_node("Mul", ["x", "two"], ["x2"]), helper.make_node("Add", ["x2", "b"], ["y"])]
    inputs = [value("x", F32, "batch", 4, "height", "width"), value("b", F32, 1)]
    outputs = [value("y", F32, "batch", 4, "height", "width")]
    return save(tmp_path / "unet" / "model.onnx", nodes, inputs, outputs, two=np.float32([2]))


def feeds(batch=1, height=2, width=3):
    x = np.arange(batch * 4 * height * width, dtype=np.float32).reshape(batch, 4, height, width)
    return {"x": x, "b": np.float32([0.5])}


def assert_same(name, got, want):
    """Equal, but for bf16, whose 8 bits of mantissa round by up to 2^-9 at each of the graph's two operations."""
    np.testing.assert_allclose(got, want, rtol=2**-8 if name == "openvino-bf16" else 0)


def refused(exception, call, *args, **kwargs):
    with pytest.raises(exception) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# what every engine does


def test_runs_every_shape(name, affine):
    engine = engines.open_engine(affine, name)
    for shape in [(1, 2, 3), (2, 5, 1), (1, 2, 3), (3, 8, 8)]:
        given = feeds(*shape)
        result = engine.run(given)
        assert list(result) == ["y"]
        assert result["y"].dtype == np.float32
        assert_same(name, result["y"], given["x"] * 2 + given["b"])


def test_specs(name, affine):
    engine = engines.open_engine(affine, name)
    unnamed = name.startswith(("openvino", "tensorrt"))  # they keep no names of axes
    free = (None, None, None) if unnamed else ("batch", "height", "width")
    wanted = engines.Spec(np.dtype("float32"), (free[0], 4, *free[1:]))
    assert engine.inputs == {"x": wanted, "b": engines.Spec(np.dtype("float32"), (1,))}
    assert engine.outputs["y"].dtype == np.float32
    assert len(engine.outputs["y"].shape) == 4


def test_scalar_input(name, tmp_path):
    graph = save(tmp_path / "m.onnx", [helper.make_node("Neg", ["t"], ["y"])], [value("t", F32)], [value("y", F32)])
    result = engines.open_engine(graph, name).run({"t": np.array(3, np.float32)})
    assert result["y"].shape == ()
    assert result["y"] == -3


def test_gather_by_int64(name, tmp_path):
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    inputs, outputs = [value("input_ids", I64, "batch", 5)], [value("rows", F32, "batch", 5, 4)]
    engine = engines.open_engine(save(tmp_path / "m.onnx", nodes, inputs, outputs, table=table), name)
    ids = np.array([[0, 2, 1, 1, 0], [2, 2, 2, 0, 1]])
    assert engine.inputs["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(engine.run({"input_ids": ids})["rows"], table[ids])


def test_uint8_output(name, tmp_path):
    cast = helper.make_node("Cast", ["x"], ["pixels"], to=U8)
    path = save(tmp_path / "m.onnx", [cast], [value("x", F32, "n")], [value("pixels", U8, "n")])
    result = engines.open_engine(path, name).run({"x": np.float32([0, 1, 128, 255])})
    assert result["pixels"].dtype == np.uint8
    assert result["pixels"].tolist() == [0, 1, 128, 255]


def test_float16_in_and_out(name, tmp_path):
    path = save(
        tmp_path / "m.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [value("x", F16, "n")],
        [value("y", F16, "n")],
    )
    result = engines.open_engine(path, name).run({"x": np.float16([0.5, -3])})
    assert result["y"].dtype == np.float16
    assert result["y"].tolist() == [1, -6]


def chain(path):
    """A chain whose every link is an output, as a text encoder's hidden states are; the first and last do nothing."""
    nodes = [
        helper.make_node("Identity", ["x"], ["hidden_states.0"]),
        helper.make_node("Neg", ["hidden_states.0"], ["hidden_states.1"]),
        helper.make_node("Add", ["hidden_states.1", "one"], ["hidden_states.2"]),
        helper.make_node("Identity", ["hidden_states.2"], ["last_hidden_state"]),
    ]
    names = ["last_hidden_state", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
    return save(path, nodes, [value("x", F32, "n")], [value(n, F32, "n") for n in names], one=np.float32([1]))


def test_many_outputs_by_name(name, tmp_path):
    engine = engines.open_engine(chain(tmp_path / "m.onnx"), name)
    result = engine.run({"x": np.float32([1, 5])})
    assert {key: array.tolist() for key, array in result.items()} == {
        "last_hidden_state": [0, -4],
        "hidden_states.0": [1, 5],
        "hidden_states.1": [-1, -5],
        "hidden_states.2": [0, -4],
    }
    assert list(engine.outputs) == list(result)


def test_returned_arrays_belong_to_the_caller(name, tmp_path):
    engine = engines.open_engine(chain(tmp_path / "m.onnx"), name)
    x = np.float32([1, 5])
    first = engine.run({"x": x})
    for array in first.values():
        array += 100  # writable, and shared neither with the feed nor with each other
    assert x.tolist() == [1, 5]
    kept = {key: array.copy() for key, array in first.items()}
    second = engine.run({"x": np.float32([7, 8])})
    assert second["hidden_states.2"].tolist() == [-6, -7]
    engine.close()
    for key, array in first.items():
        np.testing.assert_array_equal(array, kept[key])


def test_a_constant_output_is_not_the_graphs_own(name, tmp_path):
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Identity", ["c"], ["constant"])]
    outputs = [value("y", F32, "n"), value("constant", F32, 2)]
    path = save(tmp_path / "m.onnx", nodes, [value("x", F32, "n")], outputs, c=np.float32([3, 4]))
    engine = engines.open_engine(path, name)
    engine.run({"x": np.float32([1])})["constant"][:] = 0
    assert engine.run({"x": np.float32([1])})["constant"].tolist() == [3, 4]


def test_feeds_in_any_memory_order(name, affine):
    engine = engines.open_engine(affine, name)
    given = feeds(2, 3, 4)
    want = given["x"] * 2 + given["b"]
    transposed = np.ascontiguousarray(given["x"].T).T
    strided = np.repeat(given["x"], 2, axis=3)[..., ::2]
    readonly = given["x"].copy()
    readonly.flags.writeable = False
    for x in (transposed, strided, readonly):
        assert_same(name, engine.run({"x": x, "b": given["b"]})["y"], want)


def test_a_writable_feed_changed_in_place_is_seen(name, affine):
    engine = engines.open_engine(affine, name)
    given = feeds()
    engine.run(given)
    given["x"][:] = 9
    assert np.all(engine.run(given)["y"] == 18.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "input 'x' is missing; inputs: x, b"),
        ({"z": np.zeros(1)}, "unknown input 'z'; inputs: x, b"),
        ({"x": np.zeros((1, 4, 16, 16))}, "input 'x' wants {spec}, got float64[1, 4, 16, 16]"),
        ({"x": np.zeros((1, 4, 2, 2), ">f4")}, "input 'x' wants {spec}, got >f4[1, 4, 2, 2]"),
        ({"x": np.zeros((4, 2, 2), "f4")}, "input 'x' wants {spec}, got float32[4, 2, 2]"),
        ({"x": np.zeros((1, 4, 2), "f4")}, "input 'x' wants {spec}, got float32[1, 4, 2]"),
        ({"x": np.zeros((1, 3, 2, 2), "f4")}, "input 'x' wants {spec}, got float32[1, 3, 2, 2]"),
        ({"b": np.float32(1)}, "input 'b' wants float32[1], got float32, not an array"),
        ({"b": [0.5]}, "input 'b' wants float32[1], got list, not an array"),
    ],
)
def test_refuses_feeds_that_do_not_fit(name, affine, change, message):
    engine = engines.open_engine(affine, name)
    given = {key: array for key, array in {**feeds(), **change}.items() if array is not None}
    message = message.format(spec=engine.inputs["x"])
    assert refused(EngineError, engine.run, given) == f"engine {name}, unet/model.onnx: {message}"


def test_the_wanted_shape_names_free_dimensions(affine):
    pytest.importorskip("onnxruntime")
    engine = engines.open_engine(affine, "onnxruntime-cpu")
    assert str(engine.inputs["x"]) == "float32[batch, 4, height, width]"
    assert str(engines.Spec(np.dtype("int64"), (None, 77))) == "int64[?, 77]"


def test_close_is_final_and_may_be_repeated(name, affine):
    engine = engines.open_engine(affine, name)
    engine.close()
    engine.close()
    message = refused(EngineError, engine.run, feeds())
    assert message == f"engine {name}, unet/model.onnx: run after close; open it again"
    assert list(engine.inputs) == ["x", "b"]


def test_a_failure_while_running_is_one_line(name, tmp_path, capfd):
    inputs = [value("x", F32, "n"), value("y", F32, "m")]
    path = save(
        tmp_path / "vae" / "m.onnx", [helper.make_node("Add", ["x", "y"], ["z"])], inputs, [value("z", F32, "k")]
    )
    engine = engines.open_engine(path, name)
    message = refused(EngineError, engine.run, {"x": np.zeros(2, "f4"), "y": np.zeros(3, "f4")})
    why = {
        "onnxruntime": "Attempting to broadcast an axis by a dimension other than 1. 2 by 3",
        "openvino": "Eltwise shape infer input shapes dim index: 0 mismatch",
        "tensorrt": "",  # in whose words nobody has seen yet
    }[name.split("-")[0]]
    assert message.startswith(f"engine {name}, vae/m.onnx: ")
    assert message.endswith(why)
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")  # nor does the backend print it a second time
    good = engine.run({"x": np.ones(2, "f4"), "y": np.ones(2, "f4")})
    assert good["z"].tolist() == [2, 2]


@pytest.mark.parametrize("content", [b"", b"junk", "cut", "no weights"])
def test_a_damaged_graph_is_one_line(name, affine, content, capfd):
    if name.startswith("tensorrt"):
        pytest.skip("its plans are built of graphs, and the parser says it: tests/test_trt_build.py")
    if content == "no weights":
        onnx.save(onnx.load(affine), affine, save_as_external_data=True, location="data", size_threshold=0)
        (affine.parent / "data").unlink()
    else:
        affine.write_bytes(affine.read_bytes()[:-50] if content == "cut" else content)
    message = refused(EngineError, engines.open_engine, affine, name)
    assert message.startswith(f"engine {name} can't open {affine}: ")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_no_such_file(name, tmp_path):
    path = tmp_path / "model.onnx"
    message = refused(EngineError, engines.open_engine, path, name)
    assert message == f"engine {name} can't open {path}: there is no such file"


def test_a_type_that_numpy_lacks_is_refused(name, tmp_path):
    bf16 = TensorProto.BFLOAT16
    cast = helper.make_node("Cast", ["x"], ["y"], to=F32)
    path = save(tmp_path / "m.onnx", [cast], [value("x", bf16, 2)], [value("y", F32, 2)])
    message = refused(EngineError, engines.open_engine, path, name)
    if name.startswith("tensorrt") and "'x' is " not in message:  # refused where the plan is built
        return
    assert message.startswith(f"engine {name} can't open {path}: 'x' is ")
    assert ", which is not among: " in message


def test_a_path_of_any_letters(name, tmp_path):
    path = chain(tmp_path / "modèle 模型 a" / "grâph.onnx")
    result = engines.open_engine(path, name, cache=tmp_path / "cäche").run({"x": np.float32([1])})
    assert result["last_hidden_state"].tolist() == [0]


def test_threads(name, affine):
    given = feeds()
    result = engines.open_engine(affine, name, threads=1).run(given)
    assert_same(name, result["y"], given["x"] * 2 + given["b"])
    message = refused(UsageError, engines.open_engine, affine, name, threads=-1)
    assert message == "threads must be 0 (the engine decides) or more, not -1"


def test_a_cache_never_gives_old_weights(name, tmp_path):
    """OpenVINO's own key, when it is given a path, does not see a change in the external weights."""
    path, cache = tmp_path / "unet" / "model.onnx", tmp_path / "cache"
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    inputs, outputs = [value("x", F32, "n", 64)], [value("y", F32, "n", 64)]
    save(path, nodes, inputs, outputs, w=np.ones((64, 64), np.float32))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="data", size_threshold=0)
    x = np.ones((1, 64), np.float32)
    for w in (1, 1, 2):
        (path.parent / "data").write_bytes(np.full((64, 64), w, np.float32).tobytes())
        assert np.all(engines.open_engine(path, name, cache=cache).run({"x": x})["y"] == 64 * w)
    if name.startswith("openvino"):  # a folder of its own for each of the two contents
        assert [(f.name.rpartition("-")[0], len(list(f.iterdir()))) for f in cache.iterdir()] == [(name, 2)]


# never less than was asked for


def test_onnxruntime_must_give_the_provider_that_was_asked_for(affine, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    given = {}

    def open_session(path, options, **settings):
        given.update(settings, threads=options.intra_op_num_threads)
        given["providers"] = [name for name, _ in settings["providers"]]
        return session

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", open_session)
    monkeypatch.setattr(engines.choice, "missing_here", lambda name: None)
    message = refused(EngineError, engines.open_engine, affine, "onnxruntime-cuda", threads=3)
    want = (
        "asked for CUDAExecutionProvider, got CPUExecutionProvider: CUDA's or cuDNN's libraries are missing, or are not of "
        f'the version that onnxruntime {ort.__version__} wants; pip install "vega-edge[cuda]" brings them'
    )
    assert message == f"engine onnxruntime-cuda can't open {affine}: {want}"
    assert given == {"providers": ["CUDAExecutionProvider"], "enable_fallback": 0, "threads": 3}


def test_onnxruntime_without_the_provider(affine, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(engines.choice, "missing_here", lambda name: None)
    message = refused(EngineError, engines.open_engine, affine, "onnxruntime-cuda")
    why = f"onnxruntime {ort.__version__} has no CUDAExecutionProvider; it has: CPUExecutionProvider"
    assert message == f"engine onnxruntime-cuda can't open {affine}: {why}"


def openvino_module():
    if not STATES["openvino"].ok:
        pytest.skip(STATES["openvino"].why_not)
    from vega_edge.engines import openvino

    return openvino


def test_there_is_one_core_for_the_process():
    ours = openvino_module()
    first = ours.core()
    ours.device("f32")
    assert ours.core() is first
    references = sys.getrefcount(first)
    ours.core.cache_clear()
    assert sys.getrefcount(first) == references - 1 > 2  # one is never given back
    assert ours.core() is not first


def test_bf16_on_a_cpu_without_it(affine, monkeypatch):
    ours = openvino_module()
    real = ours.core()
    cpu = real.get_property("CPU", "FULL_DEVICE_NAME")

    class Core:
        compile_model = real.compile_model

        def get_property(self, device, key):
            return ["FP32", "INT8"] if key == "OPTIMIZATION_CAPABILITIES" else real.get_property(device, key)

    monkeypatch.setattr(ours, "core", Core)
    why = f"this CPU ({cpu}) has no bf16 arithmetic; use openvino"
    message = refused(EngineError, engines.open_engine, affine, "openvino-bf16")
    assert message == f"engine openvino-bf16 can't open {affine}: {why}"
    state = next(state for state in engines.available() if state.name == "openvino-bf16")
    assert (state.ok, state.why_not) == (False, why)


def test_openvino_must_give_the_precision_that_was_asked_for(affine, monkeypatch):
    ours = openvino_module()
    real = ours.core()
    given = {}

    class Core:
        get_property = real.get_property

        def compile_model(self, model, device, settings):
            given.update(settings, device=device)
            kind = SimpleNamespace(get_type_name=lambda: "f16")
            return SimpleNamespace(get_property=lambda key: kind)

    monkeypatch.setattr(ours, "core", Core)
    message = refused(EngineError, engines.open_engine, affine, "openvino", threads=3)
    assert message == f"engine openvino can't open {affine}: asked for f32 arithmetic, got f16"
    assert given == {
        "device": "CPU",
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": 3,
    }


def test_bf16_is_bf16_and_near_float32(tmp_path):
    if not STATES["openvino-bf16"].ok:
        pytest.skip(STATES["openvino-bf16"].why_not)
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((2, 64, 64)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [value("x", F32, "n", 64)], [value("y", F32, "n", 64)], w=w)
    exact = engines.open_engine(path, "openvino").run({"x": x})["y"]
    rounded = engines.open_engine(path, "openvino-bf16").run({"x": x})["y"]
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 1e-2  # 8 bits of mantissa round by up to 2^-9


# all of them together


def test_auto_opens_what_it_chose(affine, caplog):
    with caplog.at_level(logging.INFO, "vega_edge"):
        engine = engines.open_engine(affine)
    assert len(caplog.records) == 1
    assert engine.run(feeds())["y"].shape == (1, 4, 2, 3)


def test_importing_engines_loads_no_backend():
    code = (
        "import sys, vega_edge.engines, vega_edge.bundle, vega_edge.doctor; vega_edge.engines.ENGINES; "
        "print([m for m in ('onnxruntime', 'openvino', 'torch', 'onnx') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_choosing_loads_no_backend():
    code = (
        "import sys; from vega_edge import engines; engines.choose_engine(); "
        "print([m for m in ('onnxruntime', 'openvino', 'torch') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_available_names_every_engine_once():
    assert list(STATES) == list(engines.ENGINES)
    for state in STATES.values():
        assert state.ok == bool(state.version and state.device) == (not state.why_not)


def test_unknown_engine(affine):
    assert refused(UsageError, engines.open_engine, affine, "openvin") == (
        "unknown engine 'openvin'; did you mean 'openvino'? "
        "there are: auto, onnxruntime-cpu, onnxruntime-cuda, onnxruntime-tensorrt, openvino, openvino-bf16, tensorrt, "
        "tensorrt-rtx"
    )
