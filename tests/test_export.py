"""Two tiny random checkpoints, exported for real and compared with diffusers' own pipelines."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

import onnx  # noqa: E402
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: E402
from torch import nn  # noqa: E402

from vega_edge.bench.lora import TARGETS  # noqa: E402
from vega_edge.bundle import Bundle  # noqa: E402
from vega_edge.engines import open_engine  # noqa: E402
from vega_edge.errors import CheckpointError  # noqa: E402
from vega_edge.export import ExportReport, Progress, export_bundle, format_report  # noqa: E402
from vega_edge.export.checkpoint import load_module, open_checkpoint, published_name  # noqa: E402
from vega_edge.export.parts import load_packed  # noqa: E402
from vega_edge.lora import match_lora, read_lora  # noqa: E402
from vega_edge.manifest import attention_form, plain_form  # noqa: E402

from .lora_files import STYLES, write_loras  # noqa: E402

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
RANK, ALPHA, STRENGTH = 4, 10, 0.8


class Made(NamedTuple):
    source: Path
    report: ExportReport
    progress: list[Progress]
    noise: list[str]  # whatever was printed, logged or warned
    bundle: Bundle


def pipeline(source: Path) -> Any:
    kind = json.loads((source / "model_index.json").read_text())["_class_name"]
    cls = StableDiffusionXLPipeline if "XL" in kind else StableDiffusionPipeline
    extra = {} if "XL" in kind else {"safety_checker": None, "feature_extractor": None}
    pipe = cls.from_pretrained(source, dtype=torch.float32, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def loras(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One LoRA over all 14 kinds of modules and both text encoders, alpha unlike rank, in three spellings."""
    targets = {"unet": TARGETS, "text_encoder": CLIP_TARGETS, "text_encoder_2": CLIP_TARGETS}
    checkpoint = open_checkpoint(checkpoints["xl"])
    shapes = {part: checkpoint.weight_shapes(part) for part in targets}
    return write_loras(tmp_path_factory.mktemp("loras"), shapes, targets, RANK, ALPHA)


@pytest.fixture(scope="session")
def xl(checkpoints: dict[str, Path], loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """SDXL kind with a LoRA; half-precision storage, full-precision arithmetic: as the embedded model is shipped."""
    options = {
        "loras": [(loras["kohya"], STRENGTH)],
        "weights": "fp16",
        "defaults": {"steps": 4},
        "limits": {"steps": [1, 8]},
    }
    return made(checkpoints["xl"], tmp_path_factory.mktemp("bundles") / "tiny", **options)


@pytest.fixture(scope="session")
def sd(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """SD kind without a middle block, half precision throughout, with the tiny autoencoder."""
    source = checkpoints["sd"]
    return made(
        source,
        tmp_path_factory.mktemp("bundles") / "half",
        dtype="fp16",
        tiny_vae=source / "tiny",
        vae="tiny",
        name="other",
    )


def made(source: Path, out: Path, **options: Any) -> Made:
    progress: list[Progress] = []
    said: list[str] = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(
            logging.Logger,
            "callHandlers",
            lambda _, r: said.append(r.getMessage()) if r.levelno >= logging.WARNING else None,
        )
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            report = export_bundle(source, out, progress=progress.append, **options)
    said += [str(w.message) for w in warned] + printed.getvalue().splitlines()
    assert list(out.parent.iterdir()) == [out]
    return Made(source, report, progress, said, Bundle.open(out))


@pytest.fixture(scope="session")
def fused(checkpoints: dict[str, Path], loras: dict[str, Path]) -> Any:
    """diffusers' pipeline with the same LoRA fused by diffusers and PEFT, its weights then rounded to half."""
    pipe = fused_by_diffusers(checkpoints["xl"], loras["kohya"])
    for part in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        part.half().float()
    return pipe


def fused_by_diffusers(source: Path, lora: Path) -> Any:
    pipe = pipeline(source)
    pipe.load_lora_weights(lora)
    pipe.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"], lora_scale=STRENGTH)
    pipe.unload_lora_weights()
    return pipe


def opened(made: Made, graph: str) -> Any:
    part, _, name = graph.partition("/")
    path = made.bundle.graph(part, name or "model.onnx")
    return contextlib.closing(open_engine(path, "onnxruntime-cpu", threads=1))


def run(made: Made, graph: str, **feeds: Any) -> dict[str, NDArray[Any]]:
    with opened(made, graph) as engine:
        arrays = {k: np.asarray(v) for k, v in feeds.items()}
        return engine.run({k: v.astype(engine.inputs[k].dtype) for k, v in arrays.items()})


def error(got: NDArray[Any], wanted: Any) -> float:
    wanted = np.asarray(wanted)
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def noise(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("style", STYLES)
def test_lora_is_fused_as_diffusers_does(checkpoints: dict[str, Path], loras: dict[str, Path], style: str) -> None:
    checkpoint = open_checkpoint(checkpoints["xl"])
    parts = ("unet", "text_encoder", "text_encoder_2")
    matched = match_lora(read_lora(loras[style]), {part: checkpoint.weight_shapes(part) for part in parts})
    pipe = fused_by_diffusers(checkpoints["xl"], loras[style])
    for part in parts:
        layers = {name: [(layer, STRENGTH)] for name, layer in matched[part].items()}
        ours = load_packed(checkpoint, part, "fp32", layers).stored
        plain = dict(load_module(checkpoint, part).named_parameters())
        theirs = dict(getattr(pipe, part).named_parameters())
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            fused, wanted = weight.data.numpy(), theirs[name].detach().numpy()
            np.testing.assert_allclose(fused, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
            if published_name(part, name) in matched[part]:  # no change that one could overlook
                assert error(plain[name].numpy(), fused) > 0.01, name


def test_two_loras_add_up(
    checkpoints: dict[str, Path], loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(checkpoints["xl"])
    (name, layer), *_ = match_lora(
        read_lora(loras["peft"]), {p: checkpoint.weight_shapes(p) for p in checkpoint.parts}
    )["unet"].items()
    weights = [
        load_packed(checkpoint, "unet", "fp32", {name: pairs}).stored[name].data.numpy()
        for pairs in ([(layer, 0.0)], [(layer, 0.5), (layer, -2.0)])
    ]
    np.testing.assert_allclose(weights[1] - weights[0], layer.delta(weights[0].shape, -1.5), atol=1e-6)


def test_bundle_holds_what_it_should(xl: Made, loras: dict[str, Path], checkpoints: dict[str, Path]) -> None:
    path, manifest = xl.bundle.path, xl.bundle.manifest
    assert manifest is not None
    tokenizer = {"merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"}
    graph = {"config.json", "model.onnx", "model.onnx_data"}
    assert {p: {f.rpartition("/")[2] for f in part.files} for p, part in manifest.parts.items()} == {
        "config": {"model_index.json"},
        "scheduler": {"scheduler_config.json"},
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": graph,
        "text_encoder_2": graph,
        "unet": graph | {"model.mha.onnx"},
        "vae_encoder": graph | {"model.mha.onnx"},
        "vae_decoder": graph | {"model.mha.onnx", "pixels.onnx", "pixels.mha.onnx"},
    }
    for file in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "text_encoder_2/config.json",
        "tokenizer_2/special_tokens_map.json",
        "tokenizer/merges.txt",
    ):
        assert (path / file).read_bytes() == (xl.source / file).read_bytes()
    assert (path / "vae_encoder/config.json").read_bytes() == (xl.source / "vae/config.json").read_bytes()
    assert (path / "vae_decoder/config.json").read_bytes() == (xl.source / "vae/config.json").read_bytes()
    assert (manifest.name, manifest.dtype, manifest.weights) == ("tiny", "fp32", "fp16")
    assert manifest.created_by.startswith("vega-edge ")
    assert (manifest.defaults, manifest.limits) == ({"steps": 4}, {"steps": [1, 8]})
    (lora,) = manifest.source.loras
    digest = hashlib.sha256(loras["kohya"].read_bytes()).hexdigest()
    assert (lora.file, lora.sha256, lora.strength) == ("kohya.safetensors", digest, STRENGTH)
    assert (manifest.source.model, manifest.source.vae) == ("tiny-xl", "full")


def test_report_and_progress(xl: Made, sd: Made) -> None:
    parts = ("text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder", "unet")
    phases = [(part, phase) for part in parts for phase in ("load", "trace", "write", "check")]
    assert xl.progress == [Progress(*phase, i, len(phases)) for i, phase in enumerate(phases, 1)]
    manifest = xl.bundle.manifest
    assert manifest is not None and tuple(p.name for p in xl.report.parts) == parts
    for part in xl.report.parts:
        assert 0 < part.max_relative_error < part.tolerance
        assert part.max_relative_error == manifest.parts[part.name].max_relative_error
        on_disk = sum(f.stat().st_size for f in (xl.bundle.path / part.name).glob("*.onnx*"))
        assert part.bytes == on_disk and (part.pixel_levels is not None) == (part.name == "vae_decoder")
    text = format_report(xl.report)
    assert re.search(r"^unet +fp32, fp16 +0\.\d MB +\d+\.\d s  \d\.\de-0\d \(2e-04\)$", text, re.MULTILINE)
    assert re.search(r"^vae_decoder .* \(2e-04\), pixels \d of 255$", text, re.MULTILINE)
    assert "note: unet: 64 weights were rounded to fp16" in text  # those that the LoRA changed
    assert [p.dtype for p in sd.report.parts] == ["fp16"] * 4
    assert sd.report.notes == ("safety_checker is not exported: a bundle has no such part",)


def test_nothing_is_said_on_the_way(xl: Made, sd: Made) -> None:
    """torch's exporter, diffusers and transformers warn, log and draw progress bars by the dozen."""
    assert "\n".join(xl.noise + sd.noise) == ""


def hidden(width: int, kind: str) -> dict[str, str]:
    names = ("last_hidden_state", *(f"hidden_states.{i}" for i in range(3)))
    return dict.fromkeys(names, f"{kind}[batch, 77, {width}]")


LATENTS, IMAGE = "[batch, 4, height, width]", "[batch, 3, image_height, image_width]"
MOMENTS = {"latent_parameters": "float32[batch, 8, height, width]"}
PIXELS = {"pixels": "uint8[batch, image_height, image_width, 3]"}
XL_UNET = {
    "sample": f"float32{LATENTS}",
    "timestep": "float32[1]",
    "encoder_hidden_states": "float32[batch, sequence_length, 40]",
    "text_embeds": "float32[batch, 24]",
    "time_ids": "float32[batch, 6]",
}
SD_UNET = {
    "sample": f"float16{LATENTS}",
    "timestep": "float32[1]",
    "encoder_hidden_states": "float16[batch, sequence_length, 16]",
}
IDS = {"input_ids": "int64[batch, 77]"}


@pytest.mark.parametrize(
    ("which", "graph", "inputs", "outputs"),
    [
        ("xl", "text_encoder", IDS, {**hidden(16, "float32"), "pooler_output": "float32[batch, 16]"}),
        ("xl", "text_encoder_2", IDS, {**hidden(24, "float32"), "text_embeds": "float32[batch, 24]"}),
        ("xl", "unet", XL_UNET, {"out_sample": f"float32{LATENTS}"}),
        ("xl", "vae_encoder", {"sample": f"float32{IMAGE}"}, MOMENTS),
        ("xl", "vae_decoder", {"latent_sample": f"float32{LATENTS}"}, {"sample": f"float32{IMAGE}"}),
        ("xl", "vae_decoder/pixels.onnx", {"latent_sample": f"float32{LATENTS}"}, PIXELS),
        ("sd", "text_encoder", IDS, {**hidden(16, "float16"), "pooler_output": "float16[batch, 16]"}),
        ("sd", "unet", SD_UNET, {"out_sample": f"float16{LATENTS}"}),
        ("sd", "vae_decoder", {"latent_sample": f"float16{LATENTS}"}, {"sample": f"float16{IMAGE}"}),
        ("sd", "vae_decoder/pixels.onnx", {"latent_sample": f"float16{LATENTS}"}, PIXELS),
    ],
)
def test_names_types_and_axes(
    request: pytest.FixtureRequest, which: str, graph: str, inputs: dict[str, str], outputs: dict[str, str]
) -> None:
    with opened(request.getfixturevalue(which), graph) as engine:
        assert {name: str(spec) for name, spec in engine.inputs.items()} == inputs
        assert {name: str(spec) for name, spec in engine.outputs.items()} == outputs


def graphs(made: Made) -> Iterator[tuple[str, Any]]:
    for path in sorted(made.bundle.path.glob("*/*.onnx")):
        if path.name == plain_form(path.name):
            yield path.relative_to(made.bundle.path).as_posix(), onnx.load(path, load_external_data=False)


def test_graphs_are_plain_onnx_of_opset_18(xl: Made, sd: Made) -> None:
    """Attention and group normalization stay decomposed: TensorRT-RTX refuses the one in fp32."""
    for name, model in (*graphs(xl), *graphs(sd)):
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)] and not model.functions, name
        assert not {"Attention", "GroupNormalization"} & {node.op_type for node in model.graph.node}, name
        raw = model.SerializeToString()
        for trace in (
            b"site-packages",
            b".py",
            b'File "',
            b"torch.",
            str(Path.home()).encode(),
            str(xl.source.parent).encode(),
        ):
            assert trace not in raw, (name, trace)


def test_attention_forms_share_the_weights_and_are_listed(xl: Made, sd: Made) -> None:
    """The text encoders have none: their attention has a mask, and is traced as other nodes."""
    plain = dict(graphs(xl))
    forms = {name: attention_form(name) for name in plain if xl.bundle.has(attention_form(name))}
    assert set(forms) == {
        "unet/model.onnx",
        "vae_encoder/model.onnx",
        "vae_decoder/model.onnx",
        "vae_decoder/pixels.onnx",
    }
    for name, form in forms.items():
        model = onnx.load(xl.bundle.file(form), load_external_data=False)
        decomposed = plain[name].graph.node
        count = sum(node.op_type == "Softmax" for node in decomposed)
        assert [node.op_type for node in model.graph.node].count("MultiHeadAttention") == count > 0
        assert not any(node.op_type == "Softmax" for node in model.graph.node)
        stored, shared = ([i for i in m.graph.initializer if i.external_data] for m in (plain[name], model))
        assert shared == stored
    listed = sd.bundle.manifest
    assert listed is not None and "unet/model.mha.onnx" in listed.parts["unet"].files


def test_pixels_share_the_weights_file(xl: Made, sd: Made) -> None:
    for made in (xl, sd):
        stored = {name: [i for i in model.graph.initializer if i.external_data] for name, model in graphs(made)}
        weights, shared = stored["vae_decoder/model.onnx"], stored["vae_decoder/pixels.onnx"]
        assert weights and [w.SerializeToString() for w in shared] == [w.SerializeToString() for w in weights]
        inline = {n: sum(len(i.raw_data) for i in m.graph.initializer if not i.external_data) for n, m in graphs(made)}
        assert inline["vae_decoder/pixels.onnx"] - inline["vae_decoder/model.onnx"] < 50  # scale, halves, bounds, 255


def test_unet_is_diffusers_with_the_lora(xl: Made, fused: Any) -> None:
    """At a batch, size and text length that export neither traced nor checked."""
    feeds = {
        "sample": noise(5, 4, 6, 10),
        "timestep": torch.tensor([499.5]),
        "encoder_hidden_states": noise(5, 154, 40),
        "text_embeds": noise(5, 24),
        "time_ids": torch.tensor([[48.0, 80, 0, 8, 48, 80]] * 5),
    }
    with torch.no_grad():
        added = {k: feeds[k] for k in ("text_embeds", "time_ids")}
        wanted = fused.unet(
            feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
    assert error(run(xl, "unet", **feeds)["out_sample"], wanted) < 2e-5


def test_text_encoders_are_diffusers(xl: Made, fused: Any) -> None:
    """What SDXL's pipeline makes of three prompts, from the exported graphs and the exported tokenizers."""
    from tokenizers import Tokenizer

    prompts = ["A red cat, caffè!", "", "red " * 100]
    with torch.no_grad():
        embeds, _, pooled, _ = fused.encode_prompt(prompts, do_classifier_free_guidance=False)
    states = []
    for part, tokens, pad in (("text_encoder", "tokenizer", 517), ("text_encoder_2", "tokenizer_2", 0)):
        tokenizer = Tokenizer.from_file(str(xl.bundle.path / tokens / "tokenizer.json"))
        tokenizer.enable_truncation(77)
        tokenizer.enable_padding(length=77, pad_id=pad)
        out = run(xl, part, input_ids=[e.ids for e in tokenizer.encode_batch(prompts)])
        states.append(out["hidden_states.1"])  # the last but one of two layers
    assert error(np.concatenate(states, -1), embeds) < 1e-5
    assert error(out["text_embeds"], pooled) < 1e-5


def test_decoder_and_pixels_are_diffusers(xl: Made, checkpoints: dict[str, Path]) -> None:
    pipe = pipeline(checkpoints["xl"])
    latents = noise(3, 4, 5, 7) * 6  # some pixels beyond both ends of the range
    with torch.no_grad():
        sample = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    wanted = np.stack([np.asarray(i) for i in pipe.image_processor.postprocess(sample)])
    assert {0, 255} <= set(np.unique(wanted)) and wanted.std() > 20
    assert error(run(xl, "vae_decoder", latent_sample=latents / 0.5)["sample"], sample) < 2e-5
    pixels = run(xl, "vae_decoder/pixels.onnx", latent_sample=latents)["pixels"]
    assert pixels.shape == (3, 10, 14, 3)
    difference = np.abs(pixels.astype(int) - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 2e-3


def test_encoder_is_diffusers(xl: Made, checkpoints: dict[str, Path]) -> None:
    vae = pipeline(checkpoints["xl"]).vae
    picture = noise(3, 3, 12, 20).clamp(-1, 1)
    with torch.no_grad():
        wanted = vae.encode(picture).latent_dist.parameters
    assert error(run(xl, "vae_encoder", sample=picture)["latent_parameters"], wanted) < 2e-5


def test_half_precision(sd: Made, checkpoints: dict[str, Path]) -> None:
    pipe = pipeline(checkpoints["sd"])
    tiny = AutoencoderTiny.from_pretrained(checkpoints["sd"] / "tiny")
    ids = pipe.tokenizer(["a red cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    sample = noise(1, 4, 6, 10)
    with torch.no_grad():
        text = pipe.text_encoder(ids).last_hidden_state
        predicted = pipe.unet(sample, torch.tensor([961.0]), text).sample
        image = tiny.decode(sample).sample
    got = run(sd, "text_encoder", input_ids=ids)["last_hidden_state"]
    assert error(got, text) < 5e-3
    assert (
        error(run(sd, "unet", sample=sample, timestep=[961.0], encoder_hidden_states=text)["out_sample"], predicted)
        < 5e-3
    )
    assert error(run(sd, "vae_decoder", latent_sample=sample)["sample"], image) < 5e-3
    manifest = sd.bundle.manifest
    assert manifest is not None
    assert (manifest.name, manifest.dtype, manifest.weights, manifest.source.vae) == ("other", "fp16", "fp16", "tiny")
    assert sd.bundle.config("vae_decoder")["_class_name"] == "AutoencoderTiny"


@pytest.mark.parametrize("which", ["xl", "sd"])
def test_map_finds_every_weight_a_lora_may_touch(request: pytest.FixtureRequest, fused: Any, which: str) -> None:
    """Following the map leads to the very numbers, in storage that is half precision."""
    made: Made = request.getfixturevalue(which)
    pipe = fused if which == "xl" else pipeline(made.source)
    assert made.bundle.manifest is not None
    for part in [p for p in made.bundle.manifest.parts if p.startswith("text_encoder") or p == "unet"]:
        parameters = made.bundle.manifest.parts[part].parameters
        modules = {
            f"{n}.weight": m for n, m in getattr(pipe, part).named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
        }
        wanted = {published_name(part, name): m.weight.detach().numpy() for name, m in modules.items()}
        assert parameters is not None and parameters.keys() == wanted.keys()
        assert len({p.initializer for p in parameters.values()}) == len(parameters)
        stored = {i.name: i for i in onnx.load(made.bundle.graph(part)).graph.initializer}
        for name, place in parameters.items():
            array = onnx.numpy_helper.to_array(stored[place.initializer])
            assert array.size <= 64 or array.dtype == np.float16, name
            np.testing.assert_allclose(
                array.T if place.transposed else array, wanted[name], atol=2e-3, rtol=1e-3, err_msg=name
            )
    if which == "xl":
        unet: Mapping[str, Any] = made.bundle.manifest.parts["unet"].parameters or {}
        assert [t for t in TARGETS if not any(name.endswith(f".{t}.weight") for name in unet)] == []
        assert any(place.transposed for place in unet.values()) and not all(place.transposed for place in unet.values())


def test_lora_of_another_architecture(checkpoints: dict[str, Path], loras: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        export_bundle(checkpoints["sd"], tmp_path / "bundle", loras=[(loras["peft"], 1.0)])
    text = (
        rf"LoRA {re.escape(str(loras['peft']))}: \d+ of its 80 modules fit nothing in this checkpoint, the first is \S+"
    )
    assert re.match(text, str(caught.value))
    assert list(tmp_path.iterdir()) == []
