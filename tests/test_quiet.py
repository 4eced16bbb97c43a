"""Nothing is sent and nothing is left outside of our own folders, by us or by the libraries that we load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from vega_edge.engines import ENGINES, available, runs_on_cpu
from vega_edge.telemetry import OFF

from . import watching
from .serve_running import free_port
from .watching import RESOLVER, Seen, read_strace, watched

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="watches processes as POSIX systems have them")
CPU = tuple(name for name in ENGINES if runs_on_cpu(name))
SMALL = {"prompt": "a star", "num_inference_steps": 1, "img_width": 64, "img_height": 64}
STATES = {state.name: state for state in available()}


class Place:
    """An empty home, an empty folder to work in and one for temporary files; `run` runs `vega-edge` there, watched."""

    def __init__(self, root: Path) -> None:
        self.home, self.work, self.temporary = root / "home", root / "work", root / "temporary"
        for folder in (self.home, self.work, self.temporary):
            folder.mkdir()

    @property
    def env(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
        return {**kept, "HOME": str(self.home), "TMPDIR": str(self.temporary)}

    def run(self, *arguments: str, **env: str) -> Seen:
        with watched(["-m", "vega_edge", *arguments], self.work, {**self.env, **env}) as (_, seen):
            pass
        return seen

    def left(self) -> list[Path]:
        """What lies in the home, apart from our own folder."""
        files = (path.relative_to(self.home) for path in self.home.rglob("*"))
        ours = Path(".cache", "vega-edge")
        return sorted(path for path in files if path not in (ours, ours.parent) and ours not in path.parents)

    def check(self, seen: Seen) -> None:
        assert seen.contacts == []
        assert self.left() == []
        ours = self.home / ".cache" / "vega-edge"
        assert set(seen.written_outside(ours, self.work, self.temporary)) <= {ours.parent}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module", params=CPU)
def engine(request: pytest.FixtureRequest) -> str:
    if not STATES[request.param].ok:
        pytest.skip(STATES[request.param].why_not)
    return str(request.param)


@pytest.fixture(scope="module")
def place_of(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One for each engine: what it compiled for the first test is there for the next."""
    return Place(tmp_path_factory.mktemp(engine))


def test_the_watcher_sees_lookups_contacts_and_files(place: Place) -> None:
    code = (
        "import os, socket\n"
        "try: socket.getaddrinfo('example.invalid', 80)\n"
        "except OSError: pass\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "try: s.connect(('192.0.2.1', 9))\n"
        "except OSError: pass\n"
        "open(os.path.expanduser('~/left'), 'w').close()\n"
    )
    with watched(["-c", code], place.work, place.env) as (_, seen):
        pass
    assert seen.status == 0
    told = " ".join(seen.contacts)
    assert "192.0.2.1" in told and any(each in told for each in (":53", "example.invalid", RESOLVER))
    assert place.home / "left" in seen.written_outside(place.work, place.temporary)
    assert place.left() == [Path("left")]


def test_a_lookup_through_the_systems_resolver_is_seen() -> None:
    """nss-resolve asks by a socket of the system's; neither port 53 nor the name is in what strace shows."""
    start = "466   connect(3<socket:[148872]>, {sa_family=AF_UNIX, sun_path="
    seen = Seen()
    for path in ("/var/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"):
        read_strace([f'{start}"{path}"}}, 42) = 0'], seen, Path("/"))
    assert seen.contacts == [RESOLVER]


def test_two_processes_are_watched_in_one_folder(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "has_strace", lambda: False)
    for name in ("one", "two"):
        with watched(["-c", f"open({name!r}, 'w').close()"], place.work, place.env) as (_, seen):
            pass
        assert (seen.status, seen.stderr) == (0, "") and place.work / name in seen.written


def test_generate(place_of: Place, engine: str) -> None:
    seen = place_of.run("generate", "a star", "--steps", "1", "--size", "64x64", "--engine", engine, "-o", "star.png")
    assert seen.status == 0, seen.stderr
    assert [path.name for path in place_of.work.iterdir()] == ["star.png"]
    place_of.check(seen)


def test_verify(place_of: Place, engine: str) -> None:
    seen = place_of.run("verify", "demo-vegart", "--engine", engine)
    assert seen.status == 0, seen.stderr
    place_of.check(seen)


def test_doctor(place: Place) -> None:
    seen = place.run("doctor", "demo-vegart", "--json")
    assert seen.status == 0, seen.stderr
    assert {state["name"]: state["ok"] for state in json.loads(seen.stdout)["engines"]} == {
        name: state.ok for name, state in STATES.items()
    }
    place.check(seen)


def test_export_of_a_local_folder(place: Place, checkpoint: Path) -> None:
    seen = place.run("export", str(checkpoint), "-o", "bundle")
    assert seen.status == 0, seen.stderr
    assert (place.work / "bundle" / "vega-edge.json").is_file()
    assert list(place.temporary.iterdir()) == []
    place.check(seen)


def test_serve(place_of: Place, engine: str) -> None:
    port = free_port()
    command = ["-m", "vega_edge", "serve", "--port", str(port), "--engine", engine, "--preload", "demo-vegart"]
    with watched(command, place_of.work, place_of.env) as (process, seen):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            _until(http, "/readyz", process)
            assert http.post("/v1/demo-vegart", json=SMALL).headers["content-type"].startswith("image/")
        os.killpg(process.pid, signal.SIGINT)
    assert seen.status in (0, 130), seen.stderr
    place_of.check(seen)


def _until(http: httpx.Client, path: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None and time.monotonic() < end
        try:
            if http.get(path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


@pytest.mark.parametrize("home", ["a file", "below a file", "/proc", "none is known"])
@pytest.mark.parametrize("engine", ["onnxruntime-cpu", "openvino"])
def test_a_home_where_nothing_can_be_kept(place: Place, home: str, engine: str) -> None:
    """No library has anything to say; we do, where something is worse for it, in one line for each thing."""
    if not STATES[engine].ok:
        pytest.skip(STATES[engine].why_not)
    arguments = ["generate", "a star", "--steps", "1", "--size", "64x64", "--engine", engine, "-o", "star.png"]
    seen = run_at_home(place, home, arguments)
    assert all(line.startswith(("vega-edge: ", "demo-vegart on ")) for line in lines_of(seen))
    if home == "none is known":
        assert (seen.status, len(lines_of(seen))) == (1, 1) and "VEGA_EDGE_HOME" in seen.stderr
    else:
        assert seen.status == 0 and (place.work / "star.png").is_file()
        assert ("is not kept" in seen.stderr) == (engine == "openvino")
    assert seen.contacts == []


@pytest.mark.parametrize("home", ["a file", "below a file", "/proc", "none is known"])
@pytest.mark.parametrize("verb", ["doctor", "models", "verify demo-vegart"])
def test_other_verbs_there(place: Place, home: str, verb: str) -> None:
    seen = run_at_home(place, home, verb.split())
    expected = (1, 1) if home == "none is known" else (0, 0)
    assert (seen.status, len(lines_of(seen))) == expected, seen.stderr
    assert seen.contacts == []


def test_a_server_without_a_home_draws_and_says_what_it_can_not_keep(place: Place) -> None:
    port = free_port()
    command = ["-m", "vega_edge", "serve", "--port", str(port), "--engine", "onnxruntime-cpu"]
    with watched(command, place.work, {**place.env, "HOME": os.devnull}) as (process, seen):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            _until(http, "/healthz", process)
            assert http.post("/v1/demo-vegart", json=SMALL).headers["content-type"].startswith("image/")
        os.killpg(process.pid, signal.SIGINT)
    told = [line for line in lines_of(seen) if not line.startswith("{")]  # a request is a line of JSON
    assert len(told) == 3 and all(line.startswith("vega-edge: ") for line in told)
    assert [
        text
        for text in ("the live page is at", "v2 jobs are not accepted now", "interrupted")
        if text not in seen.stderr
    ] == []


def run_at_home(place: Place, home: str, arguments: list[str]) -> Seen:
    file = place.home / "file"
    file.touch()
    if home != "none is known":
        return place.run(*arguments, HOME={"a file": str(file), "below a file": str(file / "x")}.get(home, home))
    code = (  # as a user that the system's list has not
        "import os, pwd, sys\n"
        "del os.environ['HOME']\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from vega_edge.cli import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    with watched(["-c", code], place.work, place.env) as (_, seen):
        pass
    return seen


def lines_of(seen: Seen) -> list[str]:
    return seen.stderr.splitlines()


def test_what_the_user_decided_about_telemetry_stays() -> None:
    code = f"import os, vega_edge; print(*[os.environ[name] for name in {OFF}])"
    kept = {name: value for name, value in os.environ.items() if name not in OFF}
    for chosen in (None, *OFF):
        env = kept | ({chosen: "0"} if chosen else {})
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.split() == ["0" if name == chosen else "1" for name in OFF]


def test_a_program_of_its_own_can_use_openvino_and_its_telemetry(tmp_path: Path) -> None:
    """After ours: the package is there to be imported, and what OpenVINO took in its place does for all of its calls."""
    if not STATES["openvino"].ok:
        pytest.skip(STATES["openvino"].why_not)
    graph = Path("demo", "bundles", "demo-vegart", "tiny_vae_decoder", "model.onnx")
    code = (
        "from pathlib import Path\nimport sys, vega_edge\nimport vega_edge.engines.openvino\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        f"import openvino; openvino.convert_model(Path(vega_edge.__file__).parent / {str(graph)!r})\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "from openvino_telemetry import Telemetry\n"
    )
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("CI", None)
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert list(tmp_path.iterdir()) == []
    code = "import openvino_telemetry as before, vega_edge.engines.openvino, sys; assert sys.modules['openvino_telemetry'] is before"
    subprocess.run([sys.executable, "-c", code], env={**env, "CI": "true"}, check=True)
