"""LoRA files: which module each of their keys means, and the change of weight each asks for. numpy only.

Three spellings are read, and may be mixed: Kohya's (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, `.alpha`),
PEFT's (`unet.down_blocks.0....to_q.lora_A.weight`) and diffusers' older one (`...to_q.lora.down.weight`,
`...processor.to_q_lora.down.weight`). Modules may have diffusers' names or the original layout's (`input_blocks_4_1_...`),
which Kohya's scripts write for SDXL. The change is strength * alpha / rank * up @ down (Hu et al. 2021,
arXiv:2106.09685, section 4.1). Knows no torch and no ONNX: weights are names and shapes here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .ldm_names import ldm_names
from .lora_scales import RAW_PEFT, Scales
from .safetensors_file import read_float32

_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "alpha": "alpha"}
_KEY = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"  # PEFT puts the adapter's name ('default') between, or leaves it out
    r"|\.lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    r"|_lora\.(?P<processor>down|up)\.weight"
    r"|\.(?P<alpha>alpha))$"
)
_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
_TEXT_CHANNELS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # what a U-Net's cross-attention reads
_SHOWN = 3


class ModuleKey(NamedTuple):
    """Where a LoRA layer belongs. `name` has underscores for dots, because Kohya's keys have lost the difference."""

    part: str
    name: str


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank change of one weight. down: float32[rank, in, (kh, kw)], up: float32[out, rank, (1, 1)].

    `scale` is alpha / rank; 1 where the file names no alpha, which is what diffusers does too.
    """

    label: str
    down: NDArray[np.float32]
    up: NDArray[np.float32]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight this layer changes, without trailing ones: (out, in) or (out, in, kh, kw)."""
        return _squeezed((self.up.shape[0], *self.down.shape[1:]))

    def fits(self, shape: Iterable[int]) -> bool:
        return self.shape == _squeezed(shape)

    def delta(self, shape: tuple[int, ...], strength: float) -> NDArray[np.float32]:
        """What to add to the weight of this shape (torch's layout, [out, in, ...])."""
        rank = self.down.shape[0]
        up = self.up.reshape(-1, rank) * np.float32(strength * self.scale)
        change: NDArray[np.float32] = (up @ self.down.reshape(rank, -1)).astype(np.float32, copy=False)
        return change.reshape(shape)


@dataclass(frozen=True)
class Lora:
    path: Path
    layers: Mapping[ModuleKey, LoraLayer]


def read_lora(path: Path) -> Lora:
    """Parse a LoRA file. CheckpointError when it is not safetensors, is damaged, or holds keys of an unknown kind."""
    if not path.is_file():
        raise CheckpointError(f"LoRA {path} is not a file; give the path of its .safetensors file")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"LoRA {path} is not a .safetensors file; others are pickled and can run code when read: "
            "convert it to safetensors where you trust it"
        )
    tensors, metadata = read_float32(path)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    strange = []
    for key, value in tensors.items():
        if not np.isfinite(value).all():
            raise CheckpointError(
                f"LoRA {path}: {key} holds values that are not finite (NaN or infinity), as of a training that failed; "
                "use another file"
            )
        match = _KEY.match(key)
        role = match and next((r for r in match.groups()[1:] if r), None)
        if match is None or role is None:
            strange.append(key)
        else:
            roles = found.setdefault(_module(match), {})
            if _ROLES[role] in roles:
                raise CheckpointError(f"LoRA {path}: {key} is given twice, in two spellings")
            roles[_ROLES[role]] = value
    if strange or not found:
        raise CheckpointError(
            f"LoRA {path}: {len(strange)} of its {len(tensors)} keys are of an unknown kind"
            f"{', the first is ' + strange[0] if strange else ''}; known are lora_down/lora_up with alpha, "
            "lora_A/lora_B and lora.down/lora.up (no DoRA, LoHa, LoKr)"
        )
    scales = Scales(path, metadata, raw_peft=any(m.startswith(RAW_PEFT) for m in found))
    layers: dict[ModuleKey, LoraLayer] = {}
    for module, roles in found.items():
        place, layer = module_key(module), _layer(path, module, roles, scales)
        if place in layers:
            raise CheckpointError(f"LoRA {path}: {module} and {layers[place].label} are the same module, spelled twice")
        layers[place] = layer
    return Lora(path, layers)


def match_lora(lora: Lora, weights: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, dict[str, LoraLayer]]:
    """Find each layer's weight. `weights`: part -> weight name ('....to_q.weight') -> shape in torch's layout.

    Returns part -> weight name -> layer. CheckpointError if any layer fits nothing: no layer is dropped in silence.
    """
    modules = _modules(weights)
    matched: dict[str, dict[str, LoraLayer]] = {}
    faults = []
    for key, layer in lora.layers.items():
        # transformers 5 has dropped the 'text_model' level that checkpoints and Kohya's keys still name
        part, name = modules.get(key) or modules.get(ModuleKey(key.part, f"text_model_{key.name}")) or ("", "")
        if not name:
            faults.append(f"{layer.label} ({_x(layer.shape)}, no such module)")
        elif not layer.fits(weights[part][name]):
            faults.append(f"{layer.label} ({_x(layer.shape)} here, {_x(weights[part][name])} in the checkpoint)")
        elif name in matched.setdefault(part, {}):
            raise CheckpointError(
                f"LoRA {lora.path}: {layer.label} and {matched[part][name].label} are the same module, spelled twice"
            )
        else:
            matched[part][name] = layer
    if faults:
        more = "".join(f", then {fault}" for fault in faults[1:_SHOWN])
        more += f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(
            f"LoRA {lora.path}: {len(faults)} of its {len(lora.layers)} modules fit nothing in this checkpoint, the "
            f"first is {faults[0]}{more}; {len(lora.layers) - len(faults)} fit; {_made_for(lora, weights)}use a LoRA "
            "made for this architecture"
        )
    return matched


def _modules(weights: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[ModuleKey, tuple[str, str]]:
    """Every name that a module with a matrix or a kernel may have in a LoRA file -> its part and weight name."""
    found: dict[ModuleKey, tuple[str, str]] = {}
    for part, shapes in weights.items():
        names = [
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) in (2, 4)
        ]
        spellings = {name: name for name in names} | (
            {old: name for name, old in ldm_names(names).items()} if part == "unet" else {}
        )
        found |= {ModuleKey(part, s.replace(".", "_")): (part, f"{name}.weight") for s, name in spellings.items()}
    return found


def _made_for(lora: Lora, weights: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """'it is for SDXL, this is SD 1.x; ' where both read text of a known width and the widths differ."""
    theirs = {layer.shape[1] for key, layer in lora.layers.items() if key.name.endswith("attn2_to_k")}
    ours = {shape[1] for name, shape in weights.get("unet", {}).items() if name.endswith("attn2.to_k.weight")}
    named = [next((_TEXT_CHANNELS[n] for n in sorted(widths) if n in _TEXT_CHANNELS), "") for widths in (theirs, ours)]
    return f"it is for {named[0]}, this is {named[1]}; " if all(named) and named[0] != named[1] else ""


def module_key(module: str) -> ModuleKey:
    """'unet.mid_block.resnets.0.conv1' or 'lora_unet_mid_block_resnets_0_conv1' -> ('unet', 'mid_block_...conv1')."""
    module = module.removeprefix(RAW_PEFT)
    prefix = next((p for p in _PARTS if module.startswith(p)), "")
    return ModuleKey(_PARTS.get(prefix, "unet"), module.removeprefix(prefix).replace(".", "_"))


def _module(match: re.Match[str]) -> str:
    module = match["module"]
    if match["processor"]:  # diffusers before 0.22 kept LoRA in attention processors: '....attn1.processor.to_out_lora'
        module = module.replace(".processor.", ".")
        module += ".0" if module.endswith(".to_out") else ""
    return module


def _layer(path: Path, module: str, roles: dict[str, NDArray[np.float32]], scales: Scales) -> LoraLayer:
    down, up = roles.get("down"), roles.get("up")
    if down is None or up is None:
        raise CheckpointError(
            f"LoRA {path}: {module} lacks its {'down' if down is None else 'up'} weight; fetch it again"
        )
    rank = down.shape[0] if down.ndim >= 2 else 0
    if rank < 1 or up.ndim < 2 or up.size != up.shape[0] * rank:
        raise CheckpointError(
            f"LoRA {path}: {module} has down {_x(down.shape)} and up {_x(up.shape)}, which do not multiply"
        )
    if "alpha" in roles and roles["alpha"].size != 1:
        raise CheckpointError(
            f"LoRA {path}: the alpha of {module} has {roles['alpha'].size} values; it must be one number"
        )
    alpha = float(roles["alpha"].item()) if "alpha" in roles else None
    return LoraLayer(module, down, up, scales.of(module, rank) if alpha is None else alpha / rank)


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """(8, 4, 1, 1) -> (8, 4): a 1x1 convolution and a linear layer have the same weights."""
    shape = tuple(shape)
    return shape[:2] if shape[2:] == (1, 1) else shape


def _x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
