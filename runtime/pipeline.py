"""A bundle, opened: prompts in, pictures out, step by step if wanted. Knows no backend; `walk.py` does the walking."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle import Bundle
from ..engines import BuiltFor, check_dtype, choose_engine
from ..errors import UsageError
from ..models import find_bundle
from .decoder import Decoder
from .footprint import Drawing
from .init_image import ImageEncoder
from .memory_check import MemoryCheck, check_weights
from .opening import check_model, checked_loras, foreign_defaults, warn_of_no_manifest
from .parts import Parts, cache_folder, check_opening, weights_of
from .patches import Patches
from .request import Limits, Request, alike, make_request
from .scheduler_config import read_scheduler_config
from .schedulers import scheduler_named_in
from .text import Text, TextEncoder, side_by_side
from .vae_choice import find_decoders, unused_parts
from .walk import Network, make_plan, walk

_log = logging.getLogger(__name__)
_MOST_CHANNELS = 64  # of latents


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Step:
    """One step done of `total`, which is None where the sampler decides on the way; `index` counts from 1. `latents`
    float32 [n, c, h, w] are in sigma units, `x0` the estimate they were made with.
    """

    index: int
    total: int | None
    latents: NDArray[np.float32]
    x0: NDArray[np.float32]
    decoder: Decoder = field(repr=False)

    def preview(self) -> list[Image.Image]:
        """What the pictures would be if the walk ended here, decoded when asked."""
        return self.decoder.images(self.x0)


@dataclass(frozen=True, eq=False)
class Result:
    """Pictures with the request that made them, the seconds of each stage, and the final latents: float32 [n, c, h, w],
    as the network sees them (the decoder's input times its scaling factor). unread: what of "prompt" and "negative" lay
    beyond CLIP's 75 tokens, where something did."""

    images: list[Image.Image]
    request: Request
    latents: NDArray[np.float32]
    timings: dict[str, float]
    unread: Mapping[str, str] = field(default_factory=dict)


class Pipeline:
    """A model, opened with `Pipeline.open`. `with` closes it at the end.

    Several threads may use one: each network is run for one of them at a time, in turn. Closed by one, it ends the others'
    drawing with an EngineError.

    `pipe(prompt, steps=4, seed=7).images[0]` is a PIL picture; calling it, `__call__`, tells of every option.
    """

    def __init__(self, parts: Parts, vae: str = "full") -> None:
        bundle = parts.bundle
        self.bundle, self.engine, self._parts, self._vae = bundle, parts.engine, parts, vae
        self.name = bundle.manifest.name if bundle.manifest else bundle.path.name
        self.loras = parts.patches.loras if parts.patches else ()
        self._channels = bundle.number("unet", "in_channels", _MOST_CHANNELS)
        self._text = TextEncoder(parts)
        self._unet = parts.part("unet/model.onnx")
        self._decoder, self._previewer = find_decoders(parts, vae)
        self._encoder = ImageEncoder(parts)
        self._scheduler_config = read_scheduler_config(bundle)
        # A U-Net halves the latents between its levels and must meet itself again on the way up.
        multiple = self._decoder.scale * 2 ** (bundle.levels("unet") - 1)
        self.limits = Limits.of(bundle.manifest.limits if bundle.manifest else {}, multiple)
        side_px = bundle.number("unet", "sample_size", 4096) * self._decoder.scale
        self._check_memory = MemoryCheck(
            bundle, parts.engine, parts.low_memory, vae, self.limits.size_px[0], self.limits.multiple_px
        )
        assumed = foreign_defaults(self._scheduler_config, side_px)
        warn_of_no_manifest(bundle, assumed, self._scheduler_config)
        self.defaults: Mapping[str, Any] = {**assumed, **(bundle.manifest.defaults if bundle.manifest else {})}
        for part in (self._text, self._unet, self._decoder):
            part.load()

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        engine: str = "auto",
        verify: bool = True,
        *,
        loras: Sequence[tuple[str | os.PathLike[str], float]] = (),
        memory: str = "normal",
        vae: str = "full",
        device: str | None = None,
    ) -> Pipeline:
        """A recipe's name or a bundle's folder; `engine` one of `vega_edge.engines.ENGINES` or "auto".

        `verify=False` trusts the files' hashes and looks at their sizes only. loras: (file, strength), added to the
        bundle's weights in memory, strength 1 as trained. memory "low": each network is open only while it runs, in
        the way that takes least memory. vae "tiny": decode with the bundle's small decoder. device: cpu, cuda or cuda:N;
        None for whatever the engine runs on.

        Raises UsageError for an unknown model, engine or option, BundleError for a bundle that is missing, damaged or
        can't do what is asked, CheckpointError for a LoRA that does not fit, EngineError for an engine that can't open
        it, NotEnoughMemoryError where that is certain.
        """
        check_model(model)
        check_opening(engine, memory, vae, device)
        files = checked_loras(loras)
        bundle = Bundle.open(find_bundle(model), verify)
        patches = Patches(bundle, files)
        if engine == "auto":
            size = sum(f.stat().st_size for f in bundle.path.glob("*/*.onnx*"))
            built = BuiltFor(bundle.path, unused_parts(bundle, vae), partial(weights_of, patches))
            engine = choose_engine(size, built, device, bundle.precision)
        check_dtype(engine, *bundle.precision)
        low = memory == "low"
        check_weights(bundle, engine, low)
        return cls(Parts(bundle, engine, patches, low, cache_folder(), device), vae)

    @property
    def title(self) -> str:
        """The model's name with its LoRAs and its decoder, for a picture's parameters: 'vega + style:0.8 + tiny VAE'."""
        tiny = ["tiny VAE"] if self._vae == "tiny" else []
        return " + ".join([self.name, *(f"{path.stem}:{strength:g}" for path, strength in self.loras), *tiny])

    def request(self, prompt: str, **options: Any) -> Request:
        """Checks the options, which are the fields of `Request`; UsageError says what is allowed."""
        defaults = self.defaults
        if not (options.get("scheduler") or "scheduler" in defaults):
            defaults = {**defaults, "scheduler": scheduler_named_in(self._scheduler_config)}
        request = make_request({"prompt": prompt, **options}, defaults, self.limits)
        if request.schedule == "ays":  # one name in the web UI, too, for the table that fits the model
            request = replace(request, schedule="ays_sdxl" if self._text.sdxl else "ays_sd15")
        make_plan(request, self._scheduler_config)  # whether the scheduler can do it on this model
        if request.image is not None:
            self._encoder.check()
        return request

    def stream(self, prompt: str, **options: Any) -> Iterator[Step]:
        """Yields each `Step` as it is done; to cancel, stop iterating."""
        return self._walk([self.request(prompt, **options)], {})

    def __call__(self, prompt: str, **options: Any) -> Result:
        """Draws; UsageError for an option that is unknown or out of range, NotEnoughMemoryError before anything runs if it
        can't fit the memory that is free. None of any is the model's own default.

        negative, guidance, guidance_rescale; steps, scheduler, family, schedule, eta; seed (-1 picks one), samples,
        rng, noise_dtype; width, height; image, strength; long_prompt, prompt_syntax. `vega_edge.Request` says what each
        is; `limits` and `defaults` of the pipeline what the model allows and takes, `Result` what comes back.
        """
        return self.run(self.request(prompt, **options))

    def run(self, request: Request, progress: Any = None) -> Result:
        """Runs a request that `request` made; `progress` is called with each `Step`."""
        steps = self.draw([request])
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                results: list[Result] = end.value
                return results[0]
            if progress:
                progress(step)

    def draw(self, requests: Sequence[Request]) -> Generator[Step, None, list[Result]]:
        """Draws several checked requests in one batch: yields each `Step`, then returns a `Result` each, whose timings
        are those of all. Their samples lie one request after the other in a step's arrays. To cancel, close it.

        UsageError unless they are `alike`, or where their texts don't fit into one batch.
        """
        several = isinstance(requests, Sequence) and all(isinstance(each, Request) for each in requests)
        if not several or not requests:
            raise UsageError(f"requests must be one or more of Pipeline.request(PROMPT, ...), got {requests!r:.60}")
        if not all(alike(requests[0], other) for other in requests[1:]):
            raise UsageError("requests that differ in more than prompt, negative, seed and samples can't share a batch")
        return self._draw(requests)

    def _draw(self, requests: Sequence[Request]) -> Generator[Step, None, list[Result]]:
        timings: dict[str, float] = {}
        step = None
        for step in self._walk(requests, timings):
            yield step
        assert step is not None  # steps >= 1
        start = time.perf_counter()
        images, results, first = self._decoder.images(step.latents), [], 0
        timings["decode"] = time.perf_counter() - start
        for request in requests:
            last = first + request.samples
            results.append(
                Result(images[first:last], request, step.latents[first:last], dict(timings), self._unread(request))
            )
            first = last
        return results

    def total(self, request: Request) -> int | None:
        """How many steps a request will take; None where its sampler finds out on the way."""
        return make_plan(request, self._scheduler_config).total

    def _walk(self, requests: Sequence[Request], timings: dict[str, float]) -> Iterator[Step]:
        clock = time.perf_counter()
        request = requests[0]  # what the others are like
        samples = sum(r.samples for r in requests)
        image = request.image is not None
        self._check_memory(Drawing(request.width, request.height, samples, request.guidance > 1, image))
        conditioning = side_by_side([self._conditioning(r) for r in requests], 2 if request.guidance > 1 else 1)
        seeds = [seed for r in requests for seed in r.seeds]
        timings["text"] = time.perf_counter() - clock
        clock = time.perf_counter()
        start = None
        if request.image is not None:
            start = self._encoder.encode(request.image, request.width, request.height)
            timings["encode"] = time.perf_counter() - clock
            clock = time.perf_counter()
        plan = make_plan(request, self._scheduler_config)
        shape = (self._channels, request.height // self._decoder.scale, request.width // self._decoder.scale)
        with self._unet.running() as engine:
            steps = walk(request, plan, Network(engine, self.engine, shape), conditioning, seeds, start)
            with contextlib.closing(steps):
                for i, step in enumerate(steps, 1):
                    timings["denoise"] = time.perf_counter() - clock
                    yield Step(i, plan.total, step.x, step.x0, self._previewer)

    def _conditioning(self, request: Request) -> dict[str, NDArray[np.float32]]:
        guided = request.guidance > 1
        if not guided and request.negative:
            _log.warning("the negative prompt has no effect without guidance (guidance is %g)", request.guidance)
        if not guided and request.guidance_rescale:
            _log.warning("guidance rescale has no effect without guidance (guidance is %g)", request.guidance)
        texts = self._text.encode(*_texts(request), guided)
        return self._text.feeds(texts, request.samples, request.width, request.height)

    def _unread(self, request: Request) -> dict[str, str]:
        texts = dict(zip(("prompt", "negative"), _texts(request), strict=True))
        if request.guidance <= 1:
            del texts["negative"]  # has no effect
        return {name: cut for name, text in texts.items() if text and (cut := self._text.unread(text))}

    def close(self) -> None:
        """Frees the engines; the pipeline can't be used afterwards."""
        self._parts.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _texts(request: Request) -> tuple[Text, Text | None]:
    """The prompt, and what to move away from where the request says so."""
    text = Text(request.prompt, request.prompt_syntax, request.long_prompt)
    return text, None if request.negative is None else text._replace(prompt=request.negative)
