"""The environments that the Makefile makes: onnxruntime and onnxruntime-gpu overwrite each other's files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vega_edge

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(vega_edge.__file__).parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def commands(target, environment):
    """What `make` would run for it, where the environment does not exist."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    told = ["make", "--dry-run", "--assume-new=pyproject.toml", target]
    lines = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.startswith(environment)]


def runtimes(lines):
    """The onnxruntime packages that are there in the end, by what pip is told."""
    there = set()
    for line in lines:
        if " pip install " in line:
            for extra in ",".join(re.findall(r"\.\[([^\]]*)\]", line)).split(","):
                there |= {
                    name
                    for each in EXTRAS.get(extra, ())
                    if (name := re.match(r"[\w.-]+", each)[0]).startswith("onnxruntime")
                }
        elif " pip uninstall " in line:
            there -= set(line.split())
    return there


@pytest.mark.parametrize(
    ("target", "environment", "runtime"),
    [
        ("demo", ".venv/", "onnxruntime"),
        ("test", ".venv-test/", "onnxruntime"),
        ("test-gpu", ".venv-gpu/", "onnxruntime-gpu"),
    ],
)
def test_each_environment_has_one_onnxruntime(target, environment, runtime):
    assert runtimes(commands(target, environment)) == {runtime}


def test_on_a_gpu_every_engine_that_is_there_runs_the_parametrised_tests():
    told = commands("test-gpu", ".venv-gpu/")[-1].split(" -m pytest ")[1].split()
    assert told == ["tests/test_gpu.py", "tests/test_gpu_plans.py", "tests/test_engines.py"]
