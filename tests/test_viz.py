"""Pictures: what is drawn, and where. No display is used."""

import inspect

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


# Every option has an effect ------------------------------------------------------------------------------------------
RGBA = {"red": (1, 0, 0, 1), "blue": (0, 0, 1, 1)}
IMAGE = np.linspace(0, 1, 80).reshape(8, 10)
OFFSET = np.random.default_rng(3).uniform(-0.4, 0.4, (36, 6, 7))  # two groups of 3x3 taps


def level(**options):
    return viz.Level(OFFSET, **{"padding": 1, **options})


def sampled(levels=None, position=(3, 3), image=IMAGE, **options):
    return viz.sampling_points(axes(), image, level() if levels is None else levels, position, **options)


def taps(group=0, position=(3, 3), kernel=(3, 3), stride=1, padding=1, dilation=1, offset=OFFSET):
    """Where one level samples, by the formula."""
    ky, kx = np.indices(kernel).reshape(2, -1)
    y, x = (np.array(position) * stride - padding)[:, None] + dilation * np.array([ky, kx])
    count = len(ky)
    dy, dx = offset.reshape(-1, count, 2, *offset.shape[1:])[group, :, :, position[0], position[1]].T
    return np.stack((y + dy, x + dx), axis=1)


def field(offset=OFFSET, tap=4, **options):
    return viz.offset_field(axes(), offset, tap, **options)


def arrows(ax):
    """(dx, dy) of each arrow, row by row."""
    return np.stack((ax.collections[0].U, ax.collections[0].V), axis=1)


def parts(box=(2, 3, 13, 14), offset=None, **options):
    offset = OFFSET[:4, :3, :3] if offset is None else offset
    return viz.roi_parts(axes(), list(box), offset, **options)


def edges(ax):
    return np.array([patch.get_bbox().extents for patch in ax.patches])


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def bins(**options):
    return viz.roi_bins([2, 3, 13, 14], OFFSET[:4, :3, :3], **options)


def dilation(ax):
    return np.asarray(ax.images[0].get_array())


def check_panels():
    figure = viz.panels(2, 3, (1.5, 2))[0, 0].figure
    close(figure.get_size_inches(), (4.5, 4))
    assert viz.panels(rows=3).shape == (3, 1) and viz.panels(columns=3).shape == (1, 3)
    shared = viz.panels(1, 2, sharex=True)
    assert shared[0, 0].get_shared_x_axes().joined(*shared[0])


def check_levels():
    """Each option of a level alone moves the points as the formula says."""
    close(points(sampled(level())), taps())
    close(points(sampled(level(stride=2))), taps(stride=2))
    close(points(sampled(level(padding=0))), taps(padding=0))
    close(points(sampled(level(dilation=3))), taps(dilation=3))
    close(points(sampled(level(kernel_size=(1, 3)))), taps(kernel=(1, 3)))
    close(points(sampled(level()._replace(offset=OFFSET + 1))), taps() + 1)
    assert len(points(sampled([level(), level()]))) == 81


def check_position():
    ax = sampled(position=(2, 5))
    close(points(ax), taps(position=(2, 5)))
    (cross,) = ax.lines
    close((cross.get_ydata()[0], cross.get_xdata()[0]), (2, 5))


def check_pixel_stride_of_points():
    ax = sampled(pixel_stride=4)
    close(points(ax), 4 * taps())
    close((ax.lines[0].get_ydata()[0], ax.lines[0].get_xdata()[0]), (12, 12))


def check_group_of_points():
    close(points(sampled(group=1)), taps(group=1))
    close(viz.trace([level()], (3, 3), group=1), taps(group=1))
    assert not np.allclose(taps(group=1), taps())


def check_color_of_points():
    for color, rgba in RGBA.items():
        close(sampled(color=color).collections[0].get_facecolor()[0], rgba)


def check_size_of_points():
    for size in (3, 50):
        close(sampled(size=size).collections[0].get_sizes(), size)


def check_image_of_points():
    close(dilation(sampled(image=IMAGE)), IMAGE)


def check_tap():
    close(arrows(field(tap=0)), OFFSET[[1, 0]].reshape(2, -1).T)
    close(arrows(field(tap=8)), OFFSET[[17, 16]].reshape(2, -1).T)
    means = OFFSET[:18].reshape(9, 2, -1).mean(axis=0)
    close(arrows(field(tap=None)), means[::-1].T)


def check_group_of_field():
    close(arrows(field(tap=8, group=1)), OFFSET[[35, 34]].reshape(2, -1).T)


def check_kernel_of_field():
    close(arrows(field(tap=1, kernel_size=(1, 2), group=3)), OFFSET[[15, 14]].reshape(2, -1).T)
    close(arrows(field(tap=0, kernel_size=1, group=3)), OFFSET[[7, 6]].reshape(2, -1).T)


def check_places_of_field():
    grid = np.indices((6, 7))[::-1].reshape(2, -1).T
    close(field().collections[0].get_offsets(), grid)
    close(field(stride=3).collections[0].get_offsets(), 3 * grid)
    ax = field(pixel_stride=2)
    close(ax.collections[0].get_offsets(), 2 * grid)
    close(arrows(ax), 2 * arrows(field()))


def check_image_of_field():
    assert not field().images
    close(dilation(field(image=IMAGE)), IMAGE)
    assert field().get_xlim() != field(image=IMAGE).get_xlim()


def check_options_of_field():
    close(field(color="blue").collections[0].get_facecolor()[0], RGBA["blue"])
    assert field(width=0.05).collections[0].width == 0.05


def check_colors_of_parts():
    ax = parts(color="red", box_color="blue")
    close([patch.get_edgecolor() for patch in ax.patches], [RGBA["blue"]] * 10 + [RGBA["red"]] * 9)


def check_image_of_parts():
    assert not parts().images
    close(dilation(parts(image=IMAGE)), IMAGE)


def check_bins():
    """roi_parts hands its options on."""
    for options in (
        {},
        {"scale": 0.3},
        {"class_index": 1},
        {"operator": "deform_roi_pool"},
        {"bins": (2, 4)},
        {"bins": 5},
    ):
        moved = bins(**options).reshape(-1, 4)
        close(edges(parts(**options))[-len(moved) :], moved)
    plain = viz.roi_bins([2, 3, 13, 14], bins=3)[..., :2]
    close(bins(scale=0.3)[..., :2] - plain, 3 * (bins(scale=0.1)[..., :2] - plain))
    close((bins(class_index=1)[..., :2] - plain)[..., 0], 0.1 * 12 * OFFSET[2, :3, :3])
    assert bins(bins=(2, 4)).shape == (2, 4, 4) and bins(bins=5).shape == (5, 5, 4)
    close(viz.roi_bins([2, 3, 13, 14], bins=1, operator="deform_roi_pool")[0, 0], [1.5, 2.5, 12.5, 13.5])
    close(viz.roi_bins([2, 3, 13, 14], bins=1)[0, 0], [1.5, 2.5, 13.5, 14.5])


def check_box_and_offset():
    assert (
        len(parts(offset=OFFSET[:2, :2, :2]).patches) == 9 and len(viz.roi_parts(axes(), [2, 3, 13, 14]).patches) == 50
    )
    close(edges(parts((4, 5, 13, 14)))[9], [3.5, 4.5, 13.5, 14.5])


def check_dilation_map():
    for options in ({}, {"dilation": 3}, {"kernel_size": (1, 3)}, {"group": 1}):
        group = options.get("group", 0)
        rest = {"kernel_size": 3, **{name: value for name, value in options.items() if name != "group"}}
        expected = pydeform.effective_dilation(OFFSET[None], **rest)[0, group]
        close(dilation(viz.dilation_map(axes(), OFFSET, **options)), expected)
        assert not options or not np.allclose(expected[0, 0], pydeform.effective_dilation(OFFSET[None], 3)[0, 0, 0, 0])


def check_dilation_curve():
    ax = viz.dilation_curve(axes(), [1, 2.5], {"a": [1, 2], "b": [[2, 4], [4, 8]]})
    close([line.get_xdata() for line in ax.lines], [[1, 2.5]] * 2)
    close([line.get_ydata() for line in ax.lines], [[1, 2], [3, 6]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    close(ax.get_xticks(), [1, 2.5])
    band = ax.collections[0].get_paths()[0].get_extents()
    close((band.ymin, band.ymax), (2, 8))


def check_learning_curves():
    ax = viz.learning_curves(axes(), {"a": [1, 2, 3], "b": [[2, 4], [4, 8]]}, "loss")
    assert ax.get_ylabel() == "loss" and viz.learning_curves(axes(), {"a": [1]}).get_ylabel() == "test accuracy"
    close(ax.lines[0].get_xdata(), [1, 2, 3])
    close(ax.lines[1].get_ydata(), [3, 6])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def check_show():
    close(dilation(viz.show(axes(), IMAGE)), IMAGE)


# Function -> each of its options, and what shows that it has an effect.
EFFECTS = {
    viz.panels: dict.fromkeys(("rows", "columns", "size", "options"), check_panels),
    viz.Level: dict.fromkeys(("offset", "kernel_size", "stride", "padding", "dilation"), check_levels),
    viz.sampling_points: {
        "image": check_image_of_points, "levels": check_levels, "position": check_position,
        "pixel_stride": check_pixel_stride_of_points, "group": check_group_of_points, "color": check_color_of_points,
        "size": check_size_of_points,
    },
    viz.trace: {"levels": check_levels, "position": check_position, "group": check_group_of_points},
    viz.offset_field: {
        "offset": check_tap, "tap": check_tap, "image": check_image_of_field, "pixel_stride": check_places_of_field,
        "kernel_size": check_kernel_of_field, "stride": check_places_of_field, "group": check_group_of_field,
        "options": check_options_of_field,
    },
    viz.roi_parts: {
        "box": check_box_and_offset, "offset": check_box_and_offset, "image": check_image_of_parts,
        **dict.fromkeys(("bins", "scale", "class_index", "operator"), check_bins),
        **dict.fromkeys(("color", "box_color"), check_colors_of_parts),
    },
    viz.roi_bins: dict.fromkeys(("box", "offset", "bins", "scale", "class_index", "operator"), check_bins),
    viz.dilation_map: dict.fromkeys(("offset", "kernel_size", "dilation", "group"), check_dilation_map),
    viz.dilation_curve: dict.fromkeys(("scales", "dilation"), check_dilation_curve),
    viz.learning_curves: dict.fromkeys(("curves", "label"), check_learning_curves),
    viz.show: {"image": check_show},
}  # fmt: skip


@pytest.mark.parametrize("check", dict.fromkeys(check for effects in EFFECTS.values() for check in effects.values()))
def test_every_option_has_its_effect(check):
    check()


def test_no_function_and_no_option_is_left_out():
    public = {f for name, f in vars(viz).items()
              if not name.startswith("_") and callable(f) and getattr(f, "__module__", "") == viz.__name__}  # fmt: skip
    assert set(EFFECTS) == public
    for function, effects in EFFECTS.items():
        assert set(inspect.signature(function).parameters) - {"ax"} == set(effects), function.__name__


OPTIONAL = [
    (function, option)
    for function, effects in EFFECTS.items()
    if function is not viz.Level
    for option in effects
    if inspect.signature(function).parameters[option].default is not inspect.Parameter.empty or option == "options"
]


@pytest.mark.parametrize(("function", "option"), OPTIONAL)
def test_the_checks_see_when_an_option_is_ignored(monkeypatch, function, option):
    signature = inspect.signature(function)

    def deaf(*given, **named):
        bound = signature.bind(*given, **named)
        bound.arguments.pop(option, None)
        return function(*bound.args, **bound.kwargs)

    monkeypatch.setattr(viz, function.__name__, deaf)
    with pytest.raises((AssertionError, ValueError, IndexError)):  # numbers, shapes, or what is not there at all
        EFFECTS[function][option]()


ZEROS = np.zeros((18, 7, 9))
ONE_LEVEL = [viz.Level(ZEROS, padding=1)]


@pytest.mark.parametrize(
    ("draw", "error", "text"),
    [
        (lambda ax: viz.offset_field(ax, ZEROS, tap=9), ValueError, r"offset_field: tap must be less than 9, got 9"),
        (lambda ax: viz.offset_field(ax, ZEROS, tap=-1), ValueError, r"offset_field: tap must be an int >= 0, got -1"),
        (lambda ax: viz.offset_field(ax, ZEROS, group=1), ValueError, r"offset_field: group must be less than 1"),
        (lambda ax: viz.offset_field(ax, ZEROS[:17]), ValueError, r"offset_field: offset .* 2\*K = 18 .*, got 17"),
        (
            lambda ax: viz.offset_field(ax, ZEROS[None]),
            ValueError,
            r"offset_field: offset must have shape \(2\*offset",
        ),
        (
            lambda ax: viz.dilation_map(ax, ZEROS, group=4),
            ValueError,
            r"dilation_map: group must be less than 1, got 4",
        ),
        (lambda ax: viz.trace(ONE_LEVEL, (7, 3)), ValueError, r"trace: position must be less than 7, got 7"),
        (
            lambda ax: viz.trace(ONE_LEVEL, (-1, 3)),
            ValueError,
            r"trace: position must be an int >= 0 or 2 of them, got \(-1, 3\)",
        ),
        (
            lambda ax: viz.trace(ONE_LEVEL, (1.5, 3)),
            TypeError,
            r"trace: position must be an int >= 0 or 2 of them, got \(1\.5",
        ),
        (
            lambda ax: viz.trace(ONE_LEVEL, (1, 3, 2)),
            ValueError,
            r"trace: position must be .* 2 of them, got \(1, 3, 2\)",
        ),
        (
            lambda ax: viz.trace([viz.Level(ZEROS[None])], (1, 3)),
            ValueError,
            r"trace: offset must have shape \(2\*offset",
        ),
        (lambda ax: viz.trace(ONE_LEVEL, (1, 3), 1), ValueError, r"trace: group must be less than 1, got 1"),
        (lambda ax: viz.trace([], (1, 3)), ValueError, r"trace: levels must have at least one Level, got none"),
        (lambda ax: viz.roi_bins([0, 0, 9, 9], class_index=1), ValueError, r"class_index must be less than 1, got 1"),
    ],
)
def test_what_there_is_not(draw, error, text):
    with pytest.raises(error, match=text):
        draw(viz.panels()[0, 0])


def test_offsets_as_lists():
    assert len(viz.offset_field(viz.panels()[0, 0], ZEROS.tolist(), tap=8).collections) == 1
