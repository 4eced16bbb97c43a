"""The recipes against the networks they describe, the API pages they cite, and what the runtime accepts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from vega_edge import manifest, records
from vega_edge.errors import UsageError
from vega_edge.models import Recipe, recipes, storage
from vega_edge.models.architectures import CONFIGS, MERGES, Architecture, architectures, read_config
from vega_edge.runtime.request import Limits, make_request
from vega_edge.runtime.walk import make_plan

ALL = recipes()
FULL_SIZE = [r for r in ALL.values() if r.architecture]
ids = {"ids": lambda value: value.name}

# What the API pages say: shared/reference/segmind_api.md, sections 8.1 and 8.2.
PAGES = {
    "segmind-vega": ("segmind-vega", "DPM2 Karras", 25, 7.5, 1024, [20, 100], [1, 25], [1024]),
    "segmind-vegart": ("segmind-vega-rt-v1", "LCM", 4, 0.0, 1024, [4, 10], None, [1024]),
    "dynavis-lightning": ("sdxl1.0-dyanvis-lightning", "DPM++ SDE", 8, 1.4, 1024, [1, 100], [1, 25], [1024]),
    "small-sd": ("smallsd1.5-txt2img", "UniPC", 20, 7.5, 512, [20, 100], [0.1, 25], [512, 768, 1024]),
    "tiny-sd": ("tinysd1.5-txt2img", "UniPC", 20, 7.5, 512, [20, 100], [0.1, 25], [512, 768, 1024]),
    "portrait": ("potraitsd1.5-txt2img", "UniPC", 20, 7.5, 512, [20, 100], [0.1, 25], [512, 768, 1024]),
    "ssd-1b": ("ssd-1b", "DPM2 Karras", 25, 7.5, 1024, [20, 100], [1, 25], [1024]),
}


@pytest.mark.parametrize("name", PAGES)
def test_recipes_say_what_the_api_pages_say(name: str) -> None:
    r = ALL[name]
    d = r.defaults
    assert (d["width"], d["height"]) == (d["width"],) * 2
    assert PAGES[name] == (
        r.api_slugs[0], d["scheduler"], d["steps"], d["guidance"], d["width"],
        r.api_limits["steps"], r.api_limits.get("guidance"), r.api_limits["sizes_px"],
    )  # fmt: skip


@pytest.mark.parametrize("recipe", ALL.values(), **ids)
def test_a_bundle_takes_the_recipe_and_the_runtime_its_defaults(recipe: Recipe) -> None:
    manifest._check_options(recipe.defaults, recipe.limits)
    limits = Limits.of(recipe.limits, 64)
    request = make_request({"prompt": "a cat"}, recipe.defaults, limits)
    config = read_config(recipe.scheduler or architectures()[recipe.architecture or "segmind-vega"].scheduler)
    assert make_plan(request, config).total
    for key, (least, most) in limits_of(recipe).items():
        low, high = getattr(limits, key)
        assert low <= least <= most <= high, f"{key}: the API page allows more than the runtime"


def test_the_defaults_that_a_recipe_may_say() -> None:
    """Those that its documentation lists are those that a manifest takes, and no more."""
    text = " ".join(str(Recipe.__doc__).split())
    listed = re.sub(r" \([^)]*\)", "", text.partition("may hold: ")[2].partition(". limits:")[0]).split(", ")
    assert listed == [field.name for field in dataclasses.fields(manifest._Defaults)]
    assert all(set(recipe.defaults) <= set(listed) for recipe in ALL.values())
    with pytest.raises(records.RecordError, match="defaults: unknown key 'eta'"):
        manifest._check_options({**ALL["demo-vega"].defaults, "eta": 0.5}, {})


def limits_of(recipe: Recipe) -> dict[str, Any]:
    sizes = recipe.api_limits.get("sizes_px")
    ranges = {k: recipe.api_limits[k] for k in ("steps", "guidance") if k in recipe.api_limits}
    return {**ranges, **({"size_px": (sizes[0], sizes[-1])} if sizes else {})}


def test_lightning_models_start_at_the_last_timestep_and_others_do_not() -> None:
    """The trailing grid: wrong contrast without it."""
    for name, first in (("sdxl-lightning", 14.6146), ("segmind-vega", 11.6761)):
        r = ALL[name]
        config = read_config(r.scheduler or architectures()[r.architecture or ""].scheduler)
        options = {"prompt": "x", "scheduler": "Euler", "steps": 4 if r.scheduler else 25}
        plan = make_plan(make_request(options, r.defaults, Limits.of(r.limits, 64)), config)
        assert plan.schedule.sigmas[0] == pytest.approx(first, rel=1e-4)
    dynavis = ALL["dynavis-lightning"]
    request = make_request({"prompt": "x"}, dynavis.defaults, Limits.of(dynavis.limits, 64))
    plan = make_plan(request, read_config(dynavis.scheduler or ""))
    assert request.schedule == "sgm_uniform" and plan.schedule.sigmas[0] == pytest.approx(14.6146, rel=1e-3)


def test_a_models_schedule_goes_with_its_scheduler_only() -> None:
    dynavis = ALL["dynavis-lightning"]
    limits = Limits.of(dynavis.limits, 64)
    asked = make_request({"prompt": "x", "scheduler": "DPM++ SDE Karras"}, dynavis.defaults, limits)
    assert (asked.scheduler, asked.family, asked.schedule) == ("DPM++ SDE Karras", "a1111", None)
    both = make_request({"prompt": "x", "scheduler": "Euler", "schedule": "beta"}, dynavis.defaults, limits)
    assert both.schedule == "beta"


def test_names_lead_to_one_model() -> None:
    slugs = [slug for r in ALL.values() for slug in r.api_slugs]
    assert len(slugs) == len(set(slugs)) and all(r.api_slugs for r in ALL.values())
    for name, r in ALL.items():
        assert name == r.name and r.licence and r.title
        for origin in r.sources:
            assert origin.hub and origin.hub.count("/") == 1
            assert origin.revision is None or (len(origin.revision) == 40 and int(origin.revision, 16))


def test_every_configuration_is_used() -> None:
    used = {"architectures"} | {r.scheduler for r in FULL_SIZE if r.scheduler}
    for a in architectures().values():
        used |= {*a.parts.values(), a.scheduler}
    assert used == {path.stem for path in CONFIGS.glob("*.json")}


def test_architectures_have_the_published_number_of_weights() -> None:
    assert {a.parameters["unet"] for a in architectures().values()} == {
        745_225_604, 1_331_334_404, 2_567_463_684, 859_520_964, 579_384_964, 323_384_964,
    }  # fmt: skip
    vega = ALL["segmind-vega"]
    assert vega.download_bytes == 2 * (745_225_604 + 123_060_480 + 694_659_840 + 83_653_863)
    assert abs(vega.download_bytes - 3_293_395_670) < 1e6  # the published single file, with its header


@pytest.mark.parametrize("architecture", architectures().values(), **ids)
def test_configurations_build_networks_of_that_size(architecture: Architecture) -> None:
    pytest.importorskip("torch")
    from vega_edge.export.modules import new_module

    for part, count in architecture.parameters.items():
        module = new_module(part, architecture.config(part))
        assert sum(p.numel() for p in module.parameters()) == count, part


def test_the_embedded_models_sizes() -> None:
    from vega_edge.safetensors_file import read_header

    for name in ("demo-vega", "demo-vegart", "demo-small-sd", "demo-tiny-sd"):
        for part, count in ALL[name].parameters.items():
            folder = ALL[name].checkpoint_path
            assert folder is not None
            got = 0
            for file in (folder / part).glob("*.safetensors"):
                for entry in read_header(file).entries.values():
                    size = 1
                    for n in entry.shape:
                        size *= n
                    got += size
            assert got == count, part


def test_clip_merges_are_clips() -> None:
    lines = MERGES.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#version: 0.2" and len(lines) == 48_895 and lines[1:3] == ["i n", "t h"]
    assert len(set(lines)) == len(lines) and all(line.count(" ") == 1 for line in lines)


def test_a_recipe_that_says_too_much_is_refused() -> None:
    text = (Path(CONFIGS).parent / "tiny-sd.json").read_text(encoding="utf-8")
    with pytest.raises(records.RecordError, match=r"sources\[0\]: unknown key 'url'; known keys: hub, revision, file"):
        records.decode(Recipe, records.parse(text.replace('"hub"', '"url"')))


def test_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert storage.hub_cache() == Path.home() / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.hub_cache() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert storage.hub_cache() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert storage.hub_cache() == tmp_path / "cache"
    blobs = tmp_path / "cache" / "models--segmind--tiny-sd" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "aa").write_bytes(bytes(10))
    (blobs / "bb.incomplete").write_bytes(bytes(5))
    assert storage.downloaded_bytes("segmind/tiny-sd") == 10 and storage.downloaded_bytes("segmind/other") == 0


def test_unknown_models_are_named() -> None:
    from vega_edge.models import find_bundle

    with pytest.raises(UsageError, match="unknown model 'segmind-vega-rt'; did you mean 'segmind-vegart'"):
        find_bundle("segmind-vega-rt")


def test_a_folder_that_is_called_like_a_model_stays_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is printed, and given to other processes, without the './'."""
    from vega_edge.models import find_bundle

    monkeypatch.chdir(tmp_path)
    assert find_bundle("./segmind-vega") == tmp_path / "segmind-vega"
    assert find_bundle("./other") == Path("other")


def test_models_prints_what_json_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vega_edge.cli import main

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    blobs = tmp_path / "models--segmind--Segmind-Vega" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "aa").write_bytes(bytes(1_500_000))
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["segmind-vega"]["downloaded_bytes"] == 1_500_000
    assert rows["segmind-vega"]["exported_bytes"] == {"fp32": 6_586_399_148, "fp16": 3_293_199_574}
    assert rows["segmind-vegart"]["loras"] == ["hf:segmind/Segmind-VegaRT/pytorch_lora_weights.safetensors"]
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    vega = next(i for i, line in enumerate(lines) if line.startswith("segmind-vega "))
    assert lines[vega].endswith("; DPM2 Karras, 25 steps, guidance 7.5, 1024x1024")
    assert lines[vega + 2].strip() == "[not exported yet; make it with: vega-edge export segmind-vega]"
    monkeypatch.setenv("COLUMNS", "100")  # a place on the hub is not broken
    assert main(["models"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 100
    assert " ".join(narrow.split()) == " ".join(" ".join(lines).split())
    assert lines[vega + 1].strip() == (
        "1647 M weights (unet 745 M); 3.3 GB to download in fp16; exported fp16 3.3 GB, fp32 6.6 GB; "
        "on this disk: download 1.5 MB; from hf:segmind/Segmind-Vega@7714c43; Apache-2.0"
    )
