"""The containers' files: what they install are the extras that the tests install, and what any image should have."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vega_edge
from vega_edge.bundle import Bundle
from vega_edge.cli import _parser as parser
from vega_edge.engines.plan_choice import needed_graphs
from vega_edge.models import find_bundle, recipes
from vega_edge.runtime.vae_choice import unused_parts
from vega_edge.telemetry import OFF

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(vega_edge.__file__).parent
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
WANTED = {"cpu": {"cpu", "openvino", "serve"}, "cuda": {"cuda", "tensorrt-rtx", "serve"}, "jetson": {"jetson", "serve"}}


def instructions(path):
    """(name, arguments) of each, continuation lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", path.read_text(encoding="utf-8")))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def test_there_are_three():
    assert {path.name.split(".")[0] for path in FILES} == set(WANTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_installed_are_extras_of_the_project(path):
    runs = " && ".join(arguments for name, arguments in instructions(path) if name == "RUN")
    installs = re.findall(r"pip install ([^&]*)", runs)
    pins = "/src/pins/jetson.txt" if path.name.startswith("jetson") else "/src/pins/main.txt"
    backend, package = (re.sub(rf"--no-cache-dir|-c {pins} ", "", install).split() for install in installs)
    assert all(f"-c {pins} " in install for install in installs)
    assert backend == ["--upgrade", "setuptools"]  # what builds the package, of the pinned version too
    assert package[0] == "--no-build-isolation" and len(package) == 2  # and nothing beside the project
    (extras,) = re.findall(r'"/src\[([^\]]*)\]"', package[1])
    assert set(extras.split(",")) == WANTED[path.name.split(".")[0]] <= set(EXTRAS)
    assert "torch" not in path.read_text(encoding="utf-8").replace("no torch", "")


def test_no_container_has_torch():
    for extra in set().union(*WANTED.values()):
        for requirement in EXTRAS[extra]:
            assert not requirement.startswith(("torch", "diffusers", "transformers", "optimum"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_any_image_should_have(path):
    found = instructions(path)
    names = [name for name, _ in found]
    last = max(i for i, name in enumerate(names) if name == "FROM")
    final = found[last:]
    assert [arguments for name, arguments in final if name == "USER"] == ["1000"]
    assert [arguments for name, arguments in final if name == "VOLUME"] == ["/data"]
    assert "/healthz" in next(arguments for name, arguments in final if name == "HEALTHCHECK")
    assert all(
        not arguments.endswith(":latest") and ":" in arguments.split()[0] for name, arguments in found if name == "FROM"
    )
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 36


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_libraries_send_nothing_whatever_runs_in_the_image(path):
    told = " ".join(arguments for name, arguments in instructions(path) if name == "ENV").split()
    assert {f"{name}=1" for name in OFF} <= set(told)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_user_may_write_to_the_volume(path):
    """`install -d` gives its owner to the folders that it names, not to those that it makes on the way."""
    found = instructions(path)
    runs = " && ".join(arguments for name, arguments in found if name == "RUN")
    (made,) = re.findall(r"install -d -o vega -g vega ([^&]*)", runs)
    told = " ".join(arguments for name, arguments in found if name == "ENV")
    assert {"/data", *re.findall(r"=(/data\S*)", told)} == set(made.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint(path):
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_composed_services_are_built_from_these_files():
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    for name in re.findall(r"dockerfile: (\S+?)}", text):
        assert (ROOT / name).is_file()
    assert '"127.0.0.1:8000:8000"' in text  # --no-auth is for this machine only


def test_the_image_holds_what_the_package_is():
    """.dockerignore leaves out nothing that pyproject lists as a package or its data."""
    ignored = {line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name.removeprefix("vega_edge").lstrip(".").replace(".", "/") for name in settings["packages"]}
    assert not folders & ignored


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize(("options", "built"), [("", ""), ("--static --size 512", " --static --size 512")])
def test_a_jetson_builds_with_the_options_it_is_told_and_then_serves(tmp_path, options, built):
    fake = tmp_path / "vega-edge"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "docker" / "jetson-start.sh"), "segmind-vegart", "--no-auth", "--memory", "low"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "VEGA_EDGE_BUILD": options}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    serve = "serve --host 0.0.0.0 --engine tensorrt --preload segmind-vegart --no-auth --memory low"
    assert done.stdout.splitlines() == [
        f"{serve} --check",
        f"build segmind-vegart --engine tensorrt{built}",
        serve,
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_jetson_that_is_stopped_while_it_builds_stops_building_and_does_not_serve(tmp_path, which):
    """docker waits for ten seconds, and then kills: what is half built would stay."""
    fake = tmp_path / "vega-edge"
    fake.write_text(
        '#!/bin/sh\necho "$1"\n[ "$1" = build ] || exit 0\n'
        "trap 'echo told; sleep 0.5; echo cleaned; exit 130' TERM\necho $$ > pid\nwhile :; do sleep 0.1; done\n"
    )
    fake.chmod(0o755)
    start = subprocess.Popen(
        ["/bin/sh", str(ROOT / "docker" / "jetson-start.sh"), "segmind-vegart", "--no-auth"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        for _ in range(400):
            if (tmp_path / "pid").is_file():
                break
            time.sleep(0.05)
        start.send_signal(which)
        start.wait(timeout=20)
    finally:
        start.kill()
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # where it was not told
    assert start.communicate(timeout=20)[0].splitlines() == ["serve", "build", "told", "cleaned"]
    assert start.returncode != 0


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_jetson_that_was_not_told_who_may_come_in_builds_nothing(tmp_path):
    """As `docker run vega-edge:jetson` without more: minutes of building would end in a refusal."""
    pytest.importorskip("uvicorn", reason="the server's packages are not installed")
    fake = tmp_path / "vega-edge"
    fake.write_text(f'#!/bin/sh\n[ "$1" = build ] && echo built && exit\nexec {sys.executable} -m vega_edge "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", str(ROOT / "docker" / "jetson-start.sh"), "demo-vegart", "--engine", "onnxruntime-cpu"],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "vega-edge: others can reach 0.0.0.0; give --api-keys FILE (make one: vega-edge serve keys add NAME --api-keys FILE), "
        "or say --no-auth"
    )


def test_stripped_engines_are_not_for_little_memory():
    """A network that is opened for each picture is refitted for each."""
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8")
    commands = re.sub(r"(?m)^- .*\n(?:  .*\n)*", "", text)
    assert "--memory low" in commands and "--stripped" not in commands


def test_the_kiosks_unit_says_what_serve_understands():
    """The server knows models by name alone, so a folder's path would end it at its start."""
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"(?ms)^ExecStart=\S+ run (.*?[^\\])$", text)
    model, *options = command.replace("\\\n", " ").split("vega-edge:jetson")[1].split()
    assert model in recipes()
    parsed = parser().parse_args(["serve", "--engine", "tensorrt", "--preload", model, *options])
    assert (parsed.memory, parsed.vae) == ("low", "tiny")


def test_the_kiosk_builds_what_its_page_asks_for():
    """A static engine takes one size: the recipe's own, which the page shows first, unless --size says another."""
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8")
    builds = [*re.findall(r"build segmind-vegart (.*)", text), *re.findall(r"VEGA_EDGE_BUILD=([^\"]*)", text)]
    assert len(builds) == 2
    for options in builds:
        assert "--static" in options and "--size" not in options
    assert "sudo chown -R 1000:1000 /opt/kiosk" in text  # USER of the image


def test_the_kiosks_start_builds_no_part_that_was_not_built_before():
    """The swap that building needs is gone then. The parts are those that `--vae tiny` draws with."""
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"VEGA_EDGE_BUILD=([^\"]*)", text)
    (loop,) = re.findall(r"for part in (.*); do", text)
    parts = parser().parse_args(["build", "segmind-vegart", "--engine", "tensorrt", *options.split()]).part
    assert loop.split() == parts
    bundle = Bundle.open(find_bundle("demo-vegart"))  # of the same architecture
    drawn_with = {graph.parent.name for graph in needed_graphs(bundle.path)} - unused_parts(bundle, "tiny")
    assert set(parts) == drawn_with and len(parts) == len(drawn_with)


def test_the_kiosks_containers_see_its_folder():
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8").replace("\\\n", " ")
    runs = [line for line in text.splitlines() if "docker run" in line]
    assert len(runs) == 4
    for line in runs:
        assert re.search(r"(-v|--volume) /opt/kiosk:/data ", line) and "segmind-vegart" in line
    assert "docker build -f docker/jetson.Dockerfile -t vega-edge:jetson ." in text


def test_the_kiosks_units_are_units_that_are_enabled():
    """What systemd needs for a compositor that nobody is logged in for: a session, a terminal, and time for the server."""
    text = (ROOT / "docs" / "kiosk.md").read_text(encoding="utf-8")
    units = re.findall(r"`/etc/systemd/system/(\S+)\.service`.*?```ini\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in units] == ["vega-edge", "kiosk-screen"]
    for name, unit in units:
        assert re.findall(r"(?m)^\[.*", unit) == ["[Unit]", "[Service]", "[Install]"]
        assert re.search(r"(?m)^ExecStart=/", unit) and "\nRestartSec=" in unit
        assert re.search(rf"sudo systemctl enable (--now )?{name}\b", text)
    lines = units[1][1].splitlines()
    assert {"TTYPath=/dev/tty1", "StandardInput=tty-fail", "TimeoutStartSec=infinity"} <= {*lines}
    assert "Conflicts=getty@tty1.service" in lines
    (user,) = (line.removeprefix("User=") for line in lines if line.startswith("User="))
    (session,) = (line.removeprefix("PAMName=") for line in lines if line.startswith("PAMName="))
    assert re.search(rf"sudo useradd .*\b{user}\b", text)
    assert "sudo apt install cage xwayland wget" in text  # Cage 0.1.4 ends without Xwayland
    assert re.search(rf"`/etc/pam\.d/{session}`:\n\n```\n[^`]*pam_systemd\.so", text)
