"""The image of a map: a PNG that shows where the map is high."""

import io

import numpy as np
from PIL import Image

from service.explanation.overlay import MARGIN, colours, display_size, overlay


def test_colours_run_evenly_from_dark_to_light() -> None:
    ramp = colours(np.linspace(0, 1, 64, dtype=np.float32)).astype(float)
    luminance = ramp @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_an_input_is_shown_large_and_in_its_shape() -> None:
    assert display_size((32, 32)) == (448, 448)
    assert display_size((300, 600)) == (224, 448)


def test_the_overlay_is_yellow_where_the_map_is_high_and_the_same_each_time() -> None:
    grey = np.full((160, 160, 3), 128, np.uint8)
    heat = np.zeros((16, 16), np.float32)
    heat[:4, :4] = 1
    file = overlay(grey, heat, "a label that is far too long for the width of such a small image, 99.9%")
    image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)
    laid = image[-MARGIN - 160 : -MARGIN, MARGIN : MARGIN + 160]
    high, low = laid[10, 10], laid[-10, -10]
    assert high[0] > high[2] + 80  # yellow
    assert low[2] > low[1] + 20  # violet
    assert overlay(grey, heat, "x") == overlay(grey, heat, "x")


def test_a_flat_map_is_shown_too() -> None:
    assert overlay(np.zeros((64, 64, 3), np.uint8), np.zeros((4, 4), np.float32), "").startswith(b"\x89PNG")
