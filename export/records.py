"""Which parts of an unfinished bundle are whole, and what they hand to the parts after them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..manifest import Parameter
from ..whole_file import writing
from .report import PartReport

if TYPE_CHECKING:
    import torch

    from .checkpoint import Checkpoint
    from .work import Exported

FOLDER = ".resume"


def fingerprint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a checkpoint from another, without reading its weights: their files' sizes and times, as make does."""
    files = {path for found in (checkpoint.weight_files, checkpoint.pickles) for p in found.values() for path in p}
    files |= {loader.path for loader in checkpoint.loaders.values() if hasattr(loader, "path")}  # a single file's
    small = [path for folder in sorted(checkpoint.path.glob("tokenizer*")) for path in sorted(folder.iterdir())]
    return {
        "files": sorted((str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files),
        "configs": {part: dict(config) for part, config in checkpoint.configs.items()},
        "scheduler": dict(checkpoint.scheduler),
        "tokenizers": [hashlib.sha256(path.read_bytes()).hexdigest() for path in small],
        "random_weights": checkpoint.random_weights,
    }


class Records:
    """A part is recorded when its files are complete; a record is written at once or not at all.

    key: what the bundle is made of and how. A folder whose records have another key is emptied.
    """

    def __init__(self, bundle: Path, key: str) -> None:
        self.bundle, self.folder = bundle, bundle / FOLDER
        if not self.folder.is_dir() or not (self.folder / key).is_file():
            for path in bundle.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.folder.mkdir()
            (self.folder / key).touch()
        names = {path.name for path in bundle.iterdir()} - {FOLDER}
        whole = {name for name in names if self.load(name) is not None}
        whole |= {name.replace("text_encoder", "tokenizer") for name in whole}
        for name in names - whole:  # begun, and not finished
            shutil.rmtree(bundle / name) if (bundle / name).is_dir() else (bundle / name).unlink()

    def save(self, part: str, exported: Exported, handed: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        with writing(self.folder / f"{part}.safetensors") as stream:
            stream.write(save({name: tensor.contiguous() for name, tensor in handed.items()}))
        told = dataclasses.asdict(exported) | {"files": self._files(part)}
        with writing(self.folder / f"{part}.json") as stream:
            stream.write(json.dumps(told).encode())

    def load(self, part: str) -> tuple[Exported, dict[str, torch.Tensor]] | None:
        """None where the part is not finished, its files are no longer as they were, or its record is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from .work import Exported

        record = self.folder / f"{part}.json"
        if not record.is_file():
            return None
        try:
            told: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            if told["files"].items() - self._files(part).items():
                return None
            parameters = {name: Parameter(**place) for name, place in told["parameters"].items()}
            exported = Exported(PartReport(**told["report"]), parameters, told["activation_scale"])
            return exported, load_file(self.folder / f"{part}.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _files(self, part: str) -> dict[str, str]:
        """Size and time of each of a part's files, and of its tokenizer's."""
        folders = [self.bundle / part, self.bundle / part.replace("text_encoder", "tokenizer")]
        files = sorted({path for folder in folders if folder.is_dir() for path in folder.iterdir()})
        states = {path.relative_to(self.bundle).as_posix(): path.stat() for path in files}
        return {name: f"{state.st_size} bytes, {state.st_mtime_ns} ns" for name, state in states.items()}
