"""Pictures: what is drawn, and where. No display is used."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
import pydeform
from pydeform import viz


def axes():
    return viz.panels()[0, 0]


def points(ax):
    """(P, 2) in (y, x)."""
    return np.asarray(ax.collections[0].get_offsets())[:, ::-1]


def test_points_of_one_level_are_the_taps():
    offset = np.zeros((18, 4, 5))
    offset[0], offset[17] = -0.5, 2.25  # first tap up, last tap to the right
    ax = axes()
    level = viz.Level(offset, stride=2, padding=1)
    assert viz.sampling_points(ax, np.zeros((16, 20)), level, (1, 2), pixel_stride=2) is ax
    expected = np.array([(1 + ky, 3 + kx) for ky in range(3) for kx in range(3)], float)
    expected[0, 0] -= 0.5
    expected[8, 1] += 2.25
    np.testing.assert_allclose(points(ax), 2 * expected)


def test_points_through_two_levels_stay_aligned_at_the_border():
    lower, upper = np.zeros((18, 4, 4)), np.zeros((18, 4, 4))
    lower[:] = np.arange(16).reshape(4, 4)  # every output of the lower level moves its taps by its own amount
    levels = [viz.Level(lower, padding=1), viz.Level(upper, padding=1)]
    found = viz.trace(levels, (0, 0))
    # the upper taps at row -1 or column -1 read zero; the other four follow the lower level's own offsets
    expected = [(y + ky - 1 + lower[0, y, x], x + kx - 1 + lower[0, y, x])
                for y in (0, 1) for x in (0, 1) for ky in range(3) for kx in range(3)]  # fmt: skip
    np.testing.assert_allclose(found, expected)
    assert viz.trace([viz.Level(lower, padding=1), viz.Level(upper + 100, padding=1)], (0, 0)).shape == (0, 2)
    viz.sampling_points(axes(), np.zeros((4, 4, 3)), [viz.Level(lower, padding=1), viz.Level(upper + 100)], (0, 0))


def test_offset_field_draws_one_arrow_a_position():
    offset = np.zeros((2 * 18, 3, 4))
    offset[18 + 16], offset[18 + 17] = 1, -2  # the last tap of the second group
    ax = viz.offset_field(axes(), offset, 8, group=1, image=np.zeros((12, 16)), pixel_stride=2, stride=2)
    arrows = ax.collections[0]
    assert len(arrows.get_offsets()) == 12
    np.testing.assert_array_equal(arrows.get_offsets()[-1], [12, 8])
    assert (arrows.U == -4).all() and (arrows.V == 2).all()
    mean = viz.offset_field(axes(), offset, group=1).collections[0]
    np.testing.assert_allclose(mean.V, 1 / 9)


def test_bins_by_the_formula():
    """docs/math/roi.md, eq. 1 to 3, scale 1, with other parts than bins and the second of two classes."""
    offset = np.random.default_rng(0).uniform(-1, 1, (4, 2, 3))
    found = viz.roi_bins([1, 2.5, -3.5, 11.4, 20.7], offset, bins=(4, 5), scale=0.3, class_index=1)
    assert found.shape == (4, 5, 4)
    x1, width = 3 - 0.5, 11 + 1 - 3  # halves away from zero, the last pixel included
    y1, height = -4 - 0.5, 21 + 1 + 4
    for py in range(4):
        for px in range(5):
            ty, tx = py * 2 // 4, px * 3 // 5
            left = x1 + px * width / 5 + 0.3 * width * offset[2, ty, tx]
            top = y1 + py * height / 4 + 0.3 * height * offset[3, ty, tx]
            np.testing.assert_allclose(found[py, px], [left, top, left + width / 5, top + height / 4])
    upside_down = viz.roi_bins([5, 5, 2, 2], bins=1)[0, 0]
    np.testing.assert_allclose(upside_down, [4.5, 4.5, 4.6, 4.6])
    with pytest.raises(ValueError, match="roi_bins: operator must be one of 'deform_psroi_pool', 'deform_roi_pool'"):
        viz.roi_bins([1, 2, 3, 4], operator="roi_align")


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("operator", list(viz.ROI_RULES))
def test_bins_lie_where_the_operator_reads(operator, scale):
    """Pooling an image of coordinates gives the mean point of each bin, which is `middle` of the way through it."""
    samples, side = 4, 40
    coordinates = np.stack(np.indices((side, side))[::-1]).astype(float)[None]  # channel 0 is x, 1 is y
    box = np.array([[0, 17.5, 14.3, 49.6, 58.5]]) * [1, *(0.5 / scale,) * 4]
    offset = np.random.default_rng(1).uniform(-1, 1, (1, 2, 3, 3))
    if operator == "deform_roi_pool":
        mean = pydeform.deform_roi_pool(coordinates, box, offset, 3, scale, samples, 0.15)[0]
        middle = 1 / 2
    else:
        options = {"output_dim": 2, "pooled_size": 3, "sample_per_part": samples, "trans_std": 0.15}
        mean = pydeform.deform_psroi_pool(coordinates, box, offset, spatial_scale=scale, **options)[0]
        middle = 3 / 8  # the mean of 0/4, 1/4, 2/4 and 3/4: its points are not centred
    bins = viz.roi_bins(box[0], offset[0], scale=0.15, operator=operator)
    expected = (1 - middle) * bins[..., :2] + middle * bins[..., 2:]
    np.testing.assert_allclose((mean.transpose(1, 2, 0) + 0.5) / scale - 0.5, expected, atol=1e-12)


def test_parts_are_drawn_where_the_bins_are():
    box, offset = [0, 2, 3, 13, 14], np.random.default_rng(0).uniform(-1, 1, (4, 3, 3))
    ax = axes()
    assert viz.roi_parts(ax, box, offset, class_index=1, scale=0.2, image=np.zeros((20, 20)), color="red") is ax
    drawn = np.array([patch.get_bbox().extents for patch in ax.patches])
    np.testing.assert_allclose(drawn[:9], viz.roi_bins(box, bins=3).reshape(9, 4))
    np.testing.assert_allclose(drawn[9], [1.5, 2.5, 13.5, 14.5])
    np.testing.assert_allclose(drawn[10:], viz.roi_bins(box, offset, scale=0.2, class_index=1).reshape(9, 4))
    assert len(ax.images) == 1
    regular = viz.roi_parts(axes(), box, bins=(2, 3), operator="deform_roi_pool")
    assert len(regular.patches) == 7
    np.testing.assert_allclose((*regular.get_xlim(), *regular.get_ylim()), (0.5, 13.5, 14.5, 1.5))


def test_dilation_and_learning_curves():
    ax = viz.dilation_curve(axes(), [1, 2, 3], {"layer": [[1, 2, 3], [3, 4, 5]], "other": [1, 1, 1]})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 3, 4])
    assert len(ax.collections) == 1  # the range of several runs
    ax = viz.learning_curves(axes(), {"plain": [0.5, 0.75]}, "accuracy")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2])
    assert ax.get_ylabel() == "accuracy"


def test_dilation_map():
    ax = viz.dilation_map(axes(), np.zeros((18, 4, 5)), dilation=2)
    np.testing.assert_allclose(ax.images[0].get_array(), np.full((4, 5), 2.0))


def test_pictures_can_be_saved(tmp_path):
    grid = viz.panels(1, 2)
    assert grid.shape == (1, 2)
    viz.show(grid[0, 0], np.zeros((5, 5)))
    grid[0, 0].figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 500
