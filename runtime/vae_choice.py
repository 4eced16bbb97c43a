"""Which of a bundle's decoders makes the pictures, and which the previews."""

from __future__ import annotations

from ..errors import BundleError, unknown
from .decoder import Decoder
from .parts import Parts

VAES = ("full", "tiny")
_TINY = "tiny_vae_decoder"


def find_decoders(parts: Parts, vae: str) -> tuple[Decoder, Decoder]:
    """(for pictures, for previews): previews come from the tiny one wherever there is one. BundleError if "tiny" is
    asked of a bundle without. One whose only decoder is a tiny one has that for both.
    """
    if vae not in VAES:
        raise unknown("vae", vae, VAES)
    bundle = parts.bundle
    if any(bundle.has(f"{_TINY}/{file}") for file in ("pixels.onnx", "model.onnx")):
        tiny = Decoder(parts, _TINY)
        return (tiny if vae == "tiny" else Decoder(parts)), tiny
    full = Decoder(parts)
    if vae == "tiny" and not (bundle.manifest and bundle.manifest.source.vae == "tiny"):
        raise BundleError(
            f"bundle {bundle.path} has no tiny decoder; export it again with one: vega-edge export MODEL -o BUNDLE "
            "--tiny-vae FOLDER"
        )
    return full, full
