"""What optimum-onnx does, in an environment of its own: `python interop_peer.py export|draw FOLDER ...`. No test.

export CHECKPOINT OUT      a diffusers checkpoint to ONNX, by optimum's exporter
draw BUNDLE OUT.npy        latents and picture of a bundle in optimum's pipeline, for the request in interop.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch


def export(checkpoint: str, out: str) -> None:
    from optimum.exporters.onnx import main_export

    main_export(checkpoint, out, task="text-to-image", dtype="fp32", do_validation=False, no_post_process=True)


def draw(bundle: str, out: str) -> None:
    from optimum.onnxruntime import ORTDiffusionPipeline

    request = json.loads(Path(__file__).with_name("interop.json").read_text())
    pipe = ORTDiffusionPipeline.from_pretrained(bundle)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        request["prompt"], num_inference_steps=request["steps"], guidance_scale=request["guidance"],
        height=request["size"], width=request["size"], generator=torch.Generator().manual_seed(request["seed"]),
        output_type="np",
    ).images  # fmt: skip
    np.save(out, picture)


if __name__ == "__main__":
    {"export": export, "draw": draw}[sys.argv[1]](*sys.argv[2:])
