"""`vega-edge serve`: the local server, and the keys that it asks for."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, VegaEdgeError
from .common import lora, number, whole

if TYPE_CHECKING:
    from ..serve.settings import Settings

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add(p: argparse.ArgumentParser) -> None:
    _add_server(p)
    _add_safety(p)
    _add_limits(p)
    p.set_defaults(run=run)
    actions = p.add_subparsers(dest="action", metavar="keys", title="instead of serving")
    keys = actions.add_parser("keys", help="make, list and revoke API keys")
    verbs = keys.add_subparsers(dest="keys_action", metavar="add|list|revoke", required=True)
    for name, text in (
        ("add", "make a key and print it, once"),
        ("list", "list the keys' names"),
        ("revoke", "take a key back"),
    ):
        verb = verbs.add_parser(name, help=text)
        if name != "list":
            verb.add_argument("key_name", metavar="NAME", help="whose key it is")
        verb.add_argument("--api-keys", type=Path, required=True, metavar="FILE", help="the file of keys' hashes")
        verb.set_defaults(run=run_keys)


def _add_server(p: argparse.ArgumentParser) -> None:
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen; default: this machine only")
    p.add_argument("--port", type=whole, default=8000, metavar="N", help="default: %(default)s")
    p.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="where v2 jobs and their pictures are kept; default: ~/.cache/vega-edge/serve, or serve in VEGA_EDGE_HOME",
    )  # fmt: skip
    p.add_argument("--engine", default="auto", metavar="NAME", help="what runs the graphs; default: auto")
    p.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: what the engine runs on")
    p.add_argument(
        "--memory", default="normal", metavar="HOW",
        help="normal, or low for small boards: networks are opened one after another; default: %(default)s",
    )  # fmt: skip
    p.add_argument(
        "--vae", default="full", metavar="WHICH",
        help="full, or tiny for the bundles' fast decoder; previews always have that one; default: %(default)s",
    )  # fmt: skip
    p.add_argument(
        "--lora", action="append", default=[], metavar="MODEL=FILE[:STRENGTH]",
        help="add a LoRA to a model's weights as it is opened, in memory; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--alias", action="append", default=[], metavar="SLUG=MODEL",
        help="let a model answer under another name, such as segmind-vega=demo-vegart; may be repeated",
    )  # fmt: skip
    p.add_argument(
        "--limits", default="local", metavar="NAME",
        help="local: what the model can do; segmind: the ranges and sizes of the API's pages; default: %(default)s",
    )  # fmt: skip
    p.add_argument(
        "--preload", action="append", default=[], metavar="MODEL", help="open it at the start; may be repeated"
    )
    p.add_argument(
        "--memory-budget", type=_bytes, metavar="SIZE",
        help="such as 6G, for the weights of open models; the least recently used one is closed to make room",
    )  # fmt: skip
    p.add_argument(
        "--batch", type=whole, default=4, metavar="N",
        help="pictures of several requests drawn at once at most; default: %(default)s",
    )  # fmt: skip
    p.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    p.add_argument("--check", action="store_true", help="say what is wrong with these options, if anything, and end")
    p.add_argument("-v", "--verbose", action="store_true", help="say which models are opened and closed")


def _add_safety(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--api-keys", type=Path, metavar="FILE", help="ask for a key of this file; read again when it changes"
    )
    p.add_argument("--no-auth", action="store_true", help="let anybody in who can reach the address")
    p.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that clients call this server by; may be repeated",
    )
    p.add_argument(
        "--trusted-proxy", action="append", default=[], metavar="ADDRESS",
        help="believe X-Forwarded-* from this address or network; may be repeated",
    )  # fmt: skip


def _add_limits(p: argparse.ArgumentParser) -> None:
    numbers = (
        ("--queue", whole, 64, "jobs that may wait; more are answered 429"),
        ("--rate", whole, 600, "pictures that each key may ask for in a minute, live ones too; 0 for no limit"),
        ("--sockets", whole, 64, "live pages at a time"),
        ("--prompt-chars", whole, 4000, "the longest prompt, in characters"),
        ("--job-seconds", number, 300.0, "device time for one job"),
        ("--grace-seconds", number, 30.0, "for the running picture when stopping"),
        ("--keep-seconds", number, 3600.0, "how long finished v2 jobs and their pictures are kept"),
    )
    for name, kind, default, text in numbers:
        p.add_argument(name, type=kind, default=default, metavar="N", help=f"{text}; default: {default:g}")


def run(arguments: argparse.Namespace) -> None:
    try:
        from ..serve.listener import Server, addresses, listen
        from ..serve.service import build
    except ImportError as error:
        raise VegaEdgeError(f'the server needs {error.name}; pip install "vega-edge[serve]"') from error
    settings = _settings(arguments)
    if arguments.check:
        from .serve_check import check

        check(settings)
        return
    _log_to_stderr(arguments.verbose)
    server = Server(build(settings))
    address = listen(settings.host, settings.port)
    pages = ", ".join(addresses(address, settings.host))
    print(f"vega-edge: the live page is at {pages}, the API at /docs; Ctrl+C stops", file=sys.stderr)
    server.run([address])


def run_keys(arguments: argparse.Namespace) -> None:
    from ..serve import keys

    if arguments.keys_action == "add":
        print(keys.add(arguments.api_keys, arguments.key_name))
    elif arguments.keys_action == "revoke":
        keys.revoke(arguments.api_keys, arguments.key_name)
    else:
        for key in keys.load(arguments.api_keys):
            print(f"{key.name}  {key.created}")


def _settings(a: argparse.Namespace) -> Settings:
    from ..models import bundles_folder
    from ..serve.settings import Settings

    return Settings(
        data=(a.data or bundles_folder().parent / "serve").resolve(), host=a.host, port=a.port, engine=a.engine,
        device=a.device, memory=a.memory, vae=a.vae, loras=_loras(a.lora),
        aliases=_aliases(a.alias), limits=a.limits, api_keys=a.api_keys, no_auth=a.no_auth,
        hosts=tuple(a.allow_host), trusted_proxies=tuple(a.trusted_proxy), queue=a.queue, rate=a.rate,
        sockets=a.sockets, prompt_chars=a.prompt_chars, job_s=a.job_seconds, grace_s=a.grace_seconds,
        keep_s=a.keep_seconds, batch=a.batch, preload=tuple(a.preload), memory_budget=a.memory_budget,
        log_prompts=a.log_prompts,
    )  # fmt: skip


def _loras(texts: list[str]) -> dict[str, list[tuple[Path, float]]]:
    found: dict[str, list[tuple[Path, float]]] = {}
    for text in texts:
        model, equals, file = text.partition("=")
        if not equals or not file:
            raise UsageError(f"--lora must be MODEL=FILE or MODEL=FILE:STRENGTH, such as segmind-vega=style.safetensors:0.8, got {text!r}")  # fmt: skip
        try:
            found.setdefault(model, []).append(lora(file))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--lora {model}: {error}") from None
    return found


def _aliases(texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        slug, equals, model = text.partition("=")
        if not equals:
            raise UsageError(f"--alias must be SLUG=MODEL, such as segmind-vega=demo-vegart, got {text!r}")
        if slug in found:
            raise UsageError(f"--alias: {slug!r} is given twice, for {found[slug]} and for {model}; leave one out")
        found[slug] = model
    return found


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"must be a size such as 6G or 800M, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _log_to_stderr(verbose: bool) -> None:
    """A request is a line of JSON, which a program may read; the rest is for people."""
    requests = logging.getLogger("vega_edge.serve.requests")
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(message)s"))
    requests.handlers, requests.propagate = [lines], False
    requests.setLevel(logging.INFO)
    logging.getLogger("vega_edge.serve").setLevel(logging.INFO if verbose else logging.WARNING)
    # Its warnings quote prompts. Who asked is told in a header.
    logging.getLogger("vega_edge.runtime.text").setLevel(logging.ERROR)
