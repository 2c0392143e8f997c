import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from unimed.sample.masks import STRUCTURES, bounding_box, components, findings, largest_component, structure_of, to_structures
from unimed.sample.slices import ASSETS


def flood(mask):
    """Components by flood fill, numbered in raster order."""
    out, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if out[start]:
            continue
        count += 1
        waiting = [start]
        while waiting:
            y, x = waiting.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not out[y, x]:
                out[y, x] = count
                waiting += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return out


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_components_are_those_of_a_flood_fill(mask):
    np.testing.assert_array_equal(components(mask), flood(mask))


def test_components_of_a_spiral():
    spiral = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
    assert components(spiral).max() == 1


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)).filter(np.any))
def test_the_largest_component(mask):
    numbered = flood(mask)
    part = largest_component(mask)
    assert part.sum() == np.bincount(numbered.ravel())[1:].max()
    assert len(np.unique(numbered[part])) == 1
    x, y, width, height = bounding_box(part)
    assert part[y : y + height, x : x + width].sum() == part.sum()
    assert part[y].any()
    assert part[:, x].any()
    assert part[y + height - 1].any()
    assert part[:, x + width - 1].any()


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("liver", "liver"),
        ("kidney_left", "left kidney"),
        ("lung_lower_lobe_right", "right lung"),
        ("lung_left", "left lung"),
        ("vertebrae_T12", "spine"),
        ("vertebrae", "spine"),
        ("intervertebral_discs", "spine"),
        ("autochthon_right", "right back muscle"),
        ("small_bowel", "small bowel"),
        ("kidney_cyst_left", None),
        ("humerus_left", None),
        ("rib_left_7", None),
    ],
)
def test_structure_of(name, structure):
    assert structure_of(name) == structure


@pytest.mark.parametrize("table", ["total", "total_mr"])
def test_every_structure_is_made_of_vendored_classes(table):
    names = json.loads((ASSETS / "labels.json").read_text())[table]
    assert {structure_of(name) for name in names.values()} - {None} == set(STRUCTURES)
    labels = np.array([int(key) for key, name in names.items() if name == "spleen"] + [0], np.uint8)
    np.testing.assert_array_equal(to_structures(labels, names), [1 + STRUCTURES.index("spleen"), 0])


@given(st.integers(1, 5))
def test_findings_take_the_largest_part_and_drop_the_small(pixel):
    plane = np.zeros((40, 60), np.uint8)
    plane[2:12, 5:25] = 1 + STRUCTURES.index("liver")  # 200 pixels
    plane[30:34, 50:54] = 1 + STRUCTURES.index("liver")  # 16 more, elsewhere
    plane[20:22, 0:40] = 1 + STRUCTURES.index("colon")  # 80 pixels, but thin
    plane[30:35, 0:5] = 1 + STRUCTURES.index("spleen")  # 25 pixels
    (found,) = findings(plane, float(pixel), min_mm2=50.0 * pixel**2, min_side_mm=3.0 * pixel)
    assert (found.name, found.box, found.xyxy) == ("liver", (5, 2, 20, 10), (5, 2, 25, 12))
    assert found.area_mm2 == 216 * pixel**2
