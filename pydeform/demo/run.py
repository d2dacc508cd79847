"""The three things the demo does, from options to files and a printed report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pydeform
from pydeform.demo import data, networks, parts, photo, pictures, training
from pydeform.layers import save

EPOCHS, SEEDS = 12, 3
QUICK_TRAIN, QUICK_TEST = 96, 48  # digits


def digits(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    all_digits = data.load_digits()
    if options.quick:
        x, y, test_x, test_y = all_digits
        all_digits = data.Digits(x[:QUICK_TRAIN], y[:QUICK_TRAIN], test_x[:QUICK_TEST], test_y[:QUICK_TEST])
    epochs = options.epochs or (1 if options.quick else EPOCHS)
    seeds = range(options.seed, options.seed + (options.seeds or (1 if options.quick else SEEDS)))
    test = training.test_set(all_digits)
    runs: dict[str, list[training.Run]] = {kind: [] for kind in networks.WIDTHS}
    for seed in seeds:
        for kind, found in runs.items():
            found.append(training.train(kind, seed, epochs, all_digits, test))
    dilation = {
        kind: [training.dilation_by_scale(run.network, all_digits) for run in found]
        for kind, found in runs.items()
        if kind != networks.PLAIN
    }
    for kind, found in runs.items():
        save(found[0].network, options.output / f"{kind.replace(' ', '_')}.npz")
    result = _result(runs, dilation, epochs, seeds)
    (options.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    pictures.write_all(runs, dilation, all_digits, options.output)
    if options.quick:
        print(f"--quick: {QUICK_TRAIN} digits and {epochs} epochs show that it runs; 10 % is guessing\n")
    print(report(result))
    print(f"\n{time.perf_counter() - start:.0f} s in all; pictures, networks and result.json in {options.output}")
    return 0


def photograph(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    network, which = photo.network_for(options.output, options.seed)
    name = Path(options.image).stem if options.image else "flower"
    path = photo.draw(photo.read(options.image or None), network, options.output / f"points_on_{name}.png")
    print(f"{path}: sampling points of a network {which}")
    return 0


def roi_parts(options: argparse.Namespace) -> int:
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "roi_parts.png"
    changes = parts.draw(path)
    print(f"{path}: where gradient ascent on their offsets took the parts of a box", *changes, sep="\n  ")
    return 0


def _result(
    runs: Mapping[str, Sequence[training.Run]], dilation: Mapping[str, Any], epochs: int, seeds: Sequence[int]
) -> dict[str, Any]:
    """Everything measured, for JSON. Apart from "seconds" it is the same on every run of one machine."""
    kinds = {
        kind: {
            "parameters": networks.parameters(found[0].network),
            "accuracy": [run.accuracy for run in found],
            "seconds": [round(run.seconds, 2) for run in found],
            "training_loss_by_epoch": [run.losses for run in found],
            "test_accuracy_by_epoch": [run.accuracies for run in found],
            "effective_dilation_by_layer_and_scale": dilation.get(kind),
        }
        for kind, found in runs.items()
    }
    return {
        "pydeform": pydeform.__version__,
        "numpy": np.__version__,
        "epochs": epochs,
        "seeds": list(seeds),
        "scales": list(training.SCALES),
        "networks": kinds,
    }


def report(result: Mapping[str, Any]) -> str:
    """The tables that the demo prints."""
    kinds = result["networks"]
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in result["seeds"])
    lines = [f"{'network':15}{'parameters':>11}{'seconds':>9}   test accuracy (%){'mean':>6}{seeds}"]
    for kind, found in kinds.items():
        each = 100 * np.array(found["accuracy"])
        numbers = "".join(f"{value:9.1f}" for value in each)
        lines.append(f"{kind:15}{found['parameters']:11,}{np.mean(found['seconds']):9.1f}{each.mean():26.1f}{numbers}")
    lines += ["", "more right than the plain network, in points: mean (standard deviation) over the seeds"]
    for kind, found in kinds.items():
        if kind != networks.PLAIN:
            gain = 100 * (np.array(found["accuracy"]) - np.array(kinds[networks.PLAIN]["accuracy"]))
            spread = f" ({gain.std(ddof=1):.1f})" if len(gain) > 1 else ""
            lines.append(f"{kind:15}{gain.mean():+6.1f}{spread}")
    scales = "".join(f"{scale:7.1f}" for scale in result["scales"])
    lines += ["", f"{'effective dilation by object scale':34}{scales}", f"{'a plain 3x3 filter':34}" + "   1.00" * 5]
    for kind, found in kinds.items():
        if found["effective_dilation_by_layer_and_scale"] is not None:
            mean = np.mean(found["effective_dilation_by_layer_and_scale"], axis=0)
            for number, row in enumerate(mean, start=1):
                lines.append(f"{f'{kind}, layer {number}':34}" + "".join(f"{value:7.2f}" for value in row))
    return "\n".join(lines)
