"""What the page says of what it shows: who is waited for, and of which picture its words and its Save button are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from vega_edge.errors import EngineError
from vega_edge.serve.live import WAITING_S

from .serve_fakes import FakeDrawer, Gate
from .serve_running import running, wait_until
from .test_serve_page import READY, Open, drawn
from .test_serve_page_time import Cable

STATUS = "(text) => document.querySelector('#status').textContent === text"


def test_busy_is_said_of_others_only_and_no_longer_than_it_is_true(tmp_path: Path, page_of: Open) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        page, other = page_of(server), page_of(server)
        for each in (page, other):
            each.wait_for_selector(READY)
            each.select_option("#previews", "off")
        page.select_option("#compare", "seed")
        page.fill("#prompt", "a star")
        gate.wait()
        page.wait_for_timeout(3000 * WAITING_S)
        assert page.inner_text("#status") == "Drawing…"  # its second picture waits for its first
        other.fill("#prompt", "a star")
        other.wait_for_function(STATUS, arg="Busy: 1 before you")
        assert other.text_content("#said") == "Busy: 1 before you"
        gate.let(4)  # the steps of the page's first picture; then it is the other one's turn
        other.wait_for_function(STATUS, arg="Drawing…")
        page.wait_for_function(STATUS, arg="Busy: others are drawing")
        gate.let(50)
        for each in (page, other):
            each.wait_for_selector(READY)


def shown(page: Any) -> dict[str, Any]:
    """What the page says of the picture that is seen; red: the seed of a picture, 0 of a preview."""
    return dict(
        page.evaluate(
            """() => { const image = document.querySelector('#frame-a img');
            const context = new OffscreenCanvas(1, 1).getContext('2d');
            context.drawImage(image, 0, 0, 1, 1);
            return { alt: image.alt, caption: document.querySelector('#frame-a figcaption').textContent,
                save: !document.querySelector('#download').disabled,
                red: context.getImageData(0, 0, 1, 1).data[0] > 100 }; }"""
        )
    )


def save(page: Any) -> tuple[str, str, bool]:
    """The name of the file that Save gives, the parameters in it, and whether it is red."""
    with page.expect_download() as download:
        page.click("#download")
    image = Image.open(download.value.path()).convert("RGB")
    comment = image.getexif().get_ifd(0x8769)[0x9286].removeprefix(b"UNICODE\0").decode("utf-16-be")
    red: Any = image.getpixel((0, 0))
    return download.value.suggested_filename, comment.split(",")[0], red[0] > 100


STAR = {"alt": "a star", "caption": "LCM, 4 steps, seed 200, 128 × 128", "save": True, "red": True}
PREVIEW = {"alt": "Preview: a moon", "caption": "Preview after step 1 of 4", "save": False, "red": False}


def test_words_and_save_are_of_the_picture_that_is_seen(tmp_path: Path, page_of: Open) -> None:
    gate = Gate()

    def before(request: Any, index: int) -> None:
        gate(request, index)
        if request.prompt == "fail" and index == 2:
            raise EngineError("the engine failed")

    with running(tmp_path, FakeDrawer(before_step=before)) as server:
        page = page_of(server, accept_downloads=True)
        page.wait_for_selector(READY)
        assert page.is_disabled("#download")
        page.select_option("#previews", "on")
        page.fill("#seed", "200")
        gate.let(4)
        drawn(page, lambda: page.fill("#prompt", "a star"))
        assert shown(page) == STAR
        page.fill("#prompt", "a moon")
        page.wait_for_selector("#frame-a.busy")
        assert shown(page) == STAR  # there is nothing of the new one yet
        assert save(page) == ("a-star-200.jpg", "a star\nSteps: 4", True)
        gate.let(1)
        page.wait_for_function("() => document.querySelector('#download').disabled")
        assert shown(page) == PREVIEW
        gate.let(3)
        page.wait_for_selector(READY)
        assert shown(page) == {**STAR, "alt": "a moon"}
        assert save(page) == ("a-moon-200.jpg", "a moon\nSteps: 4", True)
        page.fill("#prompt", "fail")
        gate.let(1)
        page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'Preview: fail'")
        gate.let(1)
        page.wait_for_selector("figcaption.fault")
        assert shown(page) == {**PREVIEW, "alt": "Preview: fail", "caption": "the engine failed"}
        page.fill("#prompt", "a moon")
        gate.let(1)
        page.wait_for_function("() => !document.querySelector('figcaption.fault')")
        assert shown(page) == PREVIEW
        page.focus("#prompt")
        page.keyboard.press("Escape")
        page.wait_for_selector(READY)
        assert shown(page) == PREVIEW  # a picture that was given up can't be saved


def test_save_is_of_the_pictures_that_are_finished(tmp_path: Path, page_of: Open) -> None:
    gate = Gate()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        page = page_of(server, accept_downloads=True)
        page.wait_for_selector(READY)
        page.select_option("#previews", "on")
        page.select_option("#compare", "seed")
        page.fill("#compare-seed", "201")
        page.fill("#seed", "200")
        page.fill("#prompt", "a star")
        gate.let(5)  # the first picture, and a step of the second
        page.wait_for_function("() => document.querySelector('#frame-b img').alt === 'Preview: a star'")
        assert save(page) == ("a-star-200.jpg", "a star\nSteps: 4", True)
        files: list[str] = []
        page.on("download", lambda file: files.append(file.suggested_filename))
        gate.let(3)
        page.wait_for_selector(READY)
        assert page.get_attribute("#frame-b img", "alt") == "a star"
        page.click("#download")
        wait_until(lambda: page.wait_for_timeout(50) or len(files) == 2)
        assert files == ["a-star-200.jpg", "a-star-201.jpg"]
        page.fill("#prompt", "a moon")
        gate.let(1)
        page.wait_for_function("() => document.querySelector('#frame-a img').alt === 'Preview: a moon'")
        page.select_option("#compare", "")
        page.wait_for_selector("#download:disabled")  # what could be saved is no longer seen


def test_a_picture_that_is_replaced_in_the_frame_in_which_it_appears_is_not_the_new_one(
    tmp_path: Path, page_of: Open
) -> None:
    gate, cable = Gate(), Cable()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        page = page_of(server, before=cable.lay)
        page.wait_for_selector(READY)
        page.fill("#prompt", "a star")
        gate.let(4)
        page.clock.run_for(60)
        wait_until(lambda: page.get_attribute("#frame-a img", "alt") == "a star")  # its frame has not come yet
        page.fill("#prompt", "a moon")
        page.press("#prompt", "Enter")
        page.clock.run_for(1000)
        assert "busy" in page.get_attribute("#frame-a", "class")
        assert page.locator("#history li").count() == 0 and cable.status == "Drawing…"
        gate.let(50)
        cable.until("document.querySelectorAll('#history li').length === 1")
        assert page.get_attribute("#history button", "title") == "a moon, seed 7"
