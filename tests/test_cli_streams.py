"""The command line where its standard streams are closed, and where Ctrl-C comes before it is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

posix = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes the streams")
DRAW = ["generate", "a star", "--seed", "7", "--steps", "1", "--engine", "onnxruntime-cpu", "-o", "star.png"]


def run(closed: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vega_edge", *arguments]
    return subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *command], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@posix
@pytest.mark.parametrize(
    ("closed", "arguments", "stdout"),
    [
        (">&-", [*DRAW, "--json"], ""),
        ("2>&-", DRAW, "star.png\n"),  # what is meant for stderr does not come out of stdout either
        ("<&- >&- 2>&-", DRAW, ""),
    ],
)
def test_closed_streams_take_no_picture_away(closed: str, arguments: list[str], stdout: str, tmp_path: Path) -> None:
    done = run(closed, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, stdout), done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "star.png").read_bytes()[:4] == b"\x89PNG"


@posix
def test_a_list_for_nobody(tmp_path: Path) -> None:
    done = run(">&-", "models", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@posix
def test_an_error_without_a_place_to_go(tmp_path: Path) -> None:
    done = run("2>&-", "generate", "a star", "--model", "none", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("module", ["vega_edge.cli", "vega_edge.verbs.serve"])
def test_ctrl_c_while_it_is_loaded_is_one_line(module: str) -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise KeyboardInterrupt\n"
        f"sys.modules.pop({module!r}, None)\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from vega_edge.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "models"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "vega-edge: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signal to send")
@pytest.mark.parametrize(("sent", "status"), [(True, 130), (False, 1)])
def test_ctrl_c_that_numpy_turns_into_a_failed_import_is_one_line(sent: bool, status: int) -> None:
    code = (
        "import os, signal, sys\n"
        "from vega_edge import cli\n"
        "from vega_edge.verbs import models\n"
        "def run(_):\n"
        "    try:\n"
        f"        if {sent}: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    raise ImportError('a bad install')\n"
        "models._models = run\n"
        "sys.exit(cli.main(['models']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status
    assert (done.stderr == "vega-edge: interrupted\n") == sent and ("a bad install" in done.stderr) != sent


def test_the_installed_command_is_the_quiet_one() -> None:
    import vega_edge

    project = (Path(vega_edge.__file__).parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '\nvega-edge = "vega_edge.__main__:main"\n' in project
