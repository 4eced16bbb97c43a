"""The original layout's names, against diffusers' own conversion on every real network (on the meta device)."""

from __future__ import annotations

import pytest

from vega_edge.ldm_names import ldm_names
from vega_edge.models.architectures import Architecture, architectures

pytest.importorskip("torch")

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from vega_edge.export.modules import new_module


@pytest.mark.parametrize("architecture", architectures().values(), ids=lambda a: a.name)
def test_names_agree_with_diffusers(architecture: Architecture) -> None:
    module = new_module("unet", architecture.config("unet"))
    parameters = dict(module.named_parameters())
    split = {name: name.rpartition(".") for name in parameters}
    names = ldm_names({owner for owner, _, _ in split.values()})
    original = {f"model.diffusion_model.{names[o]}.{kind}": parameters[n] for n, (o, _, kind) in split.items()}
    assert len(original) == len(parameters)
    back = convert_ldm_unet_checkpoint(original, module.config)
    assert {name: id(tensor) for name, tensor in back.items()} == {n: id(t) for n, t in parameters.items()}
    matrices = {owner for name, (owner, _, kind) in split.items() if kind == "weight" and parameters[name].ndim > 1}
    assert ldm_names(matrices) == {owner: names[owner] for owner in matrices}  # what a LoRA may touch is enough
