import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimed.records import box as boxes

SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000))
BOXES100 = st.tuples(*[st.integers(0, 100)] * 4)


def test_text_is_the_floor_of_percent_per_axis():
    assert boxes.to_text((29, 10, 58, 20), (100, 40)) == "{<29><25><58><50>}"  # 29 / 100 * 100 is 28.999... in floating point
    assert boxes.to_text((13.9, 0, 200, 99.99), (200, 100)) == "{<6><0><100><99>}"
    assert boxes.to_text((-3, -3, 500, 500), (200, 100)) == "{<0><0><100><100>}"


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("{<1><2><3><4>}", (1, 2, 3, 4)),
        ("  { <1 > <2><3>\n<4> } and more", (1, 2, 3, 4)),
        ("{<007><2><3><100>}", (7, 2, 3, 100)),
        ("the box is {<1><2><3><4>}", None),
        ("{<1><2><3>}", None),
        ("{<1><2><3><-4>}", None),
        ("{<1><2><3><4.5>}", None),
        ("{<1><2><3><101>}", None),
        ("{<1><2><3><9999>}", None),
        ("", None),
        ("liver", None),
    ],
)
def test_from_text(text, box):
    assert boxes.from_text(text) == box


@given(st.text() | st.text(alphabet="{}<>0123456789 -.", max_size=40))
def test_any_text_gives_a_box_in_range_or_none(text):
    box = boxes.from_text(text)
    assert box is None or (len(box) == 4 and all(0 <= value <= 100 for value in box))


def test_find_takes_boxes_wherever_they_stand():
    assert boxes.find("liver {<1><2><3><4>}, or { <5><6>\n<7><8> }.") == ([(1, 2, 3, 4), (5, 6, 7, 8)], "liver,or.")
    assert boxes.find("{<1><2><3><101>}") == ([], "")
    assert boxes.find("liver") == ([], "liver")


@given(BOXES100)
def test_corners_come_into_order(box):
    ordered = boxes.in_order(box)
    assert not boxes.is_inverted(ordered)
    assert (ordered == box) == (not boxes.is_inverted(box))


@given(BOXES100, st.text(alphabet=" \t\n"), st.text())
def test_box_text_survives_spaces_and_what_follows(box, space, rest):
    text = boxes.to_text(box, (100, 100))
    assert boxes.from_text(space + space.join(text) + rest) == box


@given(SIZES, st.data())
def test_text_and_back_is_at_most_a_percent_off(size, data):
    box = tuple(data.draw(st.floats(0, side)) for side in (*size, *size))
    back = boxes.to_pixels(boxes.from_text(boxes.to_text(box, size)), size)
    for was, now, side in zip(box, back, size * 2, strict=True):
        assert -1e-6 * side <= was - now <= side / 100 * (1 + 1e-6)


@given(st.tuples(*[st.integers(0, 50)] * 4), st.tuples(*[st.integers(0, 50)] * 4), st.booleans())
def test_iou_is_symmetric_and_a_share(a, b, plus_one):
    a, b = (boxes.from_xywh(*box) for box in (a, b))
    assert 0 <= boxes.iou(a, b, plus_one) <= 1
    assert boxes.iou(a, b, plus_one) == boxes.iou(b, a, plus_one)
    if plus_one:
        assert boxes.iou(a, a) == 1


def test_iou_by_hand():
    assert boxes.iou((0, 0, 9, 9), (0, 0, 9, 9)) == 1
    assert boxes.iou((0, 0, 9, 9), (10, 0, 19, 9)) == 0  # ten pixels each, side by side
    assert boxes.iou((0, 0, 10, 10), (10, 0, 20, 10)) == pytest.approx(11 / (2 * 121 - 11))  # corners shared: one pixel column overlaps
    assert boxes.iou((0, 0, 10, 10), (10, 0, 20, 10), plus_one=False) == 0
    assert boxes.iou((0, 0, 10, 10), (5, 0, 15, 10), plus_one=False) == pytest.approx(1 / 3)
    assert boxes.iou((9, 9, 0, 0), (0, 0, 9, 9)) == 0  # corners the wrong way round have no area
    assert boxes.iou((3, 3, 3, 3), (3, 3, 3, 3), plus_one=False) == 0
