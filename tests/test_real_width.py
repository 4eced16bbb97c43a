"""Networks as wide as the models' own, and shallow, through all that a user does with a bundle, in every precision.

One export of `real_width.ordinary` is in the ordinary tests, with integer arithmetic, eight-bit weights, LoRAs and a tiny
autoencoder: four minutes of a core. The others of that table, the full product, weights beyond 2 GB, and engines for every
size that a bundle allows are in make test-full.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from vega_edge.bundle import Bundle
from vega_edge.cli import main
from vega_edge.engines import available, runs_on_cpu
from vega_edge.engines.dtypes import PRECISIONS, refusal
from vega_edge.export.check import tolerance
from vega_edge.runtime.pipeline import Pipeline, Result
from vega_edge.verify import verify

from .cpu_units import saturates
from .full import FULL, IN_FULL
from .real_width import (
    KINDS,
    ORDINARY,
    Case,
    is_sdxl,
    names_precision,
    ordinary,
    product,
    shallow,
    shapes_of,
    write_loras,
    write_picture,
    write_tiny_vae,
)  # fmt: skip

NEEDS = pytest.mark.needs(memory_gb=8, disk_gb=10)
CASES = ordinary()
EVERY_TIME = CASES[-1:]
SIDE, SMALL = 256, 128  # px
# One step of guidance 2: twice one prediction less another, so three times a prediction's error.
GUIDANCE, AMPLIFIED = 2.0, 3
DRAWING: dict[str, Any] = {"steps": 1, "guidance": GUIDANCE, "seed": 7, "width": SIDE, "height": SIDE}
ROUNDING = 1e-4  # of the largest: the same numbers in another order differ by 2e-6, in fp32 on a CPU
# Between engines from noise: 0.9 % of the largest was seen. Near a picture, at the last timesteps, random weights in eight
# bits leave nothing to compare: an input that is 1e-4 larger moves one engine's own result by half of its largest value.
INTEGER = 0.05
UNLIKE = 1.0  # latents that have nothing to do with each other differ by this of the largest, and more
# more than one context of 77 tokens; the second says something else, or attention would give the same for one and both
LONG = "a red cat, " * 20 + "a blue moon, " * 5


class Made(NamedTuple):
    case: Case
    path: Path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint's folder without weights for each kind, its LoRAs, a tiny autoencoder and a picture."""
    root = tmp_path_factory.mktemp("real-width")
    found = {"tiny_vae": write_tiny_vae(root / "taesd"), "picture": write_picture(root / "picture.png", SMALL)}
    for kind in KINDS:
        found[kind] = shallow(kind, root / kind)
        write_loras(root / f"{kind}-loras", shapes_of(found[kind]), sdxl=is_sdxl(kind))
    return found


def export(case: Case, sources: dict[str, Path], out: Path) -> None:
    dtype, weights = case.precision
    options = ["--random-weights", "0", "--dtype", dtype, "--weights", weights, "-o", str(out)]
    options += ["--tiny-vae", str(sources["tiny_vae"])] * case.tiny_vae
    for lora in sorted((sources[case.kind].with_name(f"{case.kind}-loras")).iterdir()) if case.loras else ():
        options += ["--lora", f"{lora}:0.5"]
    assert main(["export", str(sources[case.kind]), *options]) == 0


def _parameters() -> list[Any]:
    """One case; the rest of the table and then all others where the full tests were asked for."""
    rest = [case for case in (*CASES, *product()) if case not in EVERY_TIME] if FULL else []  # 128 skipped say nothing
    full = [pytest.param(case, id=str(case), marks=[pytest.mark.full, NEEDS]) for case in dict.fromkeys(rest)]
    return [*(pytest.param(case, id=str(case), marks=NEEDS) for case in EVERY_TIME), *full]


@pytest.fixture(scope="module", params=_parameters())
def made(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    kept_traces: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Made]:
    """A bundle, with a home of its own; both are removed after its tests, since they take gigabytes."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VEGA_EDGE_HOME", str(root / "home"))
        try:
            export(request.param, sources, root / "bundle")
            yield Made(request.param, root / "bundle")
        finally:
            shutil.rmtree(root)


def engines(case: Case) -> list[str]:
    """The CPU's engines that are here, take this precision and compute it without saturation."""
    here = [status.name for status in available() if status.ok and runs_on_cpu(status.name)]
    return [name for name in here if not refusal(name, case.precision) and not saturates(name, case.precision[0])]


def turn(case: Case, names: list[str]) -> str:
    """One of `names`, another for each case in turn."""
    return names[product().index(case) % len(names)]


def drawn(path: Path, engine: str, memory: str = "normal", **options: Any) -> Result:
    with Pipeline.open(path, engine, verify=False, memory=memory) as pipe:
        return pipe("a red cat", **{**DRAWING, **options})


def check_picture(result: Result, side: int) -> None:
    (image,) = result.images
    pixels = np.asarray(image)
    assert pixels.shape == (side, side, 3) and np.isfinite(result.latents).all()
    assert pixels.std() > 2 and result.latents.std() > 0.05  # neither black nor one colour


def check_alike(case: Case, latents: dict[str, NDArray[np.float32]]) -> None:
    """To the first engine, within what its precision is held to when it is exported."""
    first, *others = latents
    for name in others:
        dtype = "bf16" if "openvino-bf16" in (first, name) and case.precision[0] != "int8" else case.precision[0]
        error = np.abs(latents[name] - latents[first]).max() / np.abs(latents[first]).max()
        allowed = INTEGER if dtype == "int8" else min(AMPLIFIED * tolerance("unet", dtype), UNLIKE / 2)
        assert error < allowed, (first, name, error)


def test_the_table_has_every_pair_that_eight_exports_can_have() -> None:
    assert len(CASES) == len(set(CASES)) == ORDINARY
    every = set().union(*(case.pairs for case in product()))
    ours = set().union(*(case.pairs for case in CASES))
    assert {pair for pair in every - ours if not names_precision(pair)} == set()
    assert {case.precision for case in CASES} == {case.precision for case in product()}
    assert {sum(case.kind == kind for case in CASES) for kind in KINDS} == {ORDINARY // len(KINDS)}
    assert len(set(product())) == len(KINDS) * len(PRECISIONS) * 2 * 2


def test_export_holds_what_was_asked_for(made: Made) -> None:
    case, bundle = made.case, Bundle.open(made.path)
    manifest = bundle.manifest
    assert manifest is not None and (manifest.dtype, manifest.weights) == case.precision
    assert len(manifest.source.loras) == 3 * case.loras
    assert ("tiny_vae_decoder" in bundle.parts) == case.tiny_vae
    assert bundle.has("unet/model.mha.onnx") == (case.precision[0] != "bf16")
    assert max(bundle.config("unet")["block_out_channels"]) == 1280


def test_verify(made: Made) -> None:
    verdict = verify(made.path, turn(made.case, engines(made.case)))
    assert verdict.ok, [check for check in verdict.checks if check.fault]


def test_every_engine_draws_the_same(made: Made, sources: dict[str, Path]) -> None:
    """A picture from noise, one from a picture, and one of a long prompt."""
    picture = Image.open(sources["picture"])
    kinds: dict[str, dict[str, Any]] = {
        "noise": {},
        "picture": {"image": picture, "steps": 2, "strength": 0.5, "width": SMALL, "height": SMALL},
        "long": {"prompt": LONG, "long_prompt": True, "width": SMALL, "height": SMALL},
    }
    found: dict[str, dict[str, NDArray[np.float32]]] = {kind: {} for kind in kinds}
    first, cut = engines(made.case)[0], None
    for engine in engines(made.case):
        with Pipeline.open(made.path, engine, verify=False) as pipe:
            for kind, options in kinds.items():
                result = pipe(**{"prompt": "a red cat", **DRAWING, **options})
                check_picture(result, SIDE if kind == "noise" else SMALL)
                found[kind][engine] = result.latents
            if engine == first:  # the same text, of which one context is read
                cut = pipe(**{**DRAWING, **kinds["long"], "long_prompt": False}).latents
    for kind, latents in found.items():
        if kind != "picture" or made.case.precision[0] != "int8":
            check_alike(made.case, latents)
    assert cut is not None
    assert np.abs(found["long"][first] - cut).max() > ROUNDING * np.abs(cut).max()


def test_low_memory_draws_the_same(made: Made) -> None:
    engine = turn(made.case, engines(made.case))
    vae = {"vae": "tiny"} if made.case.tiny_vae else {}
    options = {"width": SMALL, "height": SMALL}
    results = {}
    for memory in ("normal", "low"):
        with Pipeline.open(made.path, engine, verify=False, memory=memory, **vae) as pipe:
            results[memory] = pipe("a red cat", **{**DRAWING, **options})
        check_picture(results[memory], SMALL)
    check_alike(made.case, {memory: result.latents for memory, result in results.items()})


def test_an_engine_is_built(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the U-Net, without a GPU: for one size, or in the full tests for every size that the bundle allows."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    if FULL and made.case.precision[0] == "fp32":
        pytest.skip("at the sizes that a bundle allows, attention in fp32 takes tens of gigabytes to build")
    sizes = [] if FULL else ["--static", "--size", f"{SIDE}x{SIDE}", "--batch", "1"]
    assert main(["build", str(made.path), "--engine", "tensorrt-rtx", "--part", "unet", *sizes, "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["graph"] == "unet/model.onnx" and plan["built"]
    stored = (made.path / "unet" / "model.onnx_data").stat().st_size
    assert plan["bytes"] > 0.8 * stored  # it holds its weights


@pytest.mark.full
@NEEDS
@IN_FULL
def test_weights_beyond_2_gb(tmp_path: Path) -> None:
    """Small-SD's own U-Net in fp32: protobuf's limit, and offsets that 31 bits can't hold."""
    out = tmp_path / "small-sd"
    try:
        assert main(["export", "small-sd", "--random-weights", "0", "-o", str(out)]) == 0
        assert (out / "unet" / "model.onnx_data").stat().st_size > 2**31
        latents = {}
        for engine in engines(Case("small", ("fp32", "fp32"), False, False)):
            assert verify(out, engine).ok
            result = drawn(out, engine)
            check_picture(result, SIDE)
            latents[engine] = result.latents
        check_alike(Case("small", ("fp32", "fp32"), False, False), latents)
    finally:
        shutil.rmtree(out, ignore_errors=True)
