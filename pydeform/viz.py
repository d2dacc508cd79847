"""Pictures of sampling points, offsets, RoI parts and effective dilation: functions that draw on Matplotlib axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pydeform import _checks, _roi_geometry
from pydeform.ops.analysis import effective_dilation, sampling_locations

TAP, CENTRE = "#e4572e", "#ffd23f"
OFFSETS = "(2*offset_groups*K, out_h, out_w)"
ROI_RULES = {
    "deform_psroi_pool": _roi_geometry.DEFORM_PSROI_POOL,
    "deform_roi_pool": _roi_geometry.DEFORM_ROI_POOL,
}


class Level(NamedTuple):
    """One deformable layer over one image: its offsets (2*offset_groups*K, out_h, out_w), and its options."""

    offset: Any
    kernel_size: Any = 3
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1


def _one_of(op: str, name: str, value: Any, count: int) -> int:
    """A number from 0 on of a tap, a group or a place, of which there are `count`."""
    (number,) = _checks.per_axis(op, name, value, 1, 0)
    if number >= count:
        raise ValueError(f"{op}: {name} must be less than {count}, got {number}")
    return number


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4, 4), **options: Any) -> Any:
    """An array (rows, columns) of axes of a new figure, for use without a display; save with `axes[0, 0].figure`.

    `size` is the (width, height) of one panel in inches; `options` go to `Figure.subplots`.

    Examples
    --------
    >>> panels(2, 3).shape
    (2, 3)
    """
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    return figure.subplots(rows, columns, squeeze=False, **options)


def sampling_points(
    ax: Axes,
    image: Any,
    levels: Level | Sequence[Level],
    position: tuple[int, int],
    *,
    pixel_stride: float = 1,
    group: int = 0,
    color: Any = TAP,
    size: float = 12,
) -> Axes:
    """Draw where one output position of one or several deformable layers samples the image (figure 6 of the paper).

    Parameters
    ----------
    ax : where to draw
    image : (H, W) grey or (H, W, 3)
    levels : the layers from the first (nearest to the image) to the last
    position : (oy, ox) in the output of the last level
    pixel_stride : image pixels per pixel of the first level's input
    group : which offset group
    color, size : of the points; the position itself is a cross

    Returns
    -------
    ax
        With n levels of K taps there are up to K**n points: a tap of one level lies between outputs of the level below,
        and is followed into the nearest of them. A tap outside that map reads zero and ends there.

    References
    ----------
    arXiv:1703.06211 figure 6; its code drops taps outside before it looks up offsets, which misaligns them.

    Examples
    --------
    >>> import numpy as np
    >>> ax = sampling_points(panels()[0, 0], np.zeros((8, 8)), Level(np.zeros((18, 8, 8)), padding=1), (4, 4))
    >>> len(ax.collections[0].get_offsets())
    9
    """
    chain = [levels] if isinstance(levels, Level) else list(levels)
    points = trace(chain, position, group) * pixel_stride
    centre = trace([level._replace(offset=np.zeros_like(level.offset)) for level in chain], position, group)
    middle = np.nanmean(centre, axis=0) * pixel_stride
    show(ax, image)
    ax.scatter(points[:, 1], points[:, 0], s=size, color=color, linewidths=0.3, edgecolors="black", zorder=2)
    ax.plot(middle[1], middle[0], "+", color=CENTRE, markersize=9, markeredgewidth=2, zorder=3)
    return ax


def trace(levels: Sequence[Level], position: tuple[int, int], group: int = 0) -> Any:
    """Points (P, 2) in (y, x) that `position` of the last level samples in the input of the first.

    Examples
    --------
    >>> import numpy as np
    >>> trace([Level(np.zeros((2, 4, 4)), kernel_size=1, stride=2)], (1, 1)).tolist()
    [[2.0, 2.0]]
    """
    if not levels:
        raise ValueError("trace: levels must have at least one Level, got none")
    shape = np.shape(levels[-1].offset)
    _checks.check_ndim("trace", "offset", shape, OFFSETS, 3)
    place = _checks.per_axis("trace", "position", position, 2, 0)
    points = np.array([[_one_of("trace", "position", p, n) for p, n in zip(place, shape[1:], strict=True)]], np.float64)
    for level in reversed(levels):
        options = (level.kernel_size, level.stride, level.padding, level.dilation)
        found = sampling_locations(np.asarray(level.offset, np.float64)[None], *options)[0]
        where = found[_one_of("trace", "group", group, len(found))]  # (K, h, w, 2)
        at = np.rint(points)
        inside = ((at >= 0) & (at < where.shape[1:3])).all(axis=1)
        rows, columns = at[inside].astype(np.intp).T
        points = where[:, rows, columns].transpose(1, 0, 2).reshape(-1, 2)
    return points


def offset_field(
    ax: Axes,
    offset: Any,
    tap: int | None = None,
    *,
    image: Any = None,
    pixel_stride: float = 1,
    kernel_size: Any = 3,
    stride: int = 1,
    group: int = 0,
    **options: Any,
) -> Axes:
    """Draw the offsets of one image as arrows, one at each output position.

    Parameters
    ----------
    ax : where to draw
    offset : (2*offset_groups*K, out_h, out_w)
    tap : which tap of the kernel, row by row; None for the mean over all taps, the shift of the whole filter
    image : drawn under the arrows, with `pixel_stride` image pixels per pixel of the layer's input
    kernel_size, stride, group : of the layer; which of its offset groups
    options : for `Axes.quiver`

    Examples
    --------
    >>> import numpy as np
    >>> len(offset_field(panels()[0, 0], np.ones((18, 5, 6)), tap=8).collections)
    1
    """
    kernel_h, kernel_w = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    offset, taps = np.asarray(offset), kernel_h * kernel_w
    _checks.check_ndim("offset_field", "offset", offset.shape, OFFSETS, 3)
    channels, *size = offset.shape
    if channels == 0 or channels % (2 * taps):
        raise ValueError(f"offset_field: offset must have a multiple of 2*K = {2 * taps} channels, got {channels}")
    groups = offset.reshape(-1, taps, 2, *size)
    vectors = groups[_one_of("offset_field", "group", group, len(groups))]
    chosen = vectors.mean(axis=0) if tap is None else vectors[_one_of("offset_field", "tap", tap, taps)]
    dy, dx = chosen * pixel_stride
    rows, columns = np.indices(dy.shape) * (stride * pixel_stride)
    if image is not None:
        show(ax, image)
    else:
        ax.set(xlim=(-1, columns.max() + 1), ylim=(rows.max() + 1, -1), aspect="equal", xticks=[], yticks=[])
    options = {"color": TAP, "width": 0.006, **options}
    ax.quiver(columns, rows, dx, dy, angles="xy", scale_units="xy", scale=1, **options)
    return ax


def roi_parts(
    ax: Axes,
    box: Any,
    offset: Any = None,
    *,
    image: Any = None,
    bins: int | tuple[int, int] | None = None,
    scale: float = 0.1,
    class_index: int = 0,
    operator: str = "deform_psroi_pool",
    color: Any = TAP,
    box_color: Any = CENTRE,
) -> Axes:
    """Draw a box, its regular bins (thin) and where the offsets of one class put them (figure 7 of the paper).

    Parameters
    ----------
    ax : where to draw
    box, offset, bins, scale, class_index, operator : as in `roi_bins`; without offset only the regular bins are drawn
    image : drawn under the box, (H, W) grey or (H, W, 3), in whose pixels the box is given
    color, box_color : of the moved bins; of the box and its regular bins

    Returns
    -------
    ax
        Its patches are the regular bins row by row, the box, and the moved bins row by row.

    References
    ----------
    arXiv:1703.06211 figure 7.

    Examples
    --------
    >>> import numpy as np
    >>> ax = roi_parts(panels()[0, 0], [0, 2, 3, 13, 14], np.ones((2, 3, 3)), image=np.zeros((20, 20)))
    >>> len(ax.patches)
    19
    """
    options: dict[str, Any] = {"bins": bins, "scale": scale, "operator": operator}
    if offset is not None and bins is None:
        options["bins"] = tuple(np.shape(offset)[1:])
    regular = roi_bins(box, **options).reshape(-1, 4)
    moved = regular[:0]
    if offset is not None:
        moved = roi_bins(box, offset, class_index=class_index, **options).reshape(-1, 4)
    if image is not None:
        show(ax, image)
    else:
        x1, y1, x2, y2 = _extent(np.concatenate((regular, moved)))
        ax.set(xlim=(x1 - 1, x2 + 1), ylim=(y2 + 1, y1 - 1), aspect="equal", xticks=[], yticks=[])
    for edges, width, edge in (
        (regular, 0.6, box_color),
        (_extent(regular)[None], 2.0, box_color),
        (moved, 1.6, color),
    ):
        for x1, y1, x2, y2 in edges:
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, linewidth=width, edgecolor=edge, facecolor="none"))
    return ax


def roi_bins(
    box: Any,
    offset: Any = None,
    *,
    bins: int | tuple[int, int] | None = None,
    scale: float = 0.1,
    class_index: int = 0,
    operator: str = "deform_psroi_pool",
) -> Any:
    """The bins of a box, moved by the offsets of one class, in pixels of the image: whole numbers are pixel centres.

    Parameters
    ----------
    box : row [batch index, x1, y1, x2, y2] of the operator's boxes, or its last four numbers
    offset : (2*classes, part_h, part_w), one box of the operator's `trans` or `offset`: channel 2*class moves x,
        2*class + 1 y, in units of `scale` times the box. None: no offsets
    bins : how many bins, (vertical, horizontal) or one number for both; None: as many as there are offsets, or 7
    scale : the operator's trans_std or gamma
    class_index : which class
    operator : "deform_psroi_pool", which rounds a box to whole pixels and holds the last one, or "deform_roi_pool"

    Returns
    -------
    array (bins_h, bins_w, 4)
        Of [left, top, right, bottom]. `spatial_scale` plays no part: pixels of the operator's input lie where a resized
        image has them, (i + 1/2) / spatial_scale - 1/2.

    Examples
    --------
    >>> roi_bins([0, 2, 3, 13, 14], bins=2)[0].tolist()
    [[1.5, 2.5, 7.5, 8.5], [7.5, 2.5, 13.5, 8.5]]
    """
    _checks.check_choice("roi_bins", "operator", operator, tuple(ROI_RULES))
    rules = ROI_RULES[operator]
    corners = np.asarray(box, np.float64)[-4:]
    if rules.rounding == _roi_geometry.BEFORE_SCALE:
        corners = np.copysign(np.floor(np.abs(corners) + 0.5), corners)  # halves away from zero
    x1, y1, x2, y2 = corners - 0.5 * rules.half_pixel
    width = max(x2 + rules.last_pixel - x1, rules.least_size)
    height = max(y2 + rules.last_pixel - y1, rules.least_size)
    moves = np.zeros((2, 1, 1)) if offset is None else np.asarray(offset, np.float64)
    classes, part_h, part_w = len(moves) // 2, *moves.shape[1:]
    first = 2 * _one_of("roi_bins", "class_index", class_index, classes)
    if bins is None:
        bins = 7 if offset is None else (part_h, part_w)
    bins_h, bins_w = (bins, bins) if isinstance(bins, int) else bins
    py, px = np.indices((bins_h, bins_w))
    cell = (py * part_h // bins_h, px * part_w // bins_w)
    left = x1 + px * (width / bins_w) + scale * width * moves[first][cell]
    top = y1 + py * (height / bins_h) + scale * height * moves[first + 1][cell]
    return np.stack((left, top, left + width / bins_w, top + height / bins_h), axis=-1)


def dilation_map(ax: Axes, offset: Any, kernel_size: Any = 3, dilation: Any = 1, *, group: int = 0) -> Axes:
    """Draw the effective dilation (colour) of each output position of one image, offset (2*offset_groups*K, h, w).

    Examples
    --------
    >>> import numpy as np
    >>> float(dilation_map(panels()[0, 0], np.zeros((18, 5, 6)), dilation=2).images[0].get_array().max())
    2.0
    """
    groups = effective_dilation(np.asarray(offset)[None], kernel_size, dilation)[0]
    values = groups[_one_of("dilation_map", "group", group, len(groups))]
    drawn = ax.imshow(values, cmap="viridis")
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
    ax.set(xticks=[], yticks=[])
    return ax


def dilation_curve(ax: Axes, scales: Any, dilation: Mapping[str, Any]) -> Axes:
    """Draw effective dilation against object scale: name -> (runs, scales) or (scales,); line the mean, band the range.

    Examples
    --------
    >>> dilation_curve(panels()[0, 0], [1, 2], {"layer 1": [[2, 3], [3, 4]]}).get_xlabel()
    'object scale'
    """
    _curves(ax, np.asarray(scales), dilation, marker="o")
    ax.set(xlabel="object scale", ylabel="effective dilation (pixels of the layer's input)", xticks=scales)
    return ax


def learning_curves(ax: Axes, curves: Mapping[str, Any], label: str = "test accuracy") -> Axes:
    """Draw values by epoch: name -> (runs, epochs) or (epochs,); line the mean, band the range.

    Examples
    --------
    >>> learning_curves(panels()[0, 0], {"plain": [0.5, 0.75]}).get_ylabel()
    'test accuracy'
    """
    epochs = max(np.atleast_2d(values).shape[1] for values in curves.values())
    _curves(ax, np.arange(1, epochs + 1), curves)
    ax.set(xlabel="epoch", ylabel=label)
    return ax


def show(ax: Axes, image: Any) -> Axes:
    """Draw an image (H, W) or (H, W, 3) without axis marks.

    Examples
    --------
    >>> import numpy as np
    >>> len(show(panels()[0, 0], np.zeros((4, 5))).images)
    1
    """
    ax.imshow(image, cmap="gray", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    return ax


def _extent(edges: Any) -> Any:
    """[left, top, right, bottom] of all of (n, 4) of them."""
    return np.concatenate((edges[:, :2].min(axis=0), edges[:, 2:].max(axis=0)))


def _curves(ax: Axes, x: Any, curves: Mapping[str, Any], **options: Any) -> None:
    for name, values in curves.items():
        runs = np.atleast_2d(np.asarray(values, np.float64))
        (line,) = ax.plot(x[: runs.shape[1]], runs.mean(axis=0), label=name, **options)
        if len(runs) > 1:
            band = (runs.min(axis=0), runs.max(axis=0))
            ax.fill_between(x[: runs.shape[1]], *band, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
