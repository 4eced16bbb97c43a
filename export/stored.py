"""Weights that mean something else than their numbers say: of models that don't predict noise, and in eight bits.

How single files are marked: ComfyUI's `supported_models.py` and `nodes_model_merging.py`, sd-scripts' metadata, and
https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from .modules import NOT_WEIGHTS

FLOATS = ("F64", "F32", "F16", "BF16")
_TENSORS = {
    "edm_mean": "an EDM model, as Playground 2.5 is",
    "edm_std": "an EDM model, as Playground 2.5 is",
    "edm_vpred.sigma_max": "an EDM model that predicts velocity, as CosXL is",
    "edm_vpred.sigma_min": "an EDM model that predicts velocity, as CosXL is",
    "v_pred": "a model that predicts velocity",
    "ztsnr": "a model trained to a terminal signal-to-noise ratio of zero",
}
_PREDICTION = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_FLAGS = {
    "ss_v_parameterization": "a model that predicts velocity",
    "ss_zero_terminal_snr": "a model trained to a terminal signal-to-noise ratio of zero",
}


def check_predicts_noise(path: object, names: Iterable[str], metadata: Mapping[str, str]) -> None:
    """CheckpointError for a single file that is marked as of a model that does not predict noise."""
    found = set(names)
    marks = [(name, what) for name, what in _TENSORS.items() if name in found]
    marks += [
        (f"{key}: {metadata[key]}", f"a model that predicts {metadata[key]!r}")
        for key in _PREDICTION
        if metadata.get(key, "").strip().lower() not in ("", "none", "eps", "epsilon")
    ]
    marks += [(key, what) for key, what in _FLAGS.items() if metadata.get(key, "").strip().lower() in ("true", "1")]
    if not marks:
        return
    mark, what = marks[0]
    if mark.startswith("edm"):
        cure = "models with other noise levels than Stable Diffusion's are not exported"
    else:
        cure = (
            "of single files those that predict noise are exported: convert it to a diffusers folder whose "
            'scheduler_config.json says "prediction_type": "v_prediction" (and "rescale_betas_zero_snr": true where the '
            "model needs it)"
        )
    raise CheckpointError(f"{path} is marked as {what} ({mark}); {cure}")


def check_stored(path: object, dtypes: Mapping[str, str]) -> None:
    """CheckpointError for weights that are stored as other numbers than floats of 16 bits and more.

    Integers and eight-bit floats need scales that files keep in many ways; read without, they are another model.
    dtypes: name -> dtype, as safetensors spells it.
    """
    for name, dtype in dtypes.items():
        if dtype not in FLOATS and not name.endswith(NOT_WEIGHTS):
            raise CheckpointError(
                f"{path}: {name} is stored as {dtype}; exported are {', '.join(FLOATS)}: use the model's fp16 or fp32 "
                "file, --weights int8 stores it in eight bits"
            )
