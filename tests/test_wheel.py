"""What the wheel carries beside Python: the packaged bundle, the recipes, the server's page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import vega_edge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(vega_edge.__file__).parent
DATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def tracked(*folders: str) -> set[str]:
    """What git knows there: a file that was forgotten in pyproject.toml is there, one of a test run is not."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    told = subprocess.run(["git", "ls-files", "--", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(told.stdout.splitlines())


def carried() -> set[str]:
    """The data files that setuptools takes: its patterns are relative to a package's folder, ** is any depth."""
    found: set[str] = set()
    for package, patterns in DATA["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        found |= {p.relative_to(ROOT).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    return found


def test_the_wheel_carries_what_the_package_reads() -> None:
    needed = {name for name in tracked("models", "serve", "demo/bundles", "py.typed") if not name.endswith(".py")}
    assert {"demo/bundles/demo-vegart/unet/model.onnx_data", "models/demo-vegart.json", "py.typed"} <= needed
    assert "serve/api_pages.json" in needed and any(name.startswith("serve/page/") for name in needed)
    assert needed - carried() == set()


def test_the_wheel_carries_no_checkpoint_and_no_result() -> None:
    assert not [name for name in carried() if name.startswith(("demo/weights", "bench", "tests", "docs"))]
    assert sum((ROOT / name).stat().st_size for name in carried()) < 16e6


def test_every_package_is_listed() -> None:
    """A folder that is forgotten in pyproject.toml is missing in every install but an editable one."""
    folders = {Path(name).parent for name in tracked("*.py")}
    modules = {folder for folder in folders if folder.parts[:1] not in (("tests",), ("benchmarks",), ("pins",))}
    assert {".".join(("vega_edge", *folder.parts)) for folder in modules} == set(DATA["packages"])
