"""A CLIP tokenizer's folder: the checkpoint's own files, and those that are missing made from the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .quiet import quiet

TOKENS = 77  # CLIP's context, start and end token included
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokenizer(folder: Path) -> None:
    """ExportError unless a tokenizer's files are there."""
    if not folder.is_dir():
        raise ExportError(f"{folder} is missing; export needs a whole diffusers folder (as save_pretrained writes it)")
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ExportError(f"{folder / name} is missing, and there is no tokenizer.json; fetch it again")


def load_tokenizer(folder: Path) -> Any:
    """transformers' CLIP tokenizer from vocab.json and merges.txt, or from tokenizer.json where those are missing."""
    check_tokenizer(folder)
    from transformers import CLIPTokenizerFast

    with quiet():
        return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def write_tokenizer(source: Path, target: Path, tokenizer: Any) -> None:
    """Fill `target` with vocab.json, merges.txt, special_tokens_map.json, tokenizer_config.json and tokenizer.json."""
    target.mkdir()
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    (target / "tokenizer.json").write_text(text, encoding="utf-8")
    model = json.loads(text)["model"]
    special = {key: getattr(tokenizer, key) for key in _SPECIAL}
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    made = {  # transformers 5 writes neither of the first two, version 4 writes all
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, ensure_ascii=False, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, **special}, ensure_ascii=False, indent=2
        ),
    }
    for name, text in made.items():
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        else:
            (target / name).write_text(text, encoding="utf-8")


def token_ids(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """int64 torch tensor [len(prompts), 77], padded and cut as the diffusers pipelines do."""
    with quiet():
        return tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
