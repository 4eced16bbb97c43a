"""Several requests in one batch: each is drawn as when it is alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from vega_edge import Pipeline
from vega_edge.errors import UsageError
from vega_edge.runtime.pipeline import Result
from vega_edge.runtime.request import Request


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    pipe = Pipeline.open("demo-vegart", "onnxruntime-cpu")
    yield pipe
    pipe.close()


def drawn(pipe: Pipeline, requests: list[Request]) -> tuple[int, list[Result]]:
    steps, count = pipe.draw(requests), 0
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return count, end.value
        count += 1
        assert step.latents.shape[0] == sum(r.samples for r in requests)


@pytest.mark.parametrize(
    "options", [{}, {"guidance": 3.0, "steps": 3, "scheduler": "Euler a"}, {"scheduler": "DPM adaptive", "steps": 2}]
)
def test_a_batch_draws_what_each_draws_alone(pipe: Pipeline, options: dict[str, object]) -> None:
    base = {"width": 64, "height": 64, **options}
    requests = [
        pipe.request("a red star", seed=7, **base),
        pipe.request("a blue house on a white background", negative="a tree", seed=99, samples=2, **base),
        pipe.request("", seed=3, **base),
    ]
    steps, results = drawn(pipe, requests)
    assert steps >= 2
    assert [len(r.images) for r in results] == [1, 2, 1]
    for request, result in zip(requests, results, strict=True):
        alone = pipe.run(request)
        assert result.request is request
        np.testing.assert_allclose(result.latents, alone.latents, atol=2e-3)
        for ours, theirs in zip(result.images, alone.images, strict=True):
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 0.5


def test_requests_that_differ_in_size_or_steps_are_refused(pipe: Pipeline) -> None:
    requests = [pipe.request("a", steps=n, width=64, height=64) for n in (1, 2)]
    with pytest.raises(UsageError) as failure:
        next(pipe.draw(requests))
    assert (
        str(failure.value) == "requests that differ in more than prompt, negative, seed and samples can't share a batch"
    )
