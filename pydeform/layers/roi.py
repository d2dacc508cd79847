"""RoI pooling as layers. The deformable ones pool twice: what the first pass sees decides where the second one looks.

They take boxes beside the input, `y, backprop = layer(x, boxes)`, so a `Sequential` cannot hold them.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from pydeform import _arrays, _checks
from pydeform.layers import _layer
from pydeform.layers.activation import ReLU, sigmoid
from pydeform.layers.conv2d import Conv2d
from pydeform.layers.linear import Linear
from pydeform.layers.sequential import Sequential
from pydeform.ops.deform_psroi_pool import deform_psroi_pool, deform_psroi_pool_backward
from pydeform.ops.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward
from pydeform.ops.roi_align import MODES, roi_align, roi_align_backward


class RoIAlign(_layer.Layer):
    """Mean, or maximum, of points in each bin of each box (Mask R-CNN).

    Parameters
    ----------
    output_size, spatial_scale, sampling_ratio, aligned, mode : as in `pydeform.roi_align`

    Methods
    -------
    __call__(x, boxes, *, train=True)
        x (N, C, H, W), boxes (R, 5) -> y (R, C, output_h, output_w); backprop returns the gradient of x.

    References
    ----------
    arXiv:1703.06870 section 3.

    Examples
    --------
    >>> import numpy as np
    >>> x, boxes = np.ones((2, 3, 9, 8)), np.array([[0, 1, 1, 6, 6.0], [1, 0, 2, 5, 8]])
    >>> y, backprop = RoIAlign((3, 2), aligned=True)(x, boxes)
    >>> y.shape, backprop(y).shape
    ((2, 3, 3, 2), (2, 3, 9, 8))
    """

    def __init__(
        self,
        output_size: Any,
        spatial_scale: float = 1.0,
        sampling_ratio: int = -1,
        aligned: bool = False,
        *,
        mode: str = "avg",
    ) -> None:
        self.options: dict[str, Any] = {
            "output_size": _layer.pair(self, "output_size", output_size),
            "spatial_scale": _checks.number(self.name, "spatial_scale", spatial_scale, positive=True),
            "sampling_ratio": _sampling(self, sampling_ratio),
            "aligned": _layer.flag(self, "aligned", aligned),
            "mode": mode,
        }
        _checks.check_choice(self.name, "mode", mode, MODES)
        super().__init__(settings=self.options)

    def __call__(self, x: Any, boxes: Any, *, train: bool = True) -> tuple[Any, _layer.Backprop]:  # type: ignore[override]
        _layer.check_input(self, x, ("N", "C", "H", "W"))
        _arrays.namespace(self.name, "boxes", boxes)
        y = roi_align(x, boxes, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            return roi_align_backward(grad_y, x, boxes, **self.options).input

        return y, backprop


class DeformRoIPool(_layer.Layer):
    """Deformable RoI pooling whose offsets (and mask) fully connected layers compute from a first pass without any.

        pooled = deform_roi_pool(x, boxes)                          first pass
        offset = linear(relu(linear(relu(linear(pooled)))))         the last layer starts at zero
        mask = sigmoid(linear(relu(linear(pooled))))                when modulated; starts at 1/2
        y = mask * deform_roi_pool(x, boxes, offset)                second pass

    At first it is the plain pooling (times 1/2 when modulated). The gradient of x is the sum of both passes. This is
    mmcv's DeformRoIPoolPack and ModulatedDeformRoIPoolPack; their `offset_fc` and `mask_fc` are "offset" and "mask"
    here, with the same numbers and shapes, so their weights fit.

    Parameters
    ----------
    output_size, spatial_scale, sampling_ratio, gamma : as in `pydeform.deform_roi_pool`
    in_channels : of x; the branches have in_channels * output_h * output_w inputs
    hidden : outputs of each hidden layer of the branches
    modulated : with a mask (version 2)
    rng : numpy.random.Generator or seed of the hidden layers, as in `Linear` (the paper: normal(0, 0.01))
    dtype : of the parameters, and of the arrays it takes

    Attributes
    ----------
    params : dict of arrays
        "offset.0.weight", "offset.0.bias", the same of "offset.2" and "offset.4", and of "mask.0" and "mask.2". The
        second paper trains them at the learning rate of the rest, the first paper its own branch (see
        `DeformPSRoIPool`) at 0.01 times: `lr_mult={"*offset.*": 0.01}`.

    Methods
    -------
    __call__(x, boxes, *, train=True)
        x (N, in_channels, H, W), boxes (R, 5) -> y (R, in_channels, output_h, output_w); backprop returns the gradient
        of x.

    References
    ----------
    arXiv:1703.06211 section 2.2; arXiv:1811.11168 eq. 2 and section 4.1.

    Examples
    --------
    >>> import numpy as np
    >>> layer = DeformRoIPool(3, in_channels=4, hidden=16, modulated=True, rng=0)
    >>> y, backprop = layer(np.ones((1, 4, 9, 8), np.float32), np.array([[0, 1, 1, 6, 7]], np.float32))
    >>> y.shape, backprop(y).shape, layer.params["offset.4.weight"].shape, float(y[0, 0, 1, 1])
    ((1, 4, 3, 3), (1, 4, 9, 8), (18, 16), 0.5)
    """

    def __init__(
        self,
        output_size: Any,
        in_channels: int,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        hidden: int = 1024,
        modulated: bool = False,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        inputs, hidden = _layer.positive(self, in_channels=in_channels, hidden=hidden)
        dtype, rng = _layer.float_dtype(self, dtype), _layer.generator(self, rng)
        self.in_channels, self.modulated = inputs, _layer.flag(self, "modulated", modulated)
        self.output_size = _layer.pair(self, "output_size", output_size)
        self.options: dict[str, Any] = {
            "output_size": self.output_size,
            "spatial_scale": _checks.number(self.name, "spatial_scale", spatial_scale, positive=True),
            "sampling_ratio": _sampling(self, sampling_ratio),
            "gamma": _checks.number(self.name, "gamma", gamma),
        }
        sizes = {"in_channels": inputs, "hidden": hidden, "modulated": self.modulated, "dtype": dtype}
        super().__init__(settings={**self.options, **sizes})
        bins = self.output_size[0] * self.output_size[1]
        self.offset = _fully_connected((inputs * bins, hidden, hidden, 2 * bins), rng, dtype)
        _layer.hold(self, "offset", self.offset)
        if self.modulated:
            self.mask = _fully_connected((inputs * bins, hidden, bins), rng, dtype)
            _layer.hold(self, "mask", self.mask)

    def offset_and_mask(self, x: Any, boxes: Any) -> tuple[Any, Any]:
        """What the branches compute: (offset, mask or None), as `pydeform.deform_roi_pool` takes them."""
        return self._first_pass(x, boxes, train=False)[:2]

    def __call__(self, x: Any, boxes: Any, *, train: bool = True) -> tuple[Any, _layer.Backprop]:  # type: ignore[override]
        offset, mask, back_first = self._first_pass(x, boxes, train)
        y = deform_roi_pool(x, boxes, offset, mask=mask, **self.options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = deform_roi_pool_backward(grad_y, x, boxes, offset, mask=mask, **self.options)
            return _sum(grads.input, back_first(grads.offset, grads.mask))

        return y, backprop

    def _first_pass(self, x: Any, boxes: Any, train: bool) -> tuple[Any, Any, Any]:
        """(offset, mask or None, function from their gradients to that of x)."""
        param = next(iter(self.params.values()))
        xp = _layer.check_input(self, x, ("N", "in_channels", "H", "W"), {"in_channels": self.in_channels}, param)
        _arrays.namespace(self.name, "boxes", boxes)
        pooled = deform_roi_pool(x, boxes, **self.options)
        count, shape = len(pooled), pooled.shape
        features = _rows(pooled)
        offset, back_offset = self.offset(features, train)
        offset = offset.reshape(count, 2, *self.output_size)
        mask = None
        if self.modulated:
            logit, back_logit = self.mask(features, train)
            mask = _arrays.rounded(sigmoid(xp, logit), x.dtype).reshape(count, 1, *self.output_size)

        def backprop(grad_offset: Any, grad_mask: Any) -> Any:
            grad = back_offset(_rows(grad_offset))
            if mask is not None:
                grad = _sum(grad, back_logit(_rows(_grad_logit(mask, grad_mask))))
            return deform_roi_pool_backward(grad.reshape(shape), x, boxes, **self.options, needs=("input",)).input

        return offset, mask, backprop


class DeformPSRoIPool(_layer.Layer):
    """Position-sensitive deformable RoI pooling with the branch that computes its offsets (and mask).

        fully connected branch       trans = linear(deform_psroi_pool(x, boxes))
        convolutional branch         trans = deform_psroi_pool(conv(features), boxes)          conv is 1x1
        then                         y = deform_psroi_pool(x, boxes, trans)

    What is linear or conv here starts at zero, so at first it is the plain pooling. When modulated the branch has one
    channel more, the last; its sigmoid is the mask that multiplies y, and starts at 1/2. The gradient of x, or that of
    features, is summed over both passes. The systems it has been made for:

        first paper's Faster R-CNN   DeformPSRoIPool(256, spatial_scale=1 / 16); lr_mult 0.01
        first paper's R-FCN          DeformPSRoIPool(classes, group_size=7, classes=classes, feature_channels=1024,
                                     spatial_scale=1 / 16) of score maps; lr_mult 1
        second paper's DCNPooling    DeformPSRoIPool(256, hidden=1024, modulated=True, spatial_scale=1 / 16); lr_mult 1

    Parameters
    ----------
    output_dim, pooled_size, group_size, part_size : as in `pydeform.deform_psroi_pool`
    sample_per_part, trans_std, spatial_scale : as in `pydeform.deform_psroi_pool`
    classes : groups of output channels that move independently
    hidden : None: the fully connected branch is one layer; else it is three, the first two with so many outputs and
        a ReLU
    feature_channels : None: the fully connected branch; else the convolutional one, and the channels of `features`
    modulated : with a mask (version 2); part_size is then pooled_size
    rng : numpy.random.Generator or seed of the hidden layers, as in `Linear`
    dtype : of the parameters, and of the arrays it takes

    Attributes
    ----------
    params : dict of arrays
        "offset.weight", "offset.bias", or with hidden those of "offset.0", "offset.2" and "offset.4". Rows of linear
        are (channel*part_size + ty)*part_size + tx, of conv (channel*group_size + gy)*group_size + gx; channel 2*class
        moves x, 2*class + 1 y. `lr_mult={"*offset.*": 0.01}` is the Faster R-CNN's.

    Methods
    -------
    __call__(x, boxes, features=None, *, train=True)
        x (N, output_dim*group_size**2, H, W), boxes (R, 5) -> y (R, output_dim, pooled_size, pooled_size); backprop
        returns the gradient of x. With feature_channels: layer(x, boxes, features), features (N, feature_channels, H,
        W) is usually what x was computed from; backprop returns (grad_x, grad_features).

    References
    ----------
    arXiv:1703.06211 section 2.2; arXiv:1811.11168 eq. 2. Layout as in the authors' code for both papers.

    Examples
    --------
    >>> import numpy as np
    >>> scores, features = np.ones((1, 2 * 9, 8, 8), np.float32), np.ones((1, 5, 8, 8), np.float32)
    >>> layer = DeformPSRoIPool(2, 3, group_size=3, classes=2, feature_channels=5)
    >>> y, backprop = layer(scores, np.array([[0, 1, 1, 6, 7]], np.float32), features)
    >>> y.shape, [grad.shape for grad in backprop(y)], layer.params["offset.weight"].shape
    ((1, 2, 3, 3), [(1, 18, 8, 8), (1, 5, 8, 8)], (36, 5, 1, 1))
    """

    def __init__(
        self,
        output_dim: int,
        pooled_size: int = 7,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
        spatial_scale: float = 1.0,
        *,
        classes: int = 1,
        hidden: int | None = None,
        feature_channels: int | None = None,
        modulated: bool = False,
        rng: _layer.Seed = None,
        dtype: Any = np.float32,
    ) -> None:
        part = pooled_size if part_size is None else part_size
        sizes = {"output_dim": output_dim, "pooled_size": pooled_size, "group_size": group_size, "part_size": part}
        output_dim, pooled_size, group_size, part, sample_per_part, classes = _layer.positive(
            self, **sizes, sample_per_part=sample_per_part, classes=classes
        )
        if output_dim % classes:
            raise ValueError(f"{self.name}: output_dim must be a multiple of classes = {classes}, got {output_dim}")
        self.modulated = _layer.flag(self, "modulated", modulated)
        if self.modulated and part != pooled_size:
            raise ValueError(f"{self.name}: part_size must be pooled_size = {pooled_size} when modulated, got {part}")
        if feature_channels is not None and hidden is not None:
            raise ValueError(f"{self.name}: hidden must be None with feature_channels, got {hidden}")
        self.in_channels, self.classes, self.part_size = output_dim * group_size**2, classes, part
        self.trans_std = _checks.number(self.name, "trans_std", trans_std)
        common = {
            "group_size": group_size,
            "sample_per_part": sample_per_part,
            "spatial_scale": _checks.number(self.name, "spatial_scale", spatial_scale, positive=True),
        }
        self.options: dict[str, Any] = {"output_dim": output_dim, "pooled_size": pooled_size, **common}
        dtype, rng = _layer.float_dtype(self, dtype), _layer.generator(self, rng)
        branch = {"classes": classes, "hidden": hidden, "feature_channels": feature_channels}
        settings = {**self.options, "part_size": part_size, "trans_std": self.trans_std, **branch}
        super().__init__(settings={**settings, "modulated": self.modulated, "dtype": dtype})
        self.branch_channels = 2 * classes + (1 if self.modulated else 0)
        self.feature_channels: int | None = None
        self.offset: _layer.Layer
        if feature_channels is None:
            self.first = self.options
            outputs = self.branch_channels * part**2
            wide = () if hidden is None else 2 * _layer.positive(self, hidden=hidden)
            self.offset = _fully_connected((output_dim * pooled_size**2, *wide, outputs), rng, dtype)
        else:
            (self.feature_channels,) = _layer.positive(self, feature_channels=feature_channels)
            self.first = {"output_dim": self.branch_channels, "pooled_size": part, **common}
            self.offset = Conv2d(self.feature_channels, self.branch_channels * group_size**2, 1, dtype=dtype)
            self.offset.params["weight"][...] = 0
        _layer.hold(self, "offset", self.offset)

    def trans_and_mask(self, x: Any, boxes: Any, features: Any = None) -> tuple[Any, Any]:
        """What the branch computes: (trans, mask or None), as `pydeform.deform_psroi_pool` takes them."""
        return self._first_pass(x, boxes, features, train=False)[:2]

    def __call__(  # type: ignore[override]
        self, x: Any, boxes: Any, features: Any = None, *, train: bool = True
    ) -> tuple[Any, _layer.Backprop]:
        trans, mask, back_first = self._first_pass(x, boxes, features, train)
        options = {**self.options, "part_size": self.part_size, "trans_std": self.trans_std}
        y = deform_psroi_pool(x, boxes, trans, mask=mask, **options)
        if not train:
            return y, _layer.nothing_kept(self)
        like = _layer.like(self, y)

        def backprop(grad_y: Any) -> Any:
            _layer.check_grad(self, grad_y, like)
            grads = deform_psroi_pool_backward(grad_y, x, boxes, trans, mask=mask, **options)
            grad_first = back_first(grads.trans, grads.mask)
            return _sum(grads.input, grad_first) if self.feature_channels is None else (grads.input, grad_first)

        return y, backprop

    def _first_pass(self, x: Any, boxes: Any, features: Any, train: bool) -> tuple[Any, Any, Any]:
        """(trans, mask or None, function from their gradients to that of x or features)."""
        xp = self._check(x, features)
        _arrays.namespace(self.name, "boxes", boxes)
        run = self._linear if self.feature_channels is None else self._convolution
        branch, back_branch = run(x if self.feature_channels is None else features, boxes, train)
        trans = branch[:, : 2 * self.classes]
        mask = None
        if self.modulated:
            mask = _arrays.rounded(sigmoid(xp, branch[:, 2 * self.classes :]), x.dtype)

        def backprop(grad_trans: Any, grad_mask: Any) -> Any:
            if mask is None:
                return back_branch(grad_trans)
            return back_branch(xp.concatenate((grad_trans, _grad_logit(mask, grad_mask)), axis=1))

        return trans, mask, backprop

    def _check(self, x: Any, features: Any) -> ModuleType:
        channels = "output_dim*group_size**2"
        param = next(iter(self.params.values()))
        xp = _layer.check_input(self, x, ("N", channels, "H", "W"), {channels: self.in_channels}, param)
        if self.feature_channels is None:
            if features is not None:
                raise TypeError(f"{self.name}: features must be None without feature_channels, got an argument")
            return xp
        if features is None:
            raise TypeError(f"{self.name}: features must be an array with feature_channels, got None")
        _arrays.check_like(self.name, "features", features, "x", _arrays.like(self.name, "x", x))
        expected = (x.shape[0], self.feature_channels, *x.shape[2:])
        _checks.check_shape(self.name, "features", features.shape, "(N, feature_channels, H, W)", expected)
        return xp

    def _linear(self, x: Any, boxes: Any, train: bool) -> tuple[Any, _layer.Backprop]:
        pooled = deform_psroi_pool(x, boxes, **self.first)
        count, shape = len(pooled), pooled.shape
        branch, back_linear = self.offset(_rows(pooled), train)

        def backprop(grad: Any) -> Any:
            grad = back_linear(_rows(grad)).reshape(shape)
            return deform_psroi_pool_backward(grad, x, boxes, **self.first, needs=("input",)).input

        return branch.reshape(count, self.branch_channels, self.part_size, self.part_size), backprop

    def _convolution(self, features: Any, boxes: Any, train: bool) -> tuple[Any, _layer.Backprop]:
        maps, back_maps = self.offset(features, train)

        def backprop(grad: Any) -> Any:
            return back_maps(deform_psroi_pool_backward(grad, maps, boxes, **self.first, needs=("input",)).input)

        return deform_psroi_pool(maps, boxes, **self.first), backprop


def _rows(array: Any) -> Any:
    """(R, ...) -> (R, product of the rest), also for R = 0."""
    return array.reshape(len(array), int(np.prod(array.shape[1:])))


def _fully_connected(sizes: tuple[int, ...], rng: _layer.Seed, dtype: Any) -> _layer.Layer:
    """Linear layers from each size to the next, ReLU between them; the last one starts at zero."""
    rng = np.random.default_rng(rng)
    chain: list[_layer.Layer] = []
    for inputs, outputs in pairwise(sizes):
        chain += [Linear(inputs, outputs, rng=rng, dtype=dtype), ReLU()]
    last = chain[-2]
    last.params["weight"][...] = 0
    return last if len(sizes) == 2 else Sequential(*chain[:-1])


def _sum(a: Any, b: Any) -> Any:
    return _arrays.rounded(_arrays.wide(a) + _arrays.wide(b), a.dtype)


def _grad_logit(mask: Any, grad_mask: Any) -> Any:
    """mask = sigmoid."""
    wide = _arrays.wide(mask)
    return _arrays.rounded(_arrays.wide(grad_mask) * (wide * (1 - wide)), mask.dtype)


def _sampling(layer: _layer.Layer, value: Any) -> int:
    return _checks.per_axis(layer.name, "sampling_ratio", value, 1, -1)[0]
