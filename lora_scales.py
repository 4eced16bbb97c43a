"""How strongly a LoRA's layers count where no alpha tensor says it: PEFT keeps alpha in metadata or in a JSON file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError

RAW_PEFT = "base_model.model."  # PEFT's own save: the module inside its wrapper, and the alpha in a JSON file


class Scales:
    """alpha / rank for modules whose alpha is not a tensor: PEFT keeps it in metadata or in adapter_config.json."""

    def __init__(self, path: Path, metadata: Mapping[str, str], raw_peft: bool) -> None:
        self._path, self._config = path, dict[str, Any]()
        if "lora_adapter_metadata" in metadata:  # diffusers' save_lora_weights: {'unet.lora_alpha': 8, ...}
            self._config = _config(path, metadata["lora_adapter_metadata"])
        elif raw_peft:
            self._path = beside = path.with_name("adapter_config.json")
            if not beside.is_file():
                raise CheckpointError(
                    f"LoRA {path} is as PEFT saves it, and its alpha is in {beside.name}; put that beside it"
                )
            self._config = _config(beside, beside.read_text(encoding="utf-8", errors="replace"))

    def of(self, module: str, rank: int) -> float:
        """CheckpointError where the file says no finite number, or a pattern that is none."""
        prefix = next((p for p in ("unet.", "text_encoder.", "text_encoder_2.") if module.startswith(p)), "")
        name = module.removeprefix(RAW_PEFT).removeprefix(prefix)
        alpha = self._config.get(f"{prefix}lora_alpha", rank)
        patterns = self._config.get(f"{prefix}alpha_pattern") or {}
        try:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", name):  # PEFT's own rule (get_pattern_key)
                    alpha = value
            # rsLoRA: Kalajdzievski 2023, arXiv:2312.03732
            scale = float(alpha) / (rank**0.5 if self._config.get(f"{prefix}use_rslora", False) else rank)
        except (AttributeError, TypeError, ValueError, re.error):
            scale = math.nan
        if not math.isfinite(scale):
            raise CheckpointError(
                f"LoRA: {self._path} says no alpha for {module} (lora_alpha {alpha!r}, alpha_pattern {patterns!r}); "
                "it must be a finite number; fetch it again"
            )
        return scale


def _config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"LoRA: the configuration in {path} is no JSON object; fetch it again")
    return config
