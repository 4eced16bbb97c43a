"""Pickled weights (.bin, .ckpt), read only where the user allowed it, and only with torch's `weights_only`.

That unpickler knows tensors and plain containers and refuses everything else, so a file can't name code to run.
https://docs.pytorch.org/docs/stable/generated/torch.load.html
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .packages import require

if TYPE_CHECKING:
    import torch


def read_pickle(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a file by name; device "meta" gives their shapes only. A .ckpt has them under "state_dict"."""
    require("torch")
    import torch

    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch it again")
    try:
        value: Any = torch.load(path, map_location=device, weights_only=True, mmap=_can_map(path))
    except Exception as failure:  # torch raises half a dozen kinds for a damaged file, and its own for a refused one
        text = str(failure)
        if "Unsupported" in text or "weights_only" in text or "WeightsUnpickler" in text:
            raise CheckpointError(
                f"{path} holds more than weights, which torch's weights_only refuses; use a .safetensors version, or "
                "convert it where you trust it"
            ) from None
        raise CheckpointError(f"{path} is damaged, or no file of weights; fetch it again") from None
    value = value.get("state_dict", value) if isinstance(value, dict) else value
    tensors = {k: v for k, v in value.items() if isinstance(v, torch.Tensor)} if isinstance(value, dict) else {}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights; expected tensors by name, or a state_dict of them")
    return tensors


def pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in read_pickle(path, "meta").items()}


def pickled_dtypes(path: Path) -> dict[str, str]:
    """Name -> dtype, as safetensors spells it."""
    return {name: stored_dtype(tensor) for name, tensor in read_pickle(path, "meta").items()}


def stored_dtype(tensor: torch.Tensor) -> str:
    """'F16' of torch.float16; others than the floats of 16 bits and more by torch's own name."""
    name = str(tensor.dtype).removeprefix("torch.")
    return {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(name, name)


def _can_map(path: Path) -> bool:
    """torch 1.6 and newer write zip files, which need not be read whole; the first SD checkpoints are older."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
