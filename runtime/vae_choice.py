"""Which of a bundle's decoders makes the pictures, and which the previews."""

from __future__ import annotations

from ..bundle import Bundle
from ..errors import BundleError
from .decoder import Decoder
from .parts import Parts

_TINY = "tiny_vae_decoder"


def find_decoders(parts: Parts, vae: str) -> tuple[Decoder, Decoder]:
    """(for pictures, for previews): previews come from the tiny one wherever there is one. BundleError if "tiny" is
    asked of a bundle without. One whose only decoder is a tiny one has that for both.
    """
    bundle = parts.bundle
    if _has_tiny(bundle):
        tiny = Decoder(parts, _TINY)
        return (tiny if vae == "tiny" else Decoder(parts)), tiny
    full = Decoder(parts)
    if vae == "tiny" and not (bundle.manifest and bundle.manifest.source.vae == "tiny"):
        raise BundleError(
            f"bundle {bundle.path} has no tiny decoder; export it again with one: vega-edge export MODEL -o BUNDLE "
            "--tiny-vae FOLDER"
        )
    return full, full


def unused_parts(bundle: Bundle, vae: str) -> frozenset[str]:
    """Those that no picture of `find_decoders`' choice needs."""
    return frozenset({"vae_decoder"} if vae == "tiny" and _has_tiny(bundle) else ())


def _has_tiny(bundle: Bundle) -> bool:
    return any(bundle.has(f"{_TINY}/{file}") for file in ("pixels.onnx", "model.onnx"))
