"""Single-file checkpoints in the original SD 1.5 / SDXL layout, as most community models come: one part at a time.

diffusers' own conversion functions rename the weights; which architecture it is, is seen in their names and shapes. The
file is mapped, not read: a part's weights are in memory only while that part is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..models.architectures import Architecture
from ..safetensors_file import read_header
from .modules import NOT_WEIGHTS, misfits, new_module, published_name
from .pickles import read_pickle, stored_dtype
from .quiet import quiet
from .stored import check_predicts_noise, check_stored

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}


class SingleFile:
    """A `checkpoint.Loader` for the parts of `architecture` that a file holds.

    shapes: the file's, from its header (see `file_shapes`).
    """

    def __init__(self, path: Path, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self._architecture, self._file_shapes = path, architecture, shapes

    def check(self) -> None:
        """CheckpointError if a part is missing, or has other weights than its network, by name or by shape."""
        for part in self._architecture.parts:
            if not any(_belongs(part, name) for name in self._file_shapes):
                raise CheckpointError(
                    f"{self.path} holds no {part} (no {'* or '.join(PREFIXES[part])}*); use a complete checkpoint"
                )
            faults = misfits(part, self._architecture.config(part), self.shapes(part))
            if faults:
                name, fault = next(iter(faults.items()))
                raise CheckpointError(
                    f"{self.path}: {len(faults)} weights of {part} are not {self._architecture.name}'s, the first is "
                    f"{name} ({fault}); use a checkpoint of a known architecture"
                )

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        import torch

        shapes = {name: shape for name, shape in self._file_shapes.items() if _belongs(part, name)}
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return {name: tuple(tensor.shape) for name, tensor in self._convert(part, tensors).items()}

    def load(self, part: str) -> nn.Module:
        """In the precision of the file, float32 where it has several."""
        import torch

        module = new_module(part, self._architecture.config(part))
        with _reader(self.path) as read:
            tensors = {name: read(name) for name in self._file_shapes if _belongs(part, name)}
            kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
            dtype = kinds.pop() if len(kinds) == 1 and kinds <= {torch.float16, torch.bfloat16} else torch.float32
            converted = self._convert(part, tensors)
            own = {published_name(part, name): name for name in module.state_dict()}
            state = {own[name]: tensor.to(dtype).contiguous() for name, tensor in converted.items()}
        module.load_state_dict(state, assign=True)
        return module

    def _convert(self, part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The original layout's names to the published diffusers names."""
        from diffusers.loaders import single_file_utils as ldm

        config = self._architecture.config(part)
        with quiet():
            if part == "unet":
                converted = ldm.convert_ldm_unet_checkpoint(tensors, config)
            elif part == "vae":
                converted = ldm.convert_ldm_vae_checkpoint(tensors, config)
            elif part == "text_encoder":
                converted = ldm.convert_ldm_clip_checkpoint(tensors)
            else:
                (prefix,) = PREFIXES[part]
                converted = ldm.convert_open_clip_checkpoint(new_module(part, config), tensors, prefix)
        kept = {n: t for n, t in converted.items() if not n.endswith(NOT_WEIGHTS)}
        return {published_name(part, name): tensor for name, tensor in kept.items()}


def file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a .safetensors or pickled file, from its header.

    CheckpointError for a file of a model that does not predict noise, or whose weights are not stored as floats.
    """
    if path.suffix == ".safetensors":
        header = read_header(path)
        shapes, metadata = {name: entry.shape for name, entry in header.entries.items()}, header.metadata
        dtypes = {name: entry.dtype for name, entry in header.entries.items()}
    else:
        tensors = read_pickle(path, "meta")
        shapes, metadata = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {}
        dtypes = {name: stored_dtype(tensor) for name, tensor in tensors.items()}
    check_predicts_noise(path, shapes, metadata)
    check_stored(path, {name: dtypes[name] for name in shapes if any(_belongs(part, name) for part in PREFIXES)})
    return shapes


@contextmanager
def _reader(path: Path) -> Iterator[Callable[[str], Any]]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            yield file.get_tensor
    else:
        yield read_pickle(path).__getitem__


def _belongs(part: str, name: str) -> bool:
    return name.startswith(PREFIXES[part]) and not name.endswith(NOT_WEIGHTS)
