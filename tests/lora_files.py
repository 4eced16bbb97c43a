"""LoRA files of random numbers in the spellings that are found in the wild, written as data: no LoRA library takes part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Shapes = Mapping[str, Mapping[str, Sequence[int]]]  # part: weight: shape
STYLES = ("kohya", "peft", "diffusers")
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def write_loras(
    folder: Path, shapes: Shapes, targets: Mapping[str, Sequence[str]], rank: int, alpha: int
) -> dict[str, Path]:
    """Write one LoRA over the modules whose names end with a part's targets, in each style. Return the files.

    Alpha is a tensor in kohya's spelling and metadata in PEFT's, as diffusers saves it. diffusers' older spelling has no
    place for it, so there it is as if alpha were the rank.
    """
    random = np.random.default_rng(1)
    styles: dict[str, dict[str, NDArray[np.float32]]] = {style: {} for style in STYLES}
    metadata: dict[str, Any] = {}
    for part, endings in targets.items():
        metadata |= {f"{part}.r": rank, f"{part}.lora_alpha": alpha, f"{part}.target_modules": list(endings)}
        for name, shape in shapes[part].items():
            module = name.removesuffix(".weight")
            if module == name or not any(f".{module}".endswith(f".{ending}") for ending in endings):
                continue
            out, inside, *kernel = shape
            down = random.standard_normal((rank, inside, *kernel), np.float32) * np.float32(0.1)
            up = random.standard_normal((out, rank, *(1 for _ in kernel)), np.float32) * np.float32(0.1)
            flat = f"{KOHYA[part]}_{module.replace('.', '_')}"
            styles["kohya"] |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            styles["kohya"][f"{flat}.alpha"] = np.array(alpha, np.float32)
            styles["peft"] |= {f"{part}.{module}.lora_A.weight": down, f"{part}.{module}.lora_B.weight": up}
            old = f"{part}.{module}.{'lora' if part == 'unet' else 'lora_linear_layer'}"
            styles["diffusers"] |= {f"{old}.down.weight": down, f"{old}.up.weight": up}
    paths = {style: folder / f"{style}.safetensors" for style in STYLES}
    for style, tensors in styles.items():
        more = {"lora_adapter_metadata": json.dumps(metadata)} if style == "peft" else {}
        save_file(tensors, paths[style], {"format": "pt", **more})
    return paths
