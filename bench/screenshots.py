"""Pictures of the live page: `python -m vega_edge.bench.screenshots http://localhost:8000/ FOLDER`.

Those in docs/images are its laptop-dark, phone, compare and kiosk.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

PROMPTS = ("a yellow moon in the night sky", "a pink heart at sunset", "a big red star on a blue background")
VIEWS = {  # name: width, height, device pixels a pixel, colour scheme, address, what is compared
    "laptop-dark": (1440, 900, 1, "dark", "", ""),
    "laptop-light": (1440, 900, 1, "light", "", ""),
    "phone": (390, 844, 2, "light", "", ""),
    "compare": (1440, 900, 1, "light", "", "seed"),
    "kiosk": (1920, 1080, 1, "light", "?kiosk", ""),
    "4k": (3840, 2160, 1, "dark", "", ""),
}
_SHOWN = "before => (document.documentElement.dataset.shown || '') !== before"
_READY = '#status[data-state="ready"]'


def main() -> None:
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found, unused-ignore]

    url, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser: Any = p.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        for name, (width, height, scale, scheme, query, compared) in VIEWS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height}, device_scale_factor=scale, color_scheme=scheme
            )
            page.goto(url + query)
            page.wait_for_selector(_READY)
            if compared:
                page.select_option("#compare", compared)
            for prompt in () if query else PROMPTS:
                before = page.evaluate("() => document.documentElement.dataset.shown || ''")
                page.fill("#prompt", prompt)
                page.wait_for_function(_SHOWN, arg=before)
                page.wait_for_timeout(1500)  # until it is in the history
            page.wait_for_function(_SHOWN, arg="")
            page.wait_for_selector(_READY)
            page.wait_for_timeout(1000)  # until the progress bar has faded
            page.screenshot(path=folder / f"{name}.png")
            Image.open(folder / f"{name}.png").convert("RGB").save(folder / f"{name}.webp", quality=85)
            (folder / f"{name}.png").unlink()
            page.close()


if __name__ == "__main__":
    main()
