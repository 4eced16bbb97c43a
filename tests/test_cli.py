"""The command line as its users meet it: in a process of its own, by exit status, stdout and stderr."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vega_edge import cli
from vega_edge.models import find_bundle, recipes

STAR = "a big red star on a blue background"


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vega_edge", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, "PYTHONUTF8": "1", **env},
        timeout=300,
    )


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("generate", *arguments, "--engine", "onnxruntime-cpu", cwd=folder)


def test_generate_writes_a_picture_and_prints_its_name(tmp_path: Path) -> None:
    done = generate(tmp_path, STAR, "--seed", "7", "-o", "star.png")
    assert (done.returncode, done.stdout) == (0, "star.png\n")
    with Image.open(tmp_path / "star.png") as picture:
        assert picture.size == (128, 128)
        assert picture.text["parameters"].splitlines() == [
            STAR,
            "Steps: 4, Sampler: LCM, CFG scale: 0, Seed: 7, Size: 128x128, Model: demo-vegart, Version: vega-edge 0.1.0",
        ]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        assert generate(tmp_path, STAR, "--seed", "8", "-o", name).returncode == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_what_is_not_the_default_is_written_into_the_picture(tmp_path: Path) -> None:
    options = ["--scheduler", "dpmpp_2m_sde", "--schedule", "Karras", "--eta", "0.5", "--rng", "nv"]
    options += ["--noise-dtype", "fp16", "--guidance", "3", "--guidance-rescale", "0.7"]
    done = generate(tmp_path, STAR, "--seed", "7", *options, "-o", "star.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "star.png") as picture:
        assert picture.text["parameters"].splitlines()[1] == (
            "Steps: 4, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 3, Seed: 7, Size: 128x128, "
            "Model: demo-vegart, Eta: 0.5, CFG Rescale: 0.7, RNG: NV, Noise dtype: fp16, Family: a1111, "
            "Version: vega-edge 0.1.0"
        )


def test_a_seed_that_was_picked_is_in_the_file(tmp_path: Path) -> None:
    told = json.loads(generate(tmp_path, STAR, "--steps", "1", "--json", "-o", "star.png").stdout)
    with Image.open(tmp_path / "star.png") as picture:
        assert f"Seed: {told['pictures'][0]['seed']}," in picture.text["parameters"]


def test_steps_of_an_unknown_number(tmp_path: Path) -> None:
    done = generate(tmp_path, STAR, "--scheduler", "DPM adaptive", "--json", "-o", "star.png")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["scheduler"], told["family"]) == ("DPM adaptive", "a1111")


def test_samples_are_the_next_seeds(tmp_path: Path) -> None:
    assert generate(tmp_path, STAR, "--seed", "8", "-o", "one.png").returncode == 0
    done = generate(tmp_path, STAR, "--seed", "7", "--samples", "2", "-o", "two.png")
    assert done.stdout.split() == ["two-7.png", "two-8.png"]
    one, two = (np.asarray(Image.open(tmp_path / n)).astype(int) for n in ("one.png", "two-8.png"))
    assert np.abs(one - two).max() <= 1  # a batch rounds a little differently


def test_json_names_what_was_done(tmp_path: Path) -> None:
    done = generate(
        tmp_path, "", "--json", "--samples", "2", "--size", "192x128", "--scheduler", "euler a", "--steps", "2"
    )
    told = json.loads(done.stdout)
    assert told["pictures"][0]["file"] == f"picture-{told['pictures'][0]['seed']}.png"
    assert (told["scheduler"], told["steps"], told["width"], told["height"]) == ("Euler a", 2, 192, 128)
    assert all((tmp_path / p["file"]).is_file() for p in told["pictures"])


@pytest.mark.parametrize(
    "prompt", ["", "🌟 étoile\nrouge\t", "نجمة حمراء على خلفية زرقاء", "star " * 10_000, "../../etc/passwd", "-"]
)
def test_any_prompt_draws(tmp_path: Path, prompt: str) -> None:
    done = generate(tmp_path, "--seed", "3", "--steps", "1", prompt)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.strip()).parent == tmp_path
    assert len(done.stdout.strip()) < 80


BAD = [
    (["--model", "vega"], 2, "vega-edge: unknown model 'vega'; did you mean 'demo-vega'? there are: demo-small-sd, demo-tiny-sd, demo-vega, demo-vegart, "),
    (["--engine", "cuda"], 2, "vega-edge: unknown engine 'cuda'; did you mean 'onnxruntime-cuda'? there are: "),
    (["--scheduler", "Eulr"], 2, "vega-edge: unknown scheduler 'Eulr'; did you mean 'Euler'? there are: DDIM, "),
    (["--scheduler", "PLMS", "--family", "diffusers"], 2, "vega-edge: PLMS is not in the family diffusers; it is in a1111"),
    (["--family", "comfy"], 2, "vega-edge: unknown family 'comfy'; there are: a1111, diffusers"),
    (["--schedule", "karas"], 2, "vega-edge: unknown schedule 'karas'; did you mean 'karras'? there are: "),
    (["--scheduler", "Restart", "--schedule", "karras"], 2, "vega-edge: Restart makes its own schedule and can't use 'karras'"),
    (["--scheduler", "UniPC", "--family", "a1111", "--steps", "2"], 2, "vega-edge: UniPC takes 3 to 50 steps, got 2"),
    (["--scheduler", "Euler a", "--eta", "1.5"], 2, "vega-edge: eta must be a number from 0 to 1, got 1.5"),
    (["--scheduler", "Euler", "--eta", "1"], 2, "vega-edge: Euler has no eta"),
    (["--rng", "gpu"], 2, "vega-edge: unknown rng 'gpu'; there are: nv, torch"),
    (["--noise-dtype", "fp8"], 2, "vega-edge: unknown noise dtype 'fp8'; there are: fp16, fp32"),
    (["--guidance-rescale", "2"], 2, "vega-edge: guidance rescale must be a number from 0 to 1, got 2.0"),
    (["--size", "130x128"], 2, "vega-edge: width must be a multiple of 32 px, got 130; nearest: 128 or 160"),
    (["--size", "8x128"], 2, "vega-edge: width must be a whole number from 64 to 256, got 8"),
    (["--size", "big"], 2, "vega-edge generate: argument --size: must be WIDTHxHEIGHT in pixels, such as 128x128, got 'big'; see vega-edge generate --help"),
    (["--steps", "0"], 2, "vega-edge: steps must be a whole number from 1 to 50, got 0"),
    (["--steps", "many"], 2, "vega-edge generate: argument --steps: must be a whole number, got 'many'; see vega-edge generate --help"),
    (["--guidance", "nan"], 2, "vega-edge: guidance must be a number from 0 to 20, got nan"),
    (["--samples", "5"], 2, "vega-edge: samples must be a whole number from 1 to 4, got 5"),
    (["--seed", "-2"], 2, "vega-edge: seed must be a whole number from -1 to 999999999999999, got -2"),
    (["--seed", "1000000000000000"], 2, "vega-edge: seed must be a whole number from -1 to 999999999999999, got 1000000000000000"),
    (["-o", "nowhere/star.png"], 2, f"vega-edge: {Path('nowhere/star.png')}: the folder nowhere does not exist; make it first"),
    (["-o", "star.gif"], 2, "vega-edge: star.gif: unknown picture format '.gif'; use one of .png, .jpg, .jpeg, .webp"),
    (["star\nmoon"], 2, "vega-edge generate: unrecognized arguments: star moon; see vega-edge generate --help"),
    (["--model", "./no\nthing"], 1, "vega-edge: there is no bundle at no thing; check the path, or make one: vega-edge export MODEL -o BUNDLE"),
    (["--model", "./nothing"], 1, "vega-edge: there is no bundle at nothing; check the path, or make one: vega-edge export MODEL -o BUNDLE"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_bad_input_gets_one_clear_line(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    engine = [] if "--engine" in arguments else ["--engine", "onnxruntime-cpu"]
    done = run("generate", STAR, *arguments, *engine, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    line, end = done.stderr.splitlines(), message.endswith(("; ", "there are: ", "DDIM, ", "demo-vegart, "))
    assert len(line) == 1, done.stderr
    assert line[0].startswith(message) if end else line[0] == message
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_not_overwritten_silently(tmp_path: Path) -> None:
    (tmp_path / "star.png").write_bytes(b"mine")
    done = generate(tmp_path, STAR, "-o", "star.png")
    assert (done.returncode, done.stderr) == (
        2,
        "vega-edge: star.png exists already; choose another name, or pass --overwrite\n",
    )
    assert (tmp_path / "star.png").read_bytes() == b"mine"
    assert generate(tmp_path, STAR, "-o", "star.png", "--overwrite").returncode == 0
    assert (tmp_path / "star.png").read_bytes() != b"mine"


def test_a_long_prompt_says_what_was_cut(tmp_path: Path) -> None:
    done = generate(tmp_path, "star " * 75 + "moon", "--steps", "1")
    assert (
        "vega-edge: the prompt has 76 tokens, CLIP reads 75 at a time; cut off: 'moon'; --long-prompt reads all of it"
        in done.stderr.splitlines()
    )


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_bundle_names_the_part(tmp_path: Path, damage: str) -> None:
    import shutil

    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    target = bundle / "unet" / "model.onnx"
    if damage == "missing":
        target.unlink()
    else:
        content = bytearray(target.read_bytes())
        content[len(content) // 2] ^= 1
        target.write_bytes(content if damage == "altered" else content[:-100])
    done = run("generate", STAR, "--model", str(bundle), cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"bundle {bundle}, part unet: unet/model.onnx is {damage}" in done.stderr


def test_a_newer_bundle_is_refused(tmp_path: Path) -> None:
    import shutil

    bundle = Path(shutil.copytree(find_bundle("demo-vegart"), tmp_path / "bundle"))
    manifest = json.loads((bundle / "vega-edge.json").read_text())
    (bundle / "vega-edge.json").write_text(json.dumps({**manifest, "format": 2, "colour": "blue"}))
    done = run("generate", STAR, "--model", str(bundle), cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr
        == f"vega-edge: {bundle / 'vega-edge.json'}: made by a newer vega-edge (format 2, this one reads up to 1): upgrade\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "vega_edge",
        "generate",
        STAR,
        "--scheduler",
        "Euler",
        "--steps",
        "50",
        "--samples",
        "4",
        "--size",
        "256x256",
        "-o",
        "star.png",
        "--verbose",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr and "chosen automatically" in process.stderr.readline()  # what follows takes seconds
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "vega-edge: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_can_not_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vega_edge", "models"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "vega-edge: the output can't be written: No space left on device\n")


def test_a_name_that_the_output_lacks_letters_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vega_edge", "generate", "نجمة", "--steps", "1"],
        cwd=tmp_path,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\\u0646\\u062c") and len(list(tmp_path.iterdir())) == 1


def test_models_lists_every_recipe() -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert [r["name"] for r in rows] == list(recipes())
    demo = next(r for r in rows if r["name"] == "demo-vegart")
    assert demo["ready"] is True and demo["defaults"]["scheduler"] == "LCM"
    assert "demo-vegart" in run("models").stdout


def test_models_lists_every_scheduler() -> None:
    told = json.loads(run("models", "--schedulers", "--json").stdout)
    rows = {(row["family"], row["name"]): row for row in told["schedulers"]}
    assert len([key for key in rows if key[0] == "a1111"]) >= 30
    assert (rows["diffusers", "Heun"]["order"], rows["diffusers", "Heun"]["calls"]) == (2, 2)
    assert (rows["a1111", "DPM adaptive"]["order"], rows["a1111", "DPM adaptive"]["calls"]) == (None, None)
    assert rows["a1111", "DPM++ 2M SDE"]["brownian"] and not rows["a1111", "DPM++ 2M"]["stochastic"]
    assert {"karras", "exponential", "sgm_uniform", "simple", "normal", "beta"} <= set(told["schedules"])
    table = run("models", "--schedulers").stdout.splitlines()
    assert table[0].split() == ["family", "name", "order", "calls", "a", "step"]
    assert len(table) == len(rows) + 4
    assert ["a1111", "DPM++", "2M", "SDE", "Karras", "2", "1", "random"] in [line.split() for line in table]
    for name, order in (("adaptive", "varies"), ("fast", "3")):
        assert ["a1111", "DPM", name, order, "varies", "random,", "own", "schedule", "only"] in [
            t.split() for t in table
        ]
    assert table[-1].startswith("--schedule, for all the others: karras, ")


def test_a_model_without_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    done = run("generate", STAR, "--model", "demo-vega", VEGA_EDGE_HOME=str(tmp_path))
    assert done.returncode == 1
    assert (
        done.stderr
        == f"vega-edge: demo-vega has no bundle at {tmp_path / 'bundles' / 'demo-vega'} yet; {recipes()['demo-vega'].cure}\n"
    )


def test_doctor_tells_what_is_here() -> None:
    told = json.loads(run("doctor", "--json").stdout)
    assert {e["name"] for e in told["engines"]} >= {"onnxruntime-cpu", "openvino", "openvino-bf16", "onnxruntime-cuda"}
    assert "onnxruntime-cpu" in run("doctor").stdout


def test_the_compiled_cache_is_shown_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vega_edge.cli import main

    cache, other = tmp_path / "compiled", tmp_path / "bundles" / "mine"
    for folder in (cache / "openvino-1" / "a", cache / "onnxruntime-cpu-1" / "b", other):
        folder.mkdir(parents=True)
        (folder / "blob").write_bytes(bytes(1_000_000))
    monkeypatch.setenv("VEGA_EDGE_HOME", str(tmp_path))
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "25")
    shown = f"{cache}: 2 MB in 2 folders, at most 25.0 GB (VEGA_EDGE_CACHE_GB)"
    assert main(["cache"]) == 0 and capsys.readouterr().out == f"{shown}\n"
    assert main(["doctor"]) == 0 and f"Compiled cache\n  {shown}\n" in capsys.readouterr().out
    assert main(["cache", "--json"]) == 0
    want = {"path": str(cache), "entries": 2, "bytes": 2_000_000, "limit_bytes": 25 * 10**9, "limit_reason": "VEGA_EDGE_CACHE_GB"}  # fmt: skip
    assert json.loads(capsys.readouterr().out) == want
    assert main(["doctor", "--json"]) == 0 and json.loads(capsys.readouterr().out)["cache"] == want
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "much")
    for command in (["cache"], ["doctor"]):
        assert main(command) == 2
        assert capsys.readouterr().err.count("VEGA_EDGE_CACHE_GB must be a number of gigabytes") == 1
    monkeypatch.setenv("VEGA_EDGE_CACHE_GB", "0")
    assert main(["cache"]) == 0 and "off (VEGA_EDGE_CACHE_GB)" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().err == f"2 folders, 2.0 MB removed from {cache}\n"
    assert list(cache.iterdir()) == [] and (other / "blob").is_file()
    assert main(["cache", "clear"]) == 0 and capsys.readouterr().err.startswith("0 folders, ")


def test_help_tells_of_every_option() -> None:
    (verbs,) = (a.choices for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(verbs) == {
        "generate", "export", "serve", "bench", "verify", "build", "engines", "cache", "models", "doctor",
    }  # fmt: skip
    text = run("--help").stdout
    for verb, parser in verbs.items():
        assert f"    {verb} " in text
        for parent in (parser, *_parsers_in(parser)):
            for action in parent._actions:  # positional ones, and the verbs below a verb, too
                if isinstance(action, argparse._SubParsersAction):
                    helped = {choice.dest: choice.help for choice in action._choices_actions}
                    assert helped.keys() == action.choices.keys() and all(helped.values()), verb
                else:
                    assert action.help, (verb, action.dest)
    assert run("generate", "--help").stdout.startswith("usage: vega-edge generate ")
    assert run("--version").stdout.startswith("vega-edge ")


def _parsers_in(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = (a.choices.values() for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return [p for parsers in below for p in parsers]


def test_no_verb_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_bench_times_every_engine_that_is_asked_for() -> None:
    done = run("bench", "--engine", "onnxruntime-cpu", "--rounds", "2", "--steps", "1", "--size", "64x64", "--json")
    told = json.loads(done.stdout)
    assert told["model"] == "demo-vegart" and told["options"] == {"steps": 1, "samples": 1, "width": 64, "height": 64}
    (speed,) = told["engines"]
    assert speed["engine"] == "onnxruntime-cpu" and told["failed"] == [] and told["cores"] >= 1
    assert 0 < speed["text_s"] + speed["step_s"] + speed["decode_s"] <= speed["worst_s"] + 1e-3
    assert speed["picture_s"] <= speed["worst_s"] and speed["peak_mb"] > 30
    for wrong, said in (
        (["--steps", "0"], "steps must be a whole number from 1 to 50, got 0"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--engine", "abacus"], "unknown engine 'abacus'; "),
        (["no-such-model"], "unknown model 'no-such-model'; "),
    ):
        failed = run("bench", "--engine", "onnxruntime-cpu", *wrong)
        assert (failed.returncode, failed.stdout) == (2, "") and failed.stderr.startswith(f"vega-edge: {said}")
        assert failed.stderr.count("\n") == 1
