"""What an export will need, known from the files' headers before it starts: disk for the bundle, memory for a part."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..errors import ExportError
from .checkpoint import Checkpoint
from .precision import BYTES, Precision

# Measured by bench/export.py in fp16 (1.24 for Vega's U-Net, 1.15 for SDXL's): weights once, what is widened of them while
# they are checked, and what torch itself takes.
MEMORY_PER_WEIGHT, MEMORY_BASE = 1.3, 900_000_000
LOADED_BYTES = 2  # of a number as it is loaded: those to be stored in eight bits are there in sixteen first
DISK_SLACK = 1.02  # graphs, tokenizers


def bundle_parts(checkpoint: Checkpoint, vae: str) -> list[str]:
    """The folders of the bundle that hold graphs, in the order in which they are made."""
    encoders = [part for part in checkpoint.parts if part.startswith("text_encoder")]
    beside = ["tiny_vae_decoder"] if "tiny_vae" in checkpoint.parts and vae == "full" else []
    return [*encoders, "vae_encoder", "vae_decoder", *beside, "unet"]


def check_room(checkpoint: Checkpoint, precision: Precision, parts: list[str], out: Path) -> None:
    """ExportError if the disk or the memory is too small for the parts that are still to be made."""
    if not parts:
        return
    sizes = part_bytes(checkpoint, precision, parts)
    disk, free = int(sum(sizes.values()) * DISK_SLACK), shutil.disk_usage(out.absolute().parent).free
    if disk > free:
        raise ExportError(
            f"exporting to {out} takes {_size(disk)} of disk, {_size(free)} are free there; free some, "
            "choose another disk, or store less: --weights fp16 or int8"
        )
    part = max(sizes, key=lambda name: sizes[name])
    loaded = sizes[part] // BYTES[precision.weights] * max(LOADED_BYTES, BYTES[precision.weights])
    memory, available = int(loaded * MEMORY_PER_WEIGHT) + MEMORY_BASE, _available_memory()
    if memory > available:
        raise ExportError(
            f"exporting {part} takes {_size(memory)} of memory, {_size(available)} are available; close other programs"
            + (", or store less: --weights fp16" if BYTES[precision.weights] > LOADED_BYTES else "")
        )


def fits_in_memory(extra: int) -> bool:
    """Whether `extra` bytes leave as much memory as is kept for what torch takes; swap does not count."""
    import psutil

    return extra + MEMORY_BASE <= int(psutil.virtual_memory().available)


def part_bytes(checkpoint: Checkpoint, precision: Precision, parts: list[str]) -> dict[str, int]:
    """Bytes of each bundle part's weights as they will be stored."""
    each = BYTES[precision.weights]
    return {part: sum(_elements(checkpoint, part).values()) * each for part in parts}


def _elements(checkpoint: Checkpoint, part: str) -> Mapping[str, int]:
    if part == "tiny_vae_decoder":
        source, half = "tiny_vae", "decoder."
    elif part.startswith("vae_"):
        source, half = "vae", part.removeprefix("vae_") + "."
    else:
        source, half = part, ""
    shapes = checkpoint.weight_shapes(source)
    return {name: math.prod(shape) for name, shape in shapes.items() if name.startswith(half)}


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available) + int(psutil.swap_memory().free)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
