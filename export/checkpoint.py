"""A diffusers folder on disk: what is in it, whether it can be exported, and its parts as torch modules.

Everything that can be refused is refused from JSON and file headers, before a weight is read. Weights that are not in
the folder's safetensors files (a single file's, random ones) come from a `Loader`; `sources.py` puts them together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import ExportError
from ..lora import LoraLayer
from ..safetensors_file import read_header
from .config_check import check_config, check_same_latents, check_together, pipeline_fault
from .modules import CLASSES, misfits, published_name
from .pickles import pickled_dtypes, pickled_shapes
from .quiet import quiet
from .schedule_check import check_schedule
from .stored import check_stored
from .tokenizer_files import check_tokenizer
from .weight_files import choose_weights, expected, pickled

if TYPE_CHECKING:
    import torch
    from torch import nn

PIPELINES = {
    "StableDiffusionPipeline": ("text_encoder", "vae", "unet"),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2", "vae", "unet"),
}
_log = logging.getLogger(__name__)


class Loader(Protocol):
    """A part's weights from elsewhere than diffusers' files. Names are those of the published checkpoints."""

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]: ...

    def load(self, part: str) -> nn.Module: ...


@dataclass(frozen=True)
class Checkpoint:
    """A checked diffusers folder. `parts`: the parts to export -> their folders ('tiny_vae' may lie elsewhere).

    loaders: of the parts whose weights are elsewhere; those have no weight_files in diffusers' sense. pickles: the
    pickled files of parts that have no others. random_weights: the seed, where weights are made up.
    """

    path: Path
    model_index: Mapping[str, Any]
    parts: Mapping[str, Path]
    configs: Mapping[str, Mapping[str, Any]]
    weight_files: Mapping[str, tuple[Path, ...]] = field(repr=False)
    variant: Mapping[str, str | None] = field(repr=False)
    scheduler: Mapping[str, Any] = field(repr=False)
    loaders: Mapping[str, Loader] = field(default_factory=dict, repr=False)
    pickles: Mapping[str, tuple[Path, ...]] = field(default_factory=dict, repr=False)
    random_weights: int | None = None

    @property
    def sdxl(self) -> bool:
        """Two text encoders, size conditioning."""
        return "text_encoder_2" in self.parts

    def weight_shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Names (as the published checkpoints have them) and shapes, from the files' headers alone."""
        if part in self.loaders:
            return self.loaders[part].shapes(part)
        if part in self.pickles:
            return {published_name(part, n): s for path in self.pickles[part] for n, s in pickled_shapes(path).items()}
        headers = (read_header(path) for path in self.weight_files[part])
        return {published_name(part, name): e.shape for header in headers for name, e in header.entries.items()}


def open_checkpoint(
    path: Path,
    tiny_vae: Path | None = None,
    *,
    allow_pickle: bool = False,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Checkpoint:
    """Check a local diffusers folder. ExportError says what is missing, pickled or of a kind that is not exported."""
    checkpoint = open_configs(path, tiny_vae, defaults)
    return with_weights(checkpoint, checkpoint.parts, allow_pickle)


def with_weights(checkpoint: Checkpoint, parts: Iterable[str], allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint with the files of these parts, which must be in their folders and fit their configurations."""
    found = {part: _weight_files(part, checkpoint.parts[part], allow_pickle) for part in parts}
    checkpoint = replace(
        checkpoint,
        weight_files={**checkpoint.weight_files, **{p: () if f.pickled else f.files for p, f in found.items()}},
        variant={**checkpoint.variant, **{part: f.variant for part, f in found.items()}},
        pickles={part: f.files for part, f in found.items() if f.pickled},
    )
    for part in found:
        for path in checkpoint.weight_files[part]:
            check_stored(path, {name: entry.dtype for name, entry in read_header(path).entries.items()})
        for path in checkpoint.pickles.get(part, ()):
            check_stored(path, pickled_dtypes(path))
        _check_shapes(checkpoint, part)
    return checkpoint


def _check_shapes(checkpoint: Checkpoint, part: str) -> None:
    """ExportError for a weight that the configuration's network lacks in the files, or has in another shape. One that
    only the files have is left out by the libraries, as of an older training; that is said."""
    folder, found = checkpoint.parts[part], checkpoint.weight_shapes(part)
    faults = misfits(part, checkpoint.configs[part], found)
    extra = [name for name in faults if faults[name].wanted is None]
    if len(faults) > len(extra):
        name, fault = next((n, f) for n, f in faults.items() if f.wanted is not None)
        raise ExportError(
            f"{folder}: {len(faults) - len(extra)} weights are not as config.json says, the first is {name} ({fault}); "
            "fetch both again"
        )
    if extra:
        _log.warning(
            "%s: %d weights are of no layer that config.json has, the first is %s; they are left out",
            folder, len(extra), extra[0],
        )  # fmt: skip


def open_configs(
    path: Path, tiny_vae: Path | None = None, defaults: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """As `open_checkpoint`, for a folder whose weights are elsewhere: only its configurations are looked at.

    defaults: the bundle's, which may name another scheduler than the folder's to draw with.
    """
    _require_folder(path)
    index = read_json(path / "model_index.json")
    if fault := pipeline_fault(index, PIPELINES):
        raise ExportError(f"{path} {fault}")
    parts = {name: path / name for name in PIPELINES[index["_class_name"]]}
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    check_schedule(path / "scheduler" / "scheduler_config.json", scheduler, "text_encoder_2" in parts, defaults)
    if tiny_vae is not None:
        parts["tiny_vae"] = tiny_vae
    configs = {name: read_json(folder / "config.json") for name, folder in parts.items()}
    for name, config in configs.items():
        check_config(name, config)
        if name.startswith("text_encoder"):
            check_tokenizer(path / name.replace("text_encoder", "tokenizer"))
    check_together(configs)
    if tiny_vae is not None:
        check_same_latents(configs["vae"], configs["tiny_vae"])
    nothing: dict[str, tuple[Path, ...]] = dict.fromkeys(parts, ())
    return Checkpoint(path, index, parts, configs, nothing, dict.fromkeys(parts), scheduler)


def load_module(checkpoint: Checkpoint, part: str) -> nn.Module:
    """One part as a torch module, in the precision of its files."""
    return _from_pretrained(checkpoint, part).requires_grad_(False).eval()


def fused(weight: torch.Tensor, layers: Sequence[tuple[LoraLayer, float]]) -> torch.Tensor:
    """The weight with LoRA layers added, in float32; without any, the weight as it is."""
    import torch

    for layer, strength in layers:
        weight = weight.float() + torch.from_numpy(layer.delta(tuple(weight.shape), strength))
    return weight


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExportError(f"{path} is missing; export needs a whole diffusers folder (as save_pretrained writes it)")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ExportError(f"{path} is not valid JSON ({e}); fetch it again") from None
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch it again")
    return value


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise ExportError(
            f"{path} does not exist; give a model's name, a diffusers folder, a .safetensors checkpoint, or "
            "hf:OWNER/NAME for a repository of the hub"
        )


class _Found(NamedTuple):
    files: tuple[Path, ...]
    variant: str | None
    pickled: bool


def _weight_files(part: str, folder: Path, allow_pickle: bool) -> _Found:
    """The files of a part (several when sharded) and diffusers' name of the variant, fp32 before fp16."""
    names = {path.name for path in folder.iterdir()}
    weights = choose_weights(part, names, half_first=False, pickles=allow_pickle)
    if weights:
        files = shards(folder / weights.file) if weights.sharded else [weights.file]
        return _Found(tuple(folder / name for name in files), weights.variant, weights.pickled)
    if found := pickled(names):
        raise ExportError(
            f"{folder} holds only pickled weights ({found}), which can run any code when they are read; if you trust "
            "them, --allow-pickle reads them with torch's weights_only, or convert them with "
            "from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
        )
    raise ExportError(f"{folder} holds no weights; expected {expected(part)}")


def shards(index: Path) -> list[str]:
    """The files that an index of split weights names, sorted."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ExportError(f"{index} names no files of weights; fetch it again")
    return sorted(set(names.values()))


def _from_pretrained(checkpoint: Checkpoint, part: str) -> nn.Module:
    if part in checkpoint.loaders:
        return checkpoint.loaders[part].load(part)
    for path in checkpoint.pickles.get(part, ()):
        pickled_shapes(path)  # refuses what holds more than weights
    import torch

    folder, variant = checkpoint.parts[part], checkpoint.variant[part]
    # read_header says in one line what a truncated or missing file would say in ten
    kinds = {e.dtype for path in checkpoint.weight_files[part] for e in read_header(path).entries.values()} - {"I64"}
    dtype = next(
        (d for kind, d in (("F16", torch.float16), ("BF16", torch.bfloat16)) if kinds == {kind}), torch.float32
    )
    options: dict[str, Any] = {
        "local_files_only": True,
        "use_safetensors": part not in checkpoint.pickles,
        "variant": variant,
        "dtype": dtype,
        "output_loading_info": True,
    }
    with quiet():
        if part.startswith("text_encoder"):
            import transformers

            # eager: one causal mask for all layers, where the other kinds of attention build one in each
            options["attn_implementation"] = "eager"
            library: Any = transformers
        else:
            import diffusers

            library = diffusers
        module, info = getattr(library, CLASSES[part]).from_pretrained(folder, **options)
    for parameter in module.parameters() if part in checkpoint.pickles else ():
        parameter.data = parameter.data.contiguous()  # pickles keep strides; distill-sd's are not in order
    if missing := info["missing_keys"]:
        raise ExportError(f"{folder}: {len(missing)} weights are missing, the first is {min(missing)}; fetch it again")
    return module
