"""The page's scripts one by one, and the small things that a visitor notices: what is remembered, said, freed, saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed: vega-edge[serve]")

from .serve_fakes import FakeDrawer, Gate
from .serve_running import Running, running, wait_until
from .test_serve_page import READY, drawn
from .test_serve_page_time import LOST, SHOWN, Cable

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("parts")) as server:
        yield server


@pytest.fixture
def page(server: Running, page_of: Open) -> Any:
    page = page_of(server)
    page.wait_for_selector(READY)
    return page


def test_the_history_keeps_eighty_the_newest_first_and_frees_the_others(page: Any) -> None:
    got = page.evaluate("""async () => {
        const { History } = await import('/page/history.js'), list = document.createElement('ol'), freed = [], back = [];
        URL.revokeObjectURL = (url) => freed.push(url);
        const history = new History(list, (parameters) => back.push(parameters.n));
        const kept = [...Array(82).keys()].map((n) => history.add(`blob:${n}`, { n }, `star ${n}`));
        kept.push(history.add('blob:again', { n: 81 }, 'again'));
        const button = list.firstElementChild.querySelector('button');
        button.click();
        return { kept, freed, back, count: list.children.length, label: button.getAttribute('aria-label'),
            title: button.title, image: button.querySelector('img').src };
    }""")
    assert got.pop("kept") == [True] * 82 + [False]
    assert got == {
        "freed": ["blob:0", "blob:1"], "back": [81], "count": 80, "label": "Bring back: star 81", "title": "star 81",
        "image": "blob:81",
    }  # fmt: skip


OFFER = """async ({ fresh, guidance }) => {
    const { offer } = await import('/page/controls.js'), side = { minimum: 128, maximum: 512, default: 256 };
    offer({ num_inference_steps: { minimum: 2, maximum: 9, default: 5 }, guidance_scale: guidance,
        img_width: side, img_height: side }, fresh);
    const $ = (id) => document.getElementById(id);
    return [$('steps').min, $('steps').max, $('steps').value, $('guidance').value, $('negative-field').hidden,
        $('guidance-field').hidden, $('size').value, [...$('size').options].map((o) => o.value).join(' ')];
}"""
SIZES = "128x128 192x192 256x256 384x384 512x512 384x256 256x384"


def test_a_model_says_what_can_be_chosen_and_what_was_chosen_stays_where_it_can(page: Any) -> None:
    guided = {"minimum": 1, "maximum": 20, "default": 7.5}
    fresh = page.evaluate(OFFER, {"fresh": True, "guidance": guided})
    assert fresh == ["2", "9", "5", "7.5", False, False, "256x256", SIZES]
    page.evaluate("document.getElementById('steps').value = 8; document.getElementById('size').value = '384x256'")
    kept = page.evaluate(OFFER, {"fresh": False, "guidance": {"minimum": 0, "maximum": 1, "default": 0}})
    assert kept == ["2", "9", "8", "1", True, True, "384x256", SIZES]
    page.evaluate("document.getElementById('size').replaceChildren(new Option('64x64'))")
    assert page.evaluate(OFFER, {"fresh": False, "guidance": guided})[6] == "256x256"
    large = OFFER.replace("maximum: 512", "maximum: 256")
    assert page.evaluate(large, {"fresh": True, "guidance": guided})[7] == "128x128 192x192 256x256"


def test_what_is_asked_for_is_what_the_controls_say(page: Any) -> None:
    got = page.evaluate("""async () => {
        const { asked, choose, milliseconds } = await import('/page/controls.js');
        const set = (values) => Object.entries(values).forEach(([id, value]) => (document.getElementById(id).value = value));
        const seen = {}, look = (name, slot = 'a') => (seen[name] = asked(slot));
        set({ prompt: 'a star', seed: '1 2x3', negative: 'blur', guidance: 1, compare: 'seed', 'compare-seed': '-9' });
        look('a'); look('b', 'b');
        set({ seed: '', guidance: 2, scheduler: 'Euler', compare: 'scheduler', 'compare-scheduler': 'DDIM' });
        look('c'); look('d', 'b');
        return { seen, times: [999, 1000, 12345].map(milliseconds), choose: [choose('size', '5x5'), document.getElementById('size').value] };
    }""")
    seen = got["seen"]
    assert (seen["a"]["seed"], seen["b"]["seed"], seen["c"]["seed"], seen["d"]["seed"]) == (123, 9, 0, 0)
    assert "negative_prompt" not in seen["a"] and seen["c"]["negative_prompt"] == "blur"
    assert ("scheduler" in seen["a"], seen["c"]["scheduler"], seen["d"]["scheduler"]) == (False, "Euler", "DDIM")
    assert got["times"] == ["999 ms", "1.0 s", "12.3 s"] and got["choose"] == [False, "128x128"]


def test_the_theme_is_shown_and_remembered(page: Any) -> None:
    def shown() -> Any:
        return page.evaluate("document.documentElement.dataset.theme ?? null")

    for theme in ("dark", "light", None):
        page.click("#theme")
        assert shown() == theme
    page.click("#theme")
    page.reload()
    page.wait_for_selector(READY)
    assert shown() == "dark"


def test_files_are_named_after_their_prompts_and_only_what_is_shown_is_saved(page: Any) -> None:
    names: list[str] = []
    page.on("download", lambda download: names.append(download.suggested_filename))
    page.select_option("#compare", "seed")
    page.fill("#prompt", "“A star”, " + 20 * "big " + "!")
    page.wait_for_function("() => document.querySelector('#frame-b figcaption').textContent.includes('seed 8')")
    page.wait_for_selector(READY)
    page.click("#download")
    wait_until(lambda: page.evaluate("0") == 0 and len(names) == 2)
    stem = ("a-star-" + 20 * "big-")[:60]
    assert sorted(names) == [f"{stem}-7.jpg", f"{stem}-8.jpg"]
    assert page.locator("#history li").count() <= 1
    page.select_option("#compare", "")
    page.wait_for_selector(READY)
    for prompt, name in (("!?", "picture-7.jpg"), ("Été!", "été-7.jpg")):
        drawn(page, lambda prompt=prompt: page.fill("#prompt", prompt))
        page.wait_for_function(SHOWN, arg=prompt)
        names.clear()
        page.click("#download")
        wait_until(lambda: page.evaluate("0") == 0 and bool(names))
        page.wait_for_timeout(200)
        assert names == [name]


COUNTED = """window.alive = new Set(); const make = URL.createObjectURL, free = URL.revokeObjectURL;
    URL.createObjectURL = (blob) => { const url = make(blob); alive.add(url); return url; };
    URL.revokeObjectURL = (url) => { alive.delete(url); free(url); };"""


def test_pictures_that_are_neither_shown_nor_in_the_history_are_freed(server: Running, page_of: Open) -> None:
    cable = Cable()

    def before(page: Any) -> None:
        cable.lay(page)
        page.add_init_script(COUNTED)

    page = page_of(server, before=before)
    page.wait_for_selector(READY)
    kept = 0
    for index in range(6):
        page.fill("#prompt", f"star {index}")
        cable.until(SHOWN, f"star {index}")
        if index % 3 == 0:  # the others are replaced before they have settled
            cable.wait(2)
            kept += 1
            assert page.text_content("#said") == "Picture drawn"
    page.clock.run_for(100)  # the last one's frame
    assert page.locator("#history li").count() == kept == 2
    shown = page.evaluate("[...document.querySelectorAll('#history img, #frame-a img')].map((image) => image.src)")
    assert sorted(page.evaluate("[...alive]")) == sorted(shown)


def test_what_is_under_way_and_what_came_is_seen(tmp_path: Path, page_of: Open) -> None:
    gate, cable = Gate(), Cable()
    with running(tmp_path, FakeDrawer(before_step=gate)) as server:
        page = page_of(server, before=cable.lay)
        page.wait_for_selector(READY)
        page.fill("#prompt", "a star")
        cable.page.clock.run_for(60)
        gate.wait()
        assert "busy" in page.get_attribute("#frame-a", "class")
        other = page_of(server)
        other.wait_for_selector(READY)
        other.fill("#prompt", "waits")
        other.wait_for_function(
            "() => document.querySelector('#status').textContent === 'Busy: 0 before you' || "
            "document.querySelector('#status').textContent === 'Busy: others are drawing'"
        )
        assert other.text_content("#said") == other.inner_text("#status")
        page.press("#prompt", "Escape")
        assert cable.status == "Stopped" and "busy" not in page.get_attribute("#frame-a", "class")
        gate.let(100)
        page.fill("#prompt", "a moon")
        page.select_option("#size", "192x128")
        cable.until(SHOWN, "a moon")
        cable.until("document.querySelector('#frame-a').style.getPropertyValue('--picture') !== ''")
        assert not page.is_visible("#frame-a .empty")
        assert (
            page.evaluate("getComputedStyle(document.querySelector('#frame-a .canvas')).getPropertyValue('--ratio')")
            == "1.5"
        )
        assert page.evaluate("document.querySelector('#frame-a i').style.width") == "100%"
        assert cable.status == "Ready"


def test_enter_draws_and_with_shift_begins_a_line(page: Any) -> None:
    drawn(page, lambda: page.fill("#prompt", "a star"))
    page.focus("#prompt")
    page.keyboard.press("Shift+Enter")
    assert page.input_value("#prompt") == "a star\n"


def test_the_network_comes_and_goes(server: Running, page_of: Open) -> None:
    cable = Cable()
    page = page_of(server, "/?steps=6", before=cable.lay)
    page.wait_for_selector(READY)
    page.evaluate("document.getElementById('steps').value = 3")
    page.evaluate("dispatchEvent(new Event('online'))")  # it is there already
    for connections in range(2, 8):
        page.evaluate("dispatchEvent(new Event('offline'))")
        assert cable.status == LOST and page.text_content("#said") == LOST
        page.evaluate("dispatchEvent(new Event('online'))")
        page.wait_for_selector(READY)  # at once: no time has passed
        assert cable.connections == connections
    cable.wait(10)  # until the attempts that were planned meanwhile are over
    page.evaluate("dispatchEvent(new Event('offline'))")
    cable.wait(1)  # it is tried again soon, however often it was lost before
    page.wait_for_selector(READY)
    cable.wait(8)
    assert (cable.connections, cable.status, page.input_value("#steps")) == (8, "Ready", "3")
    page.fill("#prompt", "a star")
    cable.until(SHOWN, "a star")


def test_a_server_without_models_and_a_full_one_say_so(
    tmp_path: Path, page_of: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, sockets=1) as server:
        with monkeypatch.context() as patched:
            patched.setattr("vega_edge.serve.live.live_models", lambda entries: [])
            none = page_of(server)
            none.wait_for_selector('#status[data-state="fault"]')
            assert none.inner_text("#status") == "No model has a bundle here"
        full = page_of(server)
        full.wait_for_selector('#status[data-state="lost"]')
        said = "1 live pages are open, which is the most; try again later. Trying again…"
        assert full.inner_text("#status") == said
        none.close()
        full.wait_for_selector(READY)
