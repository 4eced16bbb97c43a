"""Pictures to start from: any mode, upright, fitted to a size; what can't be read is one clear error."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from vega_edge import cli
from vega_edge.errors import BundleError, UsageError
from vega_edge.models import find_bundle
from vega_edge.runtime import init_image
from vega_edge.runtime.decoder import Scaling
from vega_edge.runtime.init_image import Moments, as_rgb, fitted, read_picture, size_for
from vega_edge.runtime.pipeline import Pipeline

ORIENTATION = 0x0112


def gradient(mode: str = "RGB", size: tuple[int, int] = (48, 32)) -> Image.Image:
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "1", "RGBA", "LA", "RGBX"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = gradient(mode)
    got = as_rgb(image)
    assert (got.mode, got.size) == ("RGB", image.size)
    assert np.array_equal(np.asarray(got), np.asarray(image.convert("RGB")))


def test_what_is_transparent_is_white() -> None:
    image = gradient("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 128, 255]]), 32, 0).repeat(16, 1)))
    got, colours = np.asarray(as_rgb(image)).astype(float), np.asarray(gradient()).astype(float)
    assert np.all(got[:, :16] == 255)
    assert np.abs(got[:, 16:32] - (colours[:, 16:32] * 128 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(got[:, 32:], colours[:, 32:])
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    assert np.all(np.asarray(as_rgb(palette)) == 255)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    got = np.asarray(read_picture(tmp_path / "grey.png"))
    assert np.array_equal(got[..., 0], np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(got[..., 0], got[..., 2])


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (6, 270), (3, 180), (8, 90)])
def test_exif_orientation(tmp_path: Path, orientation: int, turned: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    gradient().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(
        np.asarray(read_picture(tmp_path / "a.png")), np.asarray(gradient().rotate(turned, expand=True))
    )


def test_the_middle_is_cut_out_and_scaled() -> None:
    image = Image.new("RGB", (300, 100), "black")
    image.paste(Image.new("RGB", (100, 100), "white"), (100, 0))
    got = fitted(image, 64, 64)
    assert (got.shape, got.dtype) == ((1, 3, 64, 64), np.float32)
    assert got.min() > 0.8 and got[..., 3:-3].min() > 0.98  # Lanczos looks a little over the edge
    same = fitted(gradient(), 48, 32)
    assert np.array_equal(same[0], np.asarray(gradient(), np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 512), (640, 512)), ((4000, 3000), (1280, 960)), ((100, 100), (1024, 1024)), ((5000, 100), (2048, 256))],
)
def test_the_size_where_none_was_asked_for(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_for(Image.new("L", size), (1024, 1024), 256, 2048, 64) == expected


@pytest.mark.parametrize(
    ("size", "default", "least", "most", "multiple"),
    [
        ((4000, 3000), (128, 128), 64, 256, 32),
        ((3000, 4000), (512, 512), 256, 1024, 64),
        ((1, 9999), (512, 512), 256, 1024, 64),
    ],
)
def test_small_models_keep_a_pictures_shape_too(
    size: tuple[int, int], default: tuple[int, int], least: int, most: int, multiple: int
) -> None:
    expected = {4000: (128, 96), 3000: (384, 512), 1: (256, 1024)}[size[0]]
    assert size_for(Image.new("L", size), default, least, most, multiple) == expected


@given(
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.sampled_from(
        [(128, 64, 256, 32), (512, 256, 1024, 64), (1024, 512, 2048, 64), (768, 64, 2048, 64), (500, 100, 700, 8)]
    ),
)
@settings(deadline=None)
def test_no_allowed_size_of_about_as_many_pixels_is_nearer_to_the_pictures_shape(
    size: tuple[int, int], model: tuple[int, int, int, int]
) -> None:
    side, least, most, multiple = model
    width, height = size_for(SimpleNamespace(size=size), (side, side), least, most, multiple)  # type: ignore[arg-type]
    sides = [px for px in range(least, most + 1) if px % multiple == 0]
    assert width in sides and height in sides
    if size == (width, height):
        return
    shape = size[0] / size[1]
    ideal = [min(max(side * factor, least), most) for factor in (shape**0.5, shape**-0.5)]
    pixels = ideal[0] * ideal[1]

    def error(w: int, h: int) -> float:
        return abs(math.log(w / h / shape))

    near = [error(w, h) for w in sides for h in sides if 0.76 * pixels <= w * h <= 1.32 * pixels]
    assert error(width, height) <= min(near, default=math.inf) + 1e-9
    if near:
        assert 0.74 * pixels <= width * height <= 1.34 * pixels


def test_pictures_without_pixels_and_closed_ones(tmp_path: Path) -> None:
    gradient().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])
    made, opened, loaded = Image.new("RGB", (8, 8)), Image.open(tmp_path / "a.png"), Image.open(tmp_path / "a.png")
    loaded.load()
    for image in (made, opened, loaded):
        image.close()
    with Image.open(tmp_path / "a.png") as left:
        pass
    with Pipeline.open("demo-vegart", "onnxruntime-cpu") as pipe:
        for size in ((0, 0), (0, 8), (8, 0)):
            with pytest.raises(UsageError, match=f"{size[0]}x{size[1]}"):
                pipe.request("a star", image=Image.new("RGB", size))
        for image in (made, opened, loaded, left, Image.open(tmp_path / "cut.png")):
            with pytest.raises(UsageError, match=r"can't be read \(.+\); "):
                pipe.request("a star", image=image)


def test_files_that_are_no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cut, big = tmp_path / "a.txt", tmp_path / "cut.png", tmp_path / "big.png"
    text.write_text("no picture")
    eps = tmp_path / "a.eps"
    gradient().save(eps)  # Pillow would start Ghostscript to read it
    gradient(size=(200, 200)).save(tmp_path / "whole.png")
    cut.write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    Image.new("1", (9000, 9000)).save(big)
    messages = {
        tmp_path / "none.png": f"there is no picture {tmp_path / 'none.png'}",
        text: f"{text} is no picture that is read; allowed: PNG, JPEG, WEBP, AVIF, GIF, BMP, TIFF, PPM",
        eps: f"{eps} is no picture that is read; allowed: PNG, JPEG, WEBP, AVIF, GIF, BMP, TIFF, PPM",
        big: f"{big} is 9000x9000, 77 million pixels; at most 64 million are read: make it smaller",
        tmp_path: f"{tmp_path} can't be read: Is a directory",
    }
    for path, message in messages.items():
        with pytest.raises(UsageError) as error:
            read_picture(path)
        assert str(error.value) == message
    with pytest.raises(UsageError, match=r"cut\.png can't be read: .*truncated"):
        read_picture(cut)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own bomb, at twice this
    with pytest.raises(UsageError) as error:
        read_picture(tmp_path / "whole.png")
    assert str(error.value) == f"{tmp_path / 'whole.png'} has far more than 64 million pixels; make it smaller"


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif(tmp_path: Path) -> None:
    gradient(size=(200, 200)).save(tmp_path / "a.avif")
    whole = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "a.avif").write_bytes(whole[:-200] + bytes(200))
    with pytest.raises(UsageError, match=r"a\.avif can't be read: "):
        read_picture(tmp_path / "a.avif")


def test_premultiplied_grey() -> None:
    image = Image.new("LA", (8, 8), (100, 128))
    assert as_rgb(image.convert("La")).getpixel((0, 0)) == as_rgb(image).getpixel((0, 0))


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        as_rgb(Image.new("F", (8, 8)))
    message = "the picture is of floating point numbers, whose range is not known; save it as 8 or 16 bits"
    assert str(error.value) == message


def test_the_posterior_is_drawn_at_the_networks_scale() -> None:
    scaling = Scaling.of({"scaling_factor": 0.5, "latents_mean": [1, 2], "latents_std": [2, 4]}, sdxl=True)
    moments = Moments(np.float32([[[3]], [[6]]]), np.float32([[[1]], [[0]]]), scaling)
    got = moments.draw(lambda shape: np.ones((1, *shape), np.float32))  # type: ignore[arg-type]
    assert got.ravel().tolist() == [(3 + 1 - 1) / 2 * 0.5, (6 - 2) / 4 * 0.5]
    assert np.allclose(scaling.from_network(scaling.to_network(got)), got)


def test_a_bundle_without_encoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = Pipeline.open("demo-vegart", "onnxruntime-cpu", verify=False)
    monkeypatch.setattr(pipe._encoder, "_part", None)
    with pytest.raises(BundleError) as error:
        pipe.request("a star", image=gradient())
    message = f"bundle {find_bundle('demo-vegart')} can't start from a picture: it has no vae_encoder; export it again"
    assert str(error.value) == message
    for options, text in (
        ({"strength": 0.5}, "strength says how far to go from a picture; give one with image"),
        ({"image": "a.png"}, "image must be a PIL picture, got str"),
        ({"image": gradient(), "strength": 1.5}, "strength must be a number from 0 to 1, got 1.5"),
    ):
        with pytest.raises(UsageError) as usage:
            pipe.request("a star", **options)
        assert str(usage.value) == text
    assert cli.main(["generate", "a star", "--image", str(tmp_path / "none.png")]) == 2
    assert capsys.readouterr().err == f"vega-edge: there is no picture {tmp_path / 'none.png'}\n"


def test_the_limit_is_looked_at_before_the_pixels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(init_image, "MAX_PIXELS", 100)
    gradient().save(tmp_path / "a.png")
    loaded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: loaded.append(self))
    with pytest.raises(UsageError, match="48x32"):
        read_picture(tmp_path / "a.png")
    assert not loaded
