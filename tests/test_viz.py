"""Pictures: what is drawn, and where. No display is used."""

import numpy as np
import pytest

pytest.importorskip("matplotlib")
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
