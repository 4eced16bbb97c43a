"""Checkpoint to bundle: the only package of the runtime's wheel that needs torch, and only while it exports.

`export_bundle` does the whole way; `format_report` says how it went.
"""

from __future__ import annotations

from .report import ExportReport, PartReport, Progress, format_report
from .sources import ModelSource, lora_places, model_source, tiny_vae_place
from .writer import export_bundle

__all__ = ["ExportReport", "ModelSource", "PartReport", "Progress", "export_bundle", "format_report"]
__all__ += ["lora_places", "model_source", "tiny_vae_place"]
