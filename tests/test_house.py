"""The house's own rules: who may import whom, what importing loads, and that nothing happens on import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vega_edge
from vega_edge import errors

ROOT = Path(vega_edge.__file__).parent
TORCH_ISLAND = {"torch", "diffusers", "transformers", "optimum", "peft", "onnxscript", "safetensors", "huggingface_hub"}
# What each floor may import of the project. Files at the root are floors of their own.
MAY_IMPORT = {
    "errors": set(),
    "telemetry": set(),
    "collector": set(),
    "records": set(),
    "whole_file": set(),
    "tiling": set(),
    "manifest": {"errors", "records"},
    "known_hashes": {"models", "whole_file"},
    "bundle": {"errors", "known_hashes", "manifest", "whole_file"},
    "safetensors_file": {"errors"},
    "ldm_names": set(),
    "lora_scales": {"errors"},
    "lora": {"errors", "ldm_names", "lora_scales", "safetensors_file"},
    "models": {"errors", "records"},
    "onnx_file": {"errors"},
    "engines": {
        "collector",
        "errors",
        "records",
        "known_hashes",
        "manifest",
        "models",
        "onnx_file",
        "telemetry",
        "whole_file",
    },
    "runtime": {"errors", "bundle", "lora", "manifest", "models", "onnx_file", "engines", "tiling", "whole_file"},
    "doctor": {"", "errors", "bundle", "manifest", "engines"},
    "verify": {"errors", "bundle", "engines", "manifest", "runtime"},
    "export": {
        "",
        "collector",
        "errors",
        "bundle",
        "lora",
        "manifest",
        "onnx_file",
        "models",
        "runtime",
        "safetensors_file",
        "engines",
        "tiling",
        "whole_file",
    },
    "serve": {"", "errors", "models", "runtime", "whole_file"},
    "verbs": {
        "",
        "bench",
        "errors",
        "bundle",
        "manifest",
        "models",
        "engines",
        "runtime",
        "export",
        "doctor",
        "verify",
        "serve",
    },
    "cli": {"", "errors", "verbs"},
    "demo": {"errors", "bundle", "models", "engines", "runtime"},
    "bench": {
        "",
        "doctor",
        "errors",
        "bundle",
        "models",
        "onnx_file",
        "safetensors_file",
        "engines",
        "runtime",
        "export",
        "demo",
        "serve",
    },
    "benchmarks": {"", "bench", "bundle", "cli", "engines", "errors", "export", "manifest", "models", "runtime"},
}


def modules() -> Iterator[tuple[Path, str]]:
    """Every file with the floor it stands on."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", "build") or any(p.startswith(".") for p in parts):
            continue
        yield path, parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, `vega_edge.x.y` for the project's own."""
    package = ("vega_edge", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize(("path", "floor"), list(modules()), ids=lambda v: str(v) if isinstance(v, str) else v.name)
def test_imports_point_down(path: Path, floor: str) -> None:
    if floor in ("__init__", "__main__"):
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "vega_edge":
            other = (
                pieces[1]
                if len(pieces) > 1 and ((ROOT / pieces[1]).is_dir() or (ROOT / f"{pieces[1]}.py").exists())
                else ""
            )
            assert other == floor or other in MAY_IMPORT[floor], f"{path.name} imports {name}"
            if floor == "runtime" and other == "engines":
                assert len(pieces) <= 3 and pieces[-1] not in ("onnxruntime", "openvino"), (
                    f"{path.name} knows a backend: {name}"
                )
        elif floor not in ("export", "bench", "benchmarks") and "train" not in path.parts:
            assert pieces[0] not in TORCH_ISLAND, f"{path.name} imports {name}"


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import vega_edge") & {"numpy", "PIL", "tokenizers", "onnxruntime", "openvino", "torch"}


def test_drawing_a_picture_loads_no_torch() -> None:
    loaded = loaded_by(
        "import vega_edge\nvega_edge.Pipeline.open('demo-vegart', engine='onnxruntime-cpu')('a star', steps=1)"
    )
    assert "onnxruntime" in loaded
    assert not loaded & TORCH_ISLAND


def test_public_names() -> None:
    assert vega_edge.Pipeline.__name__ == "Pipeline"
    for name in vega_edge.__all__:
        assert getattr(vega_edge, name) is not None
    tree = {name for name in vars(errors) if name.endswith("Error")}
    assert tree <= set(vega_edge.__all__) <= set(dir(vega_edge))
    assert issubclass(vega_edge.UsageError, vega_edge.VegaEdgeError)
    assert set(vega_edge.Request.__dataclass_fields__) - {"prompt"} <= set(
        re.findall(r"\w+", vega_edge.Pipeline.__call__.__doc__ or "")
    )
    with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
        vega_edge.Pipelin  # noqa: B018
