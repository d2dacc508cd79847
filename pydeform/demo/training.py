"""One recipe for all networks, and what is measured on them."""

from __future__ import annotations

import sys
import time
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pydeform.demo import data, networks
from pydeform.layers import Sequential
from pydeform.losses import softmax_cross_entropy
from pydeform.ops.analysis import effective_dilation
from pydeform.optim import AdamW

BATCH = 48
LR = 0.016  # the best for the plain network of 0.004, 0.008, 0.016
OFFSET_LR = 0.1  # of LR, for the offset branches, as in the papers; at 1 the offsets run away
WEIGHT_DECAY = 0.01
SQUARE_DECAY = 0.99  # Adam's second beta: a run has only hundreds of steps
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)
COPIES = 2  # placements of each test digit


class Run(NamedTuple):
    """One network after training."""

    network: Sequential
    losses: list[float]  # training loss, mean of each epoch
    accuracies: list[float]  # after each epoch, on one placement of each test digit
    accuracy: float  # the result: after the last epoch, on the whole test set
    seconds: float  # of training, without testing


class TestSet(NamedTuple):
    image: Any
    label: Any


def test_set(digits: data.Digits) -> TestSet:
    """The test digits, placed once: the same images for every network and seed."""
    x, y = (np.concatenate([array] * COPIES) for array in (digits.test_x, digits.test_y))
    return TestSet(data.place(x, np.random.default_rng(5)).image, y)


def train(kind: str, seed: int, epochs: int, digits: data.Digits, test: TestSet) -> Run:
    """Train one network. The seed alone fixes batches and placements: all kinds see the same images."""
    network = networks.build(kind, np.random.default_rng([seed, 0]))
    stream = np.random.default_rng([seed, 1])
    lr_mult = {} if kind == networks.PLAIN else {"*.offset.*": OFFSET_LR}
    optimiser = AdamW(network, LR, (0.9, SQUARE_DECAY), weight_decay=WEIGHT_DECAY, lr_mult=lr_mult)
    count = len(digits.train_x)
    steps = max(count // BATCH, 1)
    losses, accuracies, seconds = [], [], 0.0
    once = TestSet(*(array[: len(array) // COPIES] for array in test))
    name = f"{kind}, seed {seed}"
    with tqdm(total=epochs * steps, desc=name, unit="step", leave=True, disable=None) as bar:
        for epoch in range(epochs):
            start, total = time.perf_counter(), 0.0
            order = stream.permutation(count)
            for step in range(steps):
                batch = order[step * BATCH : (step + 1) * BATCH]
                image = data.place(digits.train_x[batch], stream).image
                logits, backprop = network(image)
                loss, grad = softmax_cross_entropy(logits, digits.train_y[batch])
                network.zero_grads()
                backprop(grad)
                optimiser.step(LR * 0.5 * (1 + np.cos(np.pi * (epoch * steps + step) / (epochs * steps))))
                total += loss
                bar.update()
            seconds += time.perf_counter() - start
            losses.append(total / steps)
            accuracies.append(accuracy(network, once))
            reached = f"loss {losses[-1]:.3f}, test {100 * accuracies[-1]:.1f} %"
            bar.set_postfix_str(reached)
    if bar.disable:  # stderr is no terminal, where the bar would fill a file
        print(f"{name}: {reached}", file=sys.stderr, flush=True)
    return Run(network, losses, accuracies, accuracy(network, test), seconds)


def accuracy(network: Sequential, test: TestSet) -> float:
    right = 0
    for start in range(0, len(test.label), 256):
        part = slice(start, start + 256)
        right += int((network(test.image[part], train=False)[0].argmax(axis=1) == test.label[part]).sum())
    return right / len(test.label)


def dilation_by_scale(network: Sequential, digits: data.Digits) -> list[list[float]]:
    """Effective dilation of each deformable layer (rows) at each of SCALES (columns).

    Mean over the filters whose centre lies on the digit, in its central half: nearer to the border of the digit a
    filter sees its surroundings too. In pixels of the layer's input.
    """
    rows: list[list[float]] = [[] for _ in networks.SITES]
    for scale in SCALES:
        placed = data.place(digits.test_x[:300], np.random.default_rng(7), scales=(scale, scale), shift=0)
        for row, site, offset in zip(rows, networks.SITES, networks.offsets(network, placed.image), strict=True):
            stride = site.input_stride * site.conv_stride
            centres = placed.depth[:, ::stride, ::stride] >= 0.5
            rows_of_groups = effective_dilation(offset, 3)
            row.append(float(rows_of_groups[:, 0][centres].mean()))
    return rows
