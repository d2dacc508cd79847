"""The pictures of the demo. Needs Matplotlib, which only `pydeform.viz` imports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydeform import viz
from pydeform.demo import data, networks, training
from pydeform.layers import Sequential

COLORS = {"plain": "#4c78a8", "deformable v1": "#e4572e", "modulated v2": "#f2a541"}
LAYER_COLORS = ("#7a5195", "#2a9d8f")
DEFORMABLE = "deformable v1"
SHOWN = 2  # the digit in the pictures
Runs = Mapping[str, Sequence[training.Run]]


def write_all(runs: Runs, dilation: Mapping[str, Any], digits: data.Digits, folder: Path) -> list[Path]:
    """Every picture of a demo run; dilation: kind -> (runs, layers, scales). Returns the files written."""
    network = runs[DEFORMABLE][0].network
    pictures = {
        "digits": _summary(runs, dilation, digits),
        "sampling_points": _sampling_points(runs, digits),
        "offset_field": _offset_field(network, digits),
        "effective_dilation": _effective_dilation(dilation),
        "learning_curves": _learning_curves(runs),
    }
    paths = []
    for name, axes in pictures.items():
        paths.append(folder / f"{name}.png")
        axes.flat[0].figure.savefig(paths[-1], dpi=110)
    return paths


def levels(network: Sequential, image: Any) -> list[viz.Level]:
    """The deformable layers of a network over one image (H, W), as `viz.sampling_points` takes them."""
    found = networks.offsets(network, image[None, None])
    return [
        viz.Level(offset[0], stride=site.conv_stride, padding=1)
        for offset, site in zip(found, networks.SITES, strict=True)
    ]


def regular(chain: Sequence[viz.Level]) -> list[viz.Level]:
    """The same layers with offsets of zero: what the plain network samples."""
    return [level._replace(offset=np.zeros_like(level.offset)) for level in chain]


def _examples(digits: data.Digits, scales: Sequence[float], which: int = 0) -> Any:
    """One test digit upright in the middle, once for each scale: (scales, H, W)."""
    quiet = {"rotation": 0.0, "shear": 0.0, "shift": 0.0}
    one = digits.test_x[digits.test_y == SHOWN][which : which + 1]
    return np.stack([data.place(one, np.random.default_rng(0), (s, s), **quiet).image[0, 0] for s in scales])


def _draw_points(ax: Any, image: Any, chain: Sequence[viz.Level], color: Any, size: float = 12) -> None:
    """Points of the output position at the middle of the image."""
    position = tuple(length // 2 for length in chain[-1].offset.shape[1:])
    viz.sampling_points(ax, image, chain, position, pixel_stride=networks.SITES[0].input_stride, color=color, size=size)
    margin = 3.5
    ax.set(xlim=(-0.5 - margin, data.SIZE - 0.5 + margin), ylim=(data.SIZE - 0.5 + margin, -0.5 - margin))
    ax.set_facecolor("black")


def _sampling_points(runs: Runs, digits: data.Digits) -> Any:
    scales = (1.0, 2.0, 3.0)
    axes = viz.panels(3, len(scales), (2.9, 3.0))
    for column, (scale, image) in enumerate(zip(scales, _examples(digits, scales), strict=True)):
        chain = levels(runs[DEFORMABLE][0].network, image)
        modulated = levels(runs["modulated v2"][0].network, image)
        for row, (kind, points) in enumerate(zip(networks.WIDTHS, (regular(chain), chain, modulated), strict=True)):
            _draw_points(axes[row, column], image, points, COLORS[kind])
            axes[row, column].set_title(f"{kind}, scale {scale:g}", fontsize=10)
    axes.flat[0].figure.suptitle("the 81 points that one output position samples through two 3x3 layers")
    return axes


def _offset_field(network: Sequential, digits: data.Digits) -> Any:
    (image,) = _examples(digits, (2.5,))
    site = networks.SITES[0]
    offset = levels(network, image)[0].offset
    axes = viz.panels(3, 3, (2.6, 2.7))
    for tap, ax in enumerate(axes.flat):
        viz.offset_field(ax, offset, tap, image=image, pixel_stride=site.input_stride, stride=site.conv_stride)
        ax.set_title(f"tap ({tap // 3 - 1:+d}, {tap % 3 - 1:+d})", fontsize=9)
    axes.flat[0].figure.suptitle("offsets of each tap of the first deformable layer")
    return axes


def _effective_dilation(dilation: Mapping[str, Any]) -> Any:
    axes = viz.panels(1, len(dilation), (4.4, 3.8), sharey=True)
    for ax, (kind, values) in zip(axes.flat, dilation.items(), strict=True):
        _dilation(ax, values)
        ax.set_title(kind)
    return axes


def _dilation(ax: Any, values: Any) -> None:
    names = ("first deformable layer", "second")
    ax.set_prop_cycle(color=LAYER_COLORS)
    viz.dilation_curve(ax, training.SCALES, {name: np.asarray(values)[:, at] for at, name in enumerate(names)})
    ax.axhline(1, color="#888888", linestyle=":")
    ax.text(training.SCALES[-1], 1.05, "plain convolution", ha="right", va="bottom", fontsize=8, color="#666666")
    ax.set(ylim=(0, 1.45 * np.max(values)), ylabel="effective dilation (pixels)")
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def _learning_curves(runs: Runs) -> Any:
    axes = viz.panels(1, 2, (4.6, 3.6))
    for ax, label, values in (
        (axes[0, 0], "training loss", {kind: [run.losses for run in found] for kind, found in runs.items()}),
        (axes[0, 1], "test accuracy (%)", {k: [100 * np.array(r.accuracies) for r in f] for k, f in runs.items()}),
    ):
        ax.set_prop_cycle(color=[COLORS[kind] for kind in runs])
        viz.learning_curves(ax, values, label)
    axes[0, 0].set_ylim(0, None)
    return axes


def _summary(runs: Runs, dilation: Mapping[str, Any], digits: data.Digits) -> Any:
    """For the README: where a filter looks, how that grows with the digit, and what it is worth."""
    scales = (1.0, 2.0, 3.0)
    axes = viz.panels(1, 5, (2.35, 2.75), width_ratios=(1, 1, 1, 1.35, 1.15))
    network = runs[DEFORMABLE][0].network
    for ax, scale, image in zip(axes[0], scales, _examples(digits, scales), strict=False):
        _draw_points(ax, image, levels(network, image), COLORS[DEFORMABLE])
        ax.set_title(f"digit at scale {scale:g}", fontsize=10)
    axes[0, 1].set_xlabel("where one output (+) looks, through two deformable layers", fontsize=10)
    _dilation(axes[0, 3], dilation[DEFORMABLE])
    axes[0, 3].set_title("filters grow with the digit", fontsize=10)
    _accuracy_bars(axes[0, 4], runs)
    return axes


def _accuracy_bars(ax: Any, runs: Runs) -> None:
    for at, (kind, found) in enumerate(runs.items()):
        each = [100 * run.accuracy for run in found]
        ax.bar(at, np.mean(each), color=COLORS[kind], width=0.7)
        ax.plot([at] * len(each), each, "o", color="black", markersize=3)
        ax.text(at, max(each) + 2, f"{np.mean(each):.1f}", ha="center", fontsize=9)
    ax.set(ylim=(0, 105), xticks=range(len(runs)))
    ax.set_xticklabels([kind.replace(" ", "\n") for kind in runs], fontsize=8)
    thousands = round(networks.parameters(runs[networks.PLAIN][0].network) / 1000)
    ax.set_title(f"test accuracy (%)\n{thousands}k parameters each", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
