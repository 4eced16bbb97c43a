"""Fetching from a hub that the test serves: what is fetched, resumed and checked, and every way it can fail.

Each fetch runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from .hub_server import COMMIT, Hub, serve

FETCH = """
import sys, json
from vega_edge.errors import VegaEdgeError
from vega_edge.export import hub
from vega_edge.models import Origin
origin = Origin(**json.loads(sys.argv[1]))
if len(sys.argv) > 3:
    import shutil
    from types import SimpleNamespace
    shutil.disk_usage = lambda path: SimpleNamespace(free=int(sys.argv[3]))
try:
    if sys.argv[2] == "network":
        print(hub.fetch_network(origin, "tiny_vae"))
    else:
        print(hub.fetch_file(origin) if origin.file else hub.fetch_folder(origin, allow_pickle=sys.argv[2] == "True"))
except VegaEdgeError as error:
    print("ERROR", error)
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)), file=sys.stderr)
"""
CONFIG = {"_class_name": "x"}
UNET = "unet/diffusion_pytorch_model"
SMALL = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler"},
    **{f"{part}/config.json": CONFIG for part in ("unet", "vae", "text_encoder")},
    "tokenizer/vocab.json": {},
    "tokenizer/tokenizer_config.json": {},
}
NEEDED = [*SMALL, "tokenizer/merges.txt"]
HALF = [
    f"{UNET}.fp16.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/model.fp16.safetensors",
]
UNNEEDED = [
    f"{UNET}.safetensors", f"{UNET}.bin", f"{UNET}.fp16.bin", "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors", "safety_checker/model.safetensors", "big.safetensors", "README.md",
    "unet/model.onnx", "feature_extractor/preprocessor_config.json",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    random = np.random.default_rng(0)
    for file in (*NEEDED, *HALF, *UNNEEDED):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file in SMALL:
            path.write_text(json.dumps({**SMALL[file], "file": file}))  # alike ones would be fetched once
        else:
            path.write_bytes(random.bytes(300_000 if file in HALF else 1000))
    with serve(Hub(folder)) as served:
        yield served


def fetch(
    hub: Hub, cache: Path, *, name: str = "tiny/model", free: int = -1, pickles: bool = False, **options: Any
) -> str:
    """What was printed: the path, or ERROR and its text. `environment` adds variables."""
    environment = options.pop("environment", {})
    kind = "network" if options.pop("network", False) else str(pickles)
    origin = {"hub": name, **options}
    arguments = [json.dumps(origin), kind, *([str(free)] if free >= 0 else [])]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments],
        env={**kept, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "NO_PROXY": "*", **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"  # no torch for a download
    return done.stdout.strip()


def test_only_what_is_needed_is_fetched_and_once(hub: Hub, tmp_path: Path) -> None:
    folder = Path(fetch(hub, tmp_path / "cache"))
    assert sorted(hub.fetched()) == sorted([*NEEDED, *HALF])
    assert folder.name == COMMIT
    for file in (*NEEDED, *HALF):
        assert (folder / file).read_bytes() == hub.content(file)
    hub.asked.clear()
    assert fetch(hub, tmp_path / "cache", revision=COMMIT) == str(folder) and hub.fetched() == []


def test_a_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    path = Path(fetch(hub, tmp_path / "cache", file="big.safetensors"))
    assert path.read_bytes() == hub.content("big.safetensors") and hub.fetched() == ["big.safetensors"]
    assert fetch(hub, tmp_path / "cache", file="small.safetensors") == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]} lacks small.safetensors; check its name"
    )


def test_a_repository_that_is_one_network(hub: Hub, tmp_path: Path) -> None:
    def ask(**environment: str) -> str:
        return fetch(hub, tmp_path / "cache", network=True, environment=environment)

    at = f"ERROR hub repository tiny/model at {COMMIT[:7]}"
    assert ask() == f"{at} lacks config.json; name the repository of one network, as diffusers saves it"
    (hub.folder / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    stem = "diffusion_pytorch_model"
    assert ask() == f"{at} has no weights of tiny_vae; expected {stem}.safetensors or {stem}.fp16.safetensors"
    (hub.folder / f"{stem}.bin").write_bytes(b"pickled")
    assert ask().startswith(f"{at} has the weights of tiny_vae pickled only ({stem}.bin), which can run code")
    (hub.folder / f"{stem}.safetensors").write_bytes(b"weights")
    hub.asked.clear()
    folder = Path(ask())
    assert hub.fetched() == [f"{stem}.safetensors"] and (folder / f"{stem}.safetensors").read_bytes() == b"weights"
    hub.asked.clear()
    assert ask(HF_HUB_OFFLINE="1") == str(folder) and not hub.asked


def test_a_broken_transfer_is_resumed(hub: Hub, tmp_path: Path) -> None:
    file = "large.safetensors"
    (hub.folder / file).write_bytes(np.random.default_rng(1).bytes(24 << 20))
    hub.broken[file] = 2
    path = Path(fetch(hub, tmp_path / "cache", file=file))
    assert path.read_bytes() == hub.content(file)
    ranges = [span for method, asked, span in hub.asked if method == "GET" and asked.endswith(file)]
    assert ranges == [None, f"bytes={10 << 20}-", f"bytes={10 << 20}-"]  # huggingface_hub keeps pieces of 10 MiB


def test_a_transfer_that_stays_broken_leaves_nothing_half(hub: Hub, tmp_path: Path) -> None:
    file = HALF[0]
    hub.broken[file] = 1000
    told = fetch(hub, tmp_path / "cache")
    assert told.startswith("ERROR hub repository tiny/model at http://127.0.0.1:")
    assert "can't be reached or broke off (" in told and told.endswith(
        "); check the network and run the same command again (whole files are kept), or set HF_HUB_OFFLINE=1 to use "
        f"what is in {tmp_path / 'cache'}"
    )
    assert not list((tmp_path / "cache").rglob(f"{COMMIT}/{file}"))
    hub.broken.clear()
    hub.asked.clear()
    assert (Path(fetch(hub, tmp_path / "cache")) / file).read_bytes() == hub.content(file)
    assert "model_index.json" not in hub.fetched()  # kept from the first time


@pytest.mark.parametrize("file", [HALF[1], "tokenizer/merges.txt"])
def test_altered_content_is_noticed_and_not_kept(hub: Hub, tmp_path: Path, file: str) -> None:
    hub.altered.add(file)
    told = fetch(hub, tmp_path / "cache")
    assert told.startswith(f"ERROR hub repository tiny/model at {COMMIT[:7]}: {file} is damaged (its hash is ")
    assert told.endswith("); it was removed from the cache: export again")
    hub.altered.clear()
    assert (Path(fetch(hub, tmp_path / "cache")) / file).read_bytes() == hub.content(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("model_index.json", "lacks model_index.json; name a diffusers repository, or a file of this one"),
        ("unet/config.json", "lacks unet/config.json; export needs a whole diffusers repository"),
        ("tokenizer/merges.txt", "lacks tokenizer/merges.txt; export needs a whole diffusers repository"),
    ],
)
def test_a_repository_that_lacks_a_file(hub: Hub, tmp_path: Path, file: str, text: str) -> None:
    (hub.folder / file).unlink()
    assert fetch(hub, tmp_path / "cache") == f"ERROR hub repository tiny/model at {COMMIT[:7]} {text}"
    assert not set(HALF) & set(hub.fetched())  # said before anything large is fetched


def test_a_file_that_is_listed_and_not_there(hub: Hub, tmp_path: Path) -> None:
    hub.gone.add(HALF[0])
    told = fetch(hub, tmp_path / "cache")
    assert told.startswith(f"ERROR hub repository tiny/model at {hub.url} lacks a file that it lists (")
    assert told.endswith("; try again later")


def test_a_hub_that_fails(hub: Hub, tmp_path: Path) -> None:
    hub.failing.add(HALF[0])
    told = fetch(hub, tmp_path / "cache")
    assert told.startswith(f"ERROR hub repository tiny/model at {hub.url} ") and "\n" not in told
    assert "lacks a file" not in told


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b'{"id": "tiny/model", "sha": "a"}', b"[]"])
def test_what_is_no_hub(hub: Hub, tmp_path: Path, answer: bytes) -> None:
    hub.listed = answer
    assert fetch(hub, tmp_path / "cache") == (
        f"ERROR hub repository tiny/model: {hub.url} does not answer as a hub does; check the network (does it ask to log "
        "in?) and HF_ENDPOINT"
    )


def test_full_precision_and_shards_and_pickles(hub: Hub, tmp_path: Path) -> None:
    for file in HALF:
        (hub.folder / file).unlink()
    (hub.folder / f"{UNET}.safetensors").unlink()
    shards = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in shards:
        (hub.folder / "unet" / name).write_bytes(name.encode())
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (hub.folder / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))
    fetch(hub, tmp_path / "cache")
    got = {file for file in hub.fetched() if file.startswith("unet/")}
    assert got == {"unet/config.json", f"{UNET}.safetensors.index.json", *(f"unet/{name}" for name in shards)}
    (hub.folder / f"{UNET}.safetensors.index.json").unlink()
    assert fetch(hub, tmp_path / "other") == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]} has the weights of unet pickled only "
        "(unet/diffusion_pytorch_model.bin), which can run code when they are read; if you trust it, --allow-pickle "
        "reads them with torch's weights_only"
    )
    hub.asked.clear()
    fetch(hub, tmp_path / "third", pickles=True)
    assert f"{UNET}.fp16.bin" in hub.fetched() and "text_encoder/model.safetensors" in hub.fetched()
    (hub.folder / f"{UNET}.bin").unlink()
    (hub.folder / f"{UNET}.fp16.bin").unlink()
    assert fetch(hub, tmp_path / "fourth") == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]} has no weights of unet; expected "
        f"{UNET}.safetensors or diffusion_pytorch_model.fp16.safetensors"
    )


def test_access(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_right"
    nobody = (
        f"ERROR hub repository tiny/model at {hub.url} does not exist or is not public; check its name, or set "
        "HF_TOKEN to a token that may read it"
    )
    assert fetch(hub, tmp_path / "cache") == nobody
    assert fetch(hub, tmp_path / "cache", environment={"HF_TOKEN": "hf_wrong"}) == nobody
    assert Path(fetch(hub, tmp_path / "cache", environment={"HF_TOKEN": "hf_right"})).name == COMMIT
    hub.token, hub.gated = None, True
    assert fetch(hub, tmp_path / "other") == (
        f"ERROR hub repository tiny/model at {hub.url} asks its users to accept its terms; do that on its page, then "
        "set HF_TOKEN to your token"
    )


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path / "cache", revision="v2") == (
        f"ERROR hub repository tiny/model at {hub.url} has no revision v2; check it, or leave it out for the newest"
    )
    assert fetch(hub, tmp_path / "cache", name="tiny/other") == (
        f"ERROR hub repository tiny/other at {hub.url} does not exist or is not public; check its name, or set "
        "HF_TOKEN to a token that may read it"
    )
    assert fetch(hub, tmp_path / "cache", name="a/b/c") == (
        "ERROR 'a/b/c' is no hub repository; its name is OWNER/NAME"
    )
    (hub.folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert fetch(hub, tmp_path / "cache") == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]} is a FluxPipeline; exported are StableDiffusionPipeline and "
        "StableDiffusionXLPipeline"
    )


def test_no_network_and_offline(hub: Hub, tmp_path: Path) -> None:
    cache, offline = tmp_path / "cache", {"HF_HUB_OFFLINE": "1"}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    told = fetch(hub, cache, environment=nowhere)
    assert told.startswith("ERROR hub repository tiny/model at http://127.0.0.1:9 can't be reached or broke off (")
    assert fetch(hub, cache, environment=offline) == (
        f"ERROR hub repository tiny/model: model_index.json is not in {cache}, and HF_HUB_OFFLINE forbids to fetch it; "
        "unset that where there is a network"
    )
    folder = Path(fetch(hub, cache))
    hub.asked.clear()
    assert fetch(hub, cache, environment={**offline, **nowhere}) == str(folder)
    assert fetch(hub, cache, environment=offline, revision=COMMIT) == str(folder) and hub.asked == []
    (folder / HALF[0]).unlink()
    assert fetch(hub, cache, environment=offline) == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]} in the cache has no weights of unet; expected {UNET}.safetensors "
        "or diffusion_pytorch_model.fp16.safetensors"
    )


def test_not_enough_disk_is_said_before(hub: Hub, tmp_path: Path) -> None:
    told = fetch(hub, tmp_path / "cache", free=500_000)
    size = sum(len(hub.content(file)) for file in (*NEEDED, *HALF) if file != "model_index.json")
    assert told == (
        f"ERROR hub repository tiny/model at {COMMIT[:7]}: {size / 1e6:.1f} MB are to be fetched and "
        f"{tmp_path / 'cache'} has 0.5 MB free; free some space, or set HF_HOME to a folder on another disk"
    )
    assert hub.fetched() == ["model_index.json"]
