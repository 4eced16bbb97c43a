"""The page on screens of many sizes: nothing that can be touched is out of reach, too small or under something else, and
what is written can be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from .serve_running import Running, running
from .test_serve_page import READY, Open, drawn

PANELS = [
    (800, 480), (1024, 600), (1024, 768), (1280, 720), (1366, 768), (1920, 1080), (3840, 2160),
    (480, 800), (600, 1024), (768, 1024), (1080, 1920),
]  # fmt: skip
# What is seen and can be touched, with its place, and whether its text is cut off.
TOUCHABLE = """() => [...document.querySelectorAll('button, a, input, select, textarea, summary')]
    .filter((e) => e.checkVisibility({ visibilityProperty: true }) && !e.matches('.skip'))
    .map((e) => { const { left, top, right, bottom } = e.getBoundingClientRect();
        return { name: e.id || e.textContent.trim() || e.className, left, top, right, bottom,
            cut: e.scrollWidth > e.clientWidth + 1 && e.matches('button') }; })"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("layout")) as server:
        yield server


def touchable(page: Any, least_px: float) -> dict[str, dict[str, float]]:
    """By name, after a look at all of them: on the screen, large enough, none on another, no text cut off."""
    found = page.evaluate(TOUCHABLE)
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    for one in found:
        assert one["left"] >= 0 and one["right"] <= width and one["top"] >= 0 and one["bottom"] <= height, one
        assert one["right"] - one["left"] >= least_px and one["bottom"] - one["top"] >= least_px, one
        assert not one["cut"], one
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            apart = (
                one["right"] <= other["left"] or other["right"] <= one["left"]
                or one["bottom"] <= other["top"] or other["bottom"] <= one["top"]
            )  # fmt: skip
            assert apart, (one, other)
    return {one["name"]: one for one in found}


def box(page: Any, selector: str) -> dict[str, float]:
    return dict(page.locator(selector).bounding_box())


@pytest.mark.parametrize(("width", "height"), PANELS)
def test_a_kiosk_is_all_on_its_screen(server: Running, page_of: Open, width: int, height: int) -> None:
    page = page_of(server, "/?kiosk", viewport={"width": width, "height": height}, has_touch=True)
    page.wait_for_selector(READY)
    for size, shape in (("128x128", 1), ("192x128", 3 / 2), ("128x192", 2 / 3)):
        page.evaluate("(size) => document.querySelector('#size').value = size", size)
        drawn(page, lambda: page.tap("#chips button"))
        whole = page.evaluate("[document.scrollingElement.scrollWidth, document.scrollingElement.scrollHeight]")
        assert whole == [width, height]
        found = touchable(page, 48)
        assert {"prompt", "dice", "download", "kiosk"} < set(found) and len(found) >= 4 + 4  # and so many prompts
        canvas, caption = box(page, "#frame-a .canvas"), box(page, "#frame-a figcaption")
        assert canvas["x"] >= 0 and canvas["y"] >= 0 and canvas["x"] + canvas["width"] <= width
        assert canvas["y"] + canvas["height"] <= caption["y"] and caption["y"] + caption["height"] <= height
        assert canvas["width"] / canvas["height"] == pytest.approx(shape, rel=0.02)
        assert max(canvas["width"] / width, canvas["height"] / height) >= (0.7 if shape == 1 else 0.5)
        first = found[page.inner_text("#chips button")]
        form = {"left": first["left"], "top": found["prompt"]["top"]}
        assert canvas["x"] + canvas["width"] <= form["left"] or caption["y"] + caption["height"] <= form["top"]


def test_a_kiosk_has_room_for_its_longest_messages(server: Running, page_of: Open) -> None:
    for width, height in ((800, 480), (480, 800)):
        page = page_of(server, "/?kiosk&size=9x9&scheduler=None", viewport={"width": width, "height": height})
        page.wait_for_selector('#status[data-state="fault"]')
        page.evaluate(
            """(text) => { const caption = document.querySelector('#frame-a figcaption');
            caption.classList.add('fault'); caption.textContent = text; }""",
            "no plan was built for 1024x1024; built are 512x512: vega-edge build segmind-vegart --size 1024x1024",
        )
        found = touchable(page, 48)
        status, caption = box(page, "#status"), box(page, "#frame-a figcaption")
        assert status["y"] >= 0 and status["x"] + status["width"] <= found["kiosk"]["left"]
        assert status["y"] + status["height"] <= found["prompt"]["top"]
        bottom = found["prompt"]["top"] if width < height else height
        assert caption["y"] + caption["height"] <= bottom


PHONE = {"has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("width", [320, 360, 390])
def test_a_narrow_phone_has_room_for_fingers(server: Running, page_of: Open, width: int) -> None:
    page = page_of(server, viewport={"width": width, "height": 640}, **PHONE)
    page.wait_for_selector(READY)
    drawn(page, lambda: page.fill("#prompt", "a star"))
    page.fill("#seed", "4294967295")  # the longest that the dice give
    page.wait_for_selector(READY)
    page.wait_for_selector("#history li")
    page.evaluate("document.querySelector('#chips').remove()")  # it scrolls sideways, as the history does
    for opened in (False, True):
        page.evaluate("(opened) => { document.querySelector('#panel').open = opened; }", opened)
        page.set_viewport_size({"width": width, "height": 2000})  # all that a finger scrolls to
        found = touchable(page, 44)
    assert {"seed", "dice", "lock", "download", "theme", "kiosk", "steps", "size", "negative"} <= set(found)
    assert page.get_by_role("button", name="Save").count() == 1 and page.get_by_label("Seed", exact=True).count() == 2
    assert page.evaluate("document.documentElement.scrollWidth") == width
    bar, button = box(page, ".promptbox"), box(page, "#download")
    assert button["x"] + button["width"] <= bar["x"] + bar["width"]
    seed = page.evaluate(
        "(() => { const e = document.querySelector('#seed'); return [e.scrollWidth, e.clientWidth]; })()"
    )
    assert seed[0] <= seed[1]  # all ten digits are seen


# The contrast of a text with what lies behind it (WCAG 2.2, 1.4.3), from computed styles: everything is composed by hand,
# so that half transparent colours and `opacity` count.
CONTRASTS = """() => {
    const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = ([r, g, b, a], under) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
    const behind = (e) => e ? over(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
    const opacity = (e) => e ? getComputedStyle(e).opacity * opacity(e.parentElement) : 1;
    const ratio = (e, style, own) => {
        const under = behind(e), [r, g, b, a] = parse(style.color);
        const [x, y] = [light(over([r, g, b, a * own * opacity(e)], under)), light(under)];
        return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
    };
    const found = {};
    for (const e of document.querySelectorAll('body *')) {
        if (!e.checkVisibility() || e.matches(':disabled, :disabled *, .hidden, .skip, option, svg *')) continue;
        const name = e.id || e.className || `${e.parentElement.className || e.parentElement.id} ${e.localName}`;
        if (e.placeholder) { const s = getComputedStyle(e, '::placeholder'); found[`${name} placeholder`] = ratio(e, s, s.opacity); }
        if (e.value || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) found[name] = ratio(e, getComputedStyle(e), 1);
    }
    return found;
}"""


@pytest.mark.parametrize("path", ["/", "/?kiosk"])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_what_is_written_can_be_read(server: Running, page_of: Open, path: str, scheme: str) -> None:
    page = page_of(server, path, color_scheme=scheme)
    page.wait_for_selector(READY)
    page.fill("#guidance", "5") if path == "/" else None
    empty = page.evaluate(CONTRASTS)
    assert "prompt placeholder" in empty and "empty" in empty
    if path == "/":
        assert "negative placeholder" in empty
    drawn(page, lambda: page.fill("#prompt", "a star"))
    full = page.evaluate(CONTRASTS)
    assert {"prompt", "main span", "chips button"} <= set(full)
    page.evaluate("document.querySelector('#frame-a figcaption').classList.add('fault')")
    faulty = page.evaluate(CONTRASTS)
    low = {name: round(ratio, 2) for each in (empty, full, faulty) for name, ratio in each.items() if ratio < 4.5}
    assert low == {}
