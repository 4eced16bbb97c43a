"""`vega-edge serve --check` and what a start refuses: options that can't work are one line, not silence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.cli import main
from vega_edge.serve import keys

from .serve_running import free_port, running

NEEDS = "vega-edge serve keys add NAME --api-keys"


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The exit status and the one line of `serve --check`."""
    status = main(["serve", *map(str, arguments), "--check"])
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == bool(status)
    return status, captured.err.removeprefix("vega-edge: ").rstrip("\n")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "{file} does not exist; make it: vega-edge serve keys add NAME --api-keys {file}"),
        ("{half", "{file} is not a file of keys: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "{file} is not a file of keys: list indices must be integers or slices, not str"),
        ("[" * 100_000, "{file} is not a file of keys: it is nested too deep"),
    ],
)  # fmt: skip
def test_files_of_keys(content: str | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    assert said(capsys, "--api-keys", file) == (1, why.format(file=file))


HOST = "--allow-host must be a name alone, such as draw.example, without a port or http://, got "


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--alias", "x=nope"], "unknown model 'nope'; there are: "),
        (["--alias", "a/b=demo-vegart"], "--alias must be SLUG=MODEL, and a slug has no slash, got 'a/b'"),
        (["--alias", "a=demo-vegart", "--alias", "b=demo-vegart", "--alias", "a=demo-vega"], "--alias: 'a' is given twice, for demo-vegart and for demo-vega; leave one out"),
        (["--alias", "segmind-vega=demo-vega"], "segmind-vega: the model demo-vega has no bundle here; make it with: vega-edge export demo-vega, or let another stand in: --alias segmind-vega=MODEL"),
        (["--alias", "segmind-vega=demo-vegart", "--lora", "segmind-vega=missing"], "--lora: segmind-vega is an alias here, for demo-vegart; give the LoRA to that: --lora demo-vegart=FILE"),
        (["--preload", "nope"], "--preload: unknown model 'nope'; there are: "),
        (["--preload", "segmind-vega"], "segmind-vega: the model segmind-vega has no bundle here; make it with: vega-edge export segmind-vega, or let another stand in: --alias segmind-vega=MODEL"),
        (["--lora", "nope=missing"], "--lora: unknown model 'nope'; there are: "),
        (["--lora", "demo-vega=missing"], "--lora: missing is not a file"),
        (["--engine", "nope"], "unknown engine 'nope'; there are: "),
        (["--device", "nope"], "device must be cpu, cuda or cuda:N, such as cuda:0, not 'nope'"),
        (["--vae", "nope"], "unknown vae 'nope'; there are: full, tiny"),
        (["--host", "300.1.1.1", "--no-auth"], "--host: can't listen on 300.1.1.1 ("),
        (["--host", "192.0.2.1", "--no-auth"], "--host: can't listen on 192.0.2.1 ("),
        (["--host", "a" * 70, "--no-auth"], f"--host: can't listen on {'a' * 70} ("),
        (["--allow-host", "http://x/"], f"{HOST}'http://x/'"),
        (["--allow-host", "draw.example:8000"], f"{HOST}'draw.example:8000'"),
        (["--allow-host", "*.example"], f"{HOST}'*.example'"),
        (["--allow-host", ""], f"{HOST}''"),
        (["--preload", "demo-vegart", "--memory-budget", "1K"], "demo-vegart takes "),
    ],
)  # fmt: skip
def test_what_can_be_known_is_said(
    arguments: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    status, text = said(capsys, *arguments)
    assert status in (1, 2) and text.startswith(why)


def test_folders_for_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below", *([Path("/proc/x")] if sys.platform == "linux" else [])):
        status, text = said(capsys, "--data", folder)
        assert (status, text.startswith(f"--data: {folder} can't be written: ")) == (1, True)
    assert said(capsys, "--data", tmp_path / "new" / "deep") == (0, "")
    assert list(tmp_path.iterdir()) == [file]  # nothing stays
    pictures = tmp_path / "data" / "generations"
    pictures.parent.mkdir()
    pictures.touch()
    why = f"--data: {pictures} can't be written: Not a directory; choose another folder"
    assert said(capsys, "--data", pictures.parent) == (1, why)


def test_loras_and_bundles_are_looked_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    lora = tmp_path / "style.safetensors"
    lora.write_bytes(b"no weights")
    why = f"{lora} is no safetensors file, or only its beginning; fetch it again"
    assert said(capsys, "--lora", f"demo-vegart={lora}") == (1, why)
    (tmp_path / "bundles" / "demo-vegart").mkdir(parents=True)
    status, text = said(capsys, "--preload", "demo-vegart")
    assert status == 1 and text.startswith(f"{tmp_path / 'bundles' / 'demo-vegart'} is not a bundle: ")


def test_good_options_are_silent_and_take_nothing_from_a_server_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    keys.add(file, "me")
    options = ["--host", "localhost", "--api-keys", file, "--allow-host", "draw.example", "--allow-host", "::1"]
    assert said(capsys, *options, "--preload", "demo-vegart", "--data", tmp_path, "--port", free_port()) == (0, "")
    with running(tmp_path / "data") as server:
        port = server.service.settings.port
        assert said(capsys, "--port", port, "--data", tmp_path / "data") == (0, "")


def test_an_allowed_name_with_its_dot_is_that_name(tmp_path: Path) -> None:
    with running(tmp_path, hosts=("draw.example.",)) as server:
        assert server.http.get("/healthz", headers={"host": "draw.example"}).status_code == 200
