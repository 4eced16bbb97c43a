"""An architecture as a diffusers folder without weights: configurations, scheduler and tokenizers.

It is written once, under VEGA_EDGE_HOME/architectures, in a folder named after its contents, so that it can be shared by
exports and told apart from one that another version wrote.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import ExportError
from ..models.architectures import MERGES, Architecture, read_config
from ..models.storage import home
from .tokenizer_files import TOKENS
from .weight_files import tokenizer_of

_START, _END = "<|startoftext|>", "<|endoftext|>"
_PADDING = {"tokenizer": _END, "tokenizer_2": "!"}  # as in SD's and SDXL's repositories


def skeleton_folder(architecture: Architecture, scheduler: str | None = None) -> Path:
    """The folder; made if it is not there yet. scheduler: a file of models/configs in place of the architecture's."""
    files = _files(architecture, scheduler)
    digest = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:12]
    folder = home() / "architectures" / f"{architecture.name}-{digest}"
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for name, text in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        unfinished.rename(folder)
    except OSError as failure:
        if not folder.is_dir():  # another process may have been faster
            raise ExportError(
                f"{folder} can't be written ({failure.strerror}); set VEGA_EDGE_HOME to a folder that you may write to"
            ) from failure
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _files(architecture: Architecture, scheduler: str | None) -> dict[str, str]:
    """Names inside the folder -> texts."""
    schedule = read_config(scheduler or architecture.scheduler)
    index: dict[str, Any] = {"_class_name": architecture.pipeline, "force_zeros_for_empty_prompt": True}
    index["scheduler"] = ["diffusers", schedule["_class_name"]]
    files = {"scheduler/scheduler_config.json": _json(schedule)}
    for part in architecture.parts:
        config = architecture.config(part)
        library, kind = ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", None)
        index[part] = [library, kind or config["architectures"][0]]
        files[f"{part}/config.json"] = _json(config)
        if tokenizer := tokenizer_of(part):
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
            files |= {f"{tokenizer}/{name}": text for name, text in _tokenizer(_PADDING[tokenizer]).items()}
    return {"model_index.json": _json(index), **files}


def _tokenizer(padding: str) -> dict[str, str]:
    """CLIP's, as its repository has it: the order of the merges decides the numbers of the tokens."""
    merges = MERGES.read_text(encoding="utf-8")
    pairs = [line.split(" ") for line in merges.splitlines()[1:]]
    symbols = list(_byte_symbols())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in pairs), _START, _END]
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": padding}
    return {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": merges,
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **special}
        ),
    }


def _byte_symbols() -> str:
    """GPT-2's letters for the 256 bytes, in CLIP's order: those that print, then the others from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return "".join(map(chr, printing)) + "".join(chr(0x100 + i) for i in range(256 - len(printing)))


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
