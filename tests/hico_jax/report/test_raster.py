"""Heat-maps as pictures."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from PIL import Image

from hico_jax.report import raster


def test_cells_are_coloured_by_their_value(tmp_path: pathlib.Path) -> None:
    path = raster.heatmap_png(
        tmp_path / "map.png", [[0.0, 1.0], [None, 0.5]], title="a", rows=["0 %", "100 %"], columns=["64", "128"],
        x_label="frames", y_label="depth",
    )  # fmt: skip
    with Image.open(path) as image:
        colours = {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    for expected in (raster._mix(0.0), raster._mix(1.0), raster._mix(0.5), raster.UNKNOWN):
        assert expected in colours
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def test_labels_must_fit(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="1 rows and 1 columns of labels"):
        raster.heatmap_png(tmp_path / "map.png", [[0.0, 1.0]], title="a", rows=["0"], columns=["64"])
