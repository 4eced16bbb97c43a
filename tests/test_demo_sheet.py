"""`make demo`: what it draws is the picture that the README shows, and what can go wrong is one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="no engine is installed: vega-edge[cpu]")

from vega_edge.demo import sheet

SHOWN = Path(__file__).parent.parent / "docs" / "demo.png"


def test_the_sheet_is_the_readmes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet.main(str(tmp_path / "demo.png"))
    drawn, shown = (np.asarray(Image.open(path).convert("RGB"), np.float32) for path in (tmp_path / "demo.png", SHOWN))
    assert drawn.shape == shown.shape == (3 * 136 + 8, 3 * 136 + 8, 3)
    assert np.square(drawn - shown).mean() < 1  # 48 dB: engines and processors round differently
    head, *stages, wrote = capsys.readouterr().out.splitlines()
    assert head.startswith("9 pictures, demo-vegart, 4 steps each, on ")
    assert [line.split("  ")[1] for line in stages] == ["import and open", "text", "denoise", "decode"]
    assert all(line.endswith(" ms") for line in stages) and wrote == f"wrote {tmp_path / 'demo.png'}"


def test_pictures_stand_row_by_row() -> None:
    images = [Image.new("RGB", (4, 2), (shade, 0, 0)) for shade in (10, 20, 30)]
    out = sheet.sheet(images, columns=2, gap=1)
    assert out.size == (11, 7)
    assert [out.getpixel(at) for at in ((1, 1), (6, 1), (1, 4), (6, 4))] == [
        (10, 0, 0),
        (20, 0, 0),
        (30, 0, 0),
        (250,) * 3,
    ]


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        sheet.main(str(tmp_path / "none" / "demo.png"))
    assert str(ended.value).startswith("vega-edge: ") and "\n" not in str(ended.value)
