"""A `Network`: a sequence of layers, checked to have a centred Gaussian infinite-width limit, and the shapes of its images.

The covariance S and the tangent kernel T travel through the layers by the rules of MATH.md §1; the numbers are computed in
`kernels/` and `features/`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ntkdask.errors import InputError
from ntkdask.networks.brief import Brief
from ntkdask.networks.layers import Activation, AvgPool, Conv, Dense, Flatten, GlobalAvgPool, Layer, LayerNorm, Residual
from ntkdask.registry import LATER, register

LAYERS = typing.get_args(Layer)
WEIGHTS = (Dense, Conv)
READOUTS = (Flatten, GlobalAvgPool)
ON_IMAGES = (Conv, AvgPool, *READOUTS)
LAYOUTS = (None, "nhwc")


@register("network")
@dataclass(frozen=True, repr=False)
class Network(Brief):
    """A sequence of layers; its NNGP kernel is S and its NTK is T after the last one.

    Parameters
    ----------
    layers : sequence of layers
        At least one.
    scale_inputs : bool
        Inputs enter as S = ⟨x, z⟩, or ⟨x, z⟩/d with `scale_inputs` (the convention of neural-tangents). Images enter per pixel as
        ⟨x_p, z_p'⟩, or that over the number of channels; every network with a Conv, a pooling or a Flatten takes images.
    layout : {"nhwc"} or None
        "nhwc" says that images are (n, H, W, C) whatever their sides. None refuses images of 1, 3 or 4 rows that look like channels
        first.

    Raises
    ------
    InputError
        Naming the layer, for sequences whose infinite-width limit is not a centred Gaussian or which take images but do not make
        vectors of them.

    Notes
    -----
    The limit is Gaussian (MATH.md §1) where an Activation has a Dense or Conv before it, with at most AvgPool, LayerNorm
    or a Residual of such in between; a LayerNorm stands right after Dense or Conv; in a Residual at most one path ends otherwise
    than in Dense or Conv; and an empty shortcut has a Dense or Conv earlier. Images become vectors by one GlobalAvgPool or Flatten,
    before any Dense.
    """

    layers: tuple[Layer, ...] = field(default=())
    scale_inputs: bool = False
    layout: str | None = field(default=None, metadata=LATER)

    if typing.TYPE_CHECKING:  # any iterable of layers is taken, and a tuple is kept

        def __init__(
            self, layers: Iterable[Layer] = (), scale_inputs: bool = False, layout: str | None = None
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Iterable):
            raise InputError(f"Network: layers is {self.layers!r}, expected a sequence of layers.")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise InputError("Network: there are no layers. Give at least one Dense.")
        if self.layout not in LAYOUTS:
            raise InputError(
                f"Network: layout is {self.layout!r}, expected 'nhwc' or None. Images are channels last: give x.transpose(0, 2, 3, 1)."
            )
        _require_gaussian(self.layers)
        _require_readout(self.layers)

    @property
    def depth(self) -> int:
        """Number of hidden activations."""
        return sum(isinstance(layer, Activation) for layer in every_layer(self.layers))

    @property
    def takes_images(self) -> bool:
        """Whether rows are images (H, W, C); otherwise they are vectors, and rows of any shape are flattened."""
        return any(isinstance(layer, ON_IMAGES) for layer in every_layer(self.layers))

    @property
    def readout_position(self) -> int:
        """Position of the layer that makes vectors of images; −1 for a network of vectors."""
        return next((i for i, layer in enumerate(self.layers) if isinstance(layer, READOUTS)), -1)

    def image_shapes(self, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """(H, W) before every layer up to and including the readout; InputError, naming the layer, where one does not fit."""
        return tuple(_shapes(self.layers[: self.readout_position], shape, ""))


def every_layer(layers: Iterable[Layer]) -> Iterator[Layer]:
    """All layers in order; the layers of residual paths follow their Residual."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from every_layer((*layer.branch, *layer.shortcut))


def output_shape(layers: Iterable[Layer], shape: tuple[int, int], where: str = "") -> tuple[int, int]:
    """(H, W) after the layers; InputError, naming the layer, where one does not fit. where: prefix of the layers' positions."""
    return _shapes(tuple(layers), shape, where)[-1]


def _shapes(layers: tuple[Layer, ...], shape: tuple[int, int], where: str) -> list[tuple[int, int]]:
    """(H, W) before the layers and after each of them; arguments and errors as of `output_shape`."""
    shapes = [shape]
    for position, layer in enumerate(layers):
        name = f"layer {where}{position}"
        if isinstance(layer, (Conv, AvgPool)):
            try:
                shape = layer.output_shape(shape)
            except InputError as error:
                raise InputError(f"Network: {name}: {error}") from None
        elif isinstance(layer, Residual):
            branch = output_shape(layer.branch, shape, f"{where}{position}.branch.")
            shortcut = output_shape(layer.shortcut, shape, f"{where}{position}.shortcut.")
            if branch != shortcut:
                raise InputError(
                    f"Network: {name}: the branch of the Residual gives images of {branch[0]}×{branch[1]}, its shortcut "
                    f"{shortcut[0]}×{shortcut[1]}. Give both the same strides, or a 1×1 Conv with the stride as shortcut."
                )
            shape = branch
        shapes.append(shape)
    return shapes


@dataclass(frozen=True)
class _State:
    """What the layers so far leave behind.

    Parameters
    ----------
    gaussian : bool
        An Activation may follow.
    direct : bool
        The last layer is a Dense or Conv.
    fresh : bool
        The last layer is a Dense or Conv of this residual path, so that other paths do not share its output.
    seen : bool
        There was a Dense or Conv.
    """

    gaussian: bool = False
    direct: bool = False
    fresh: bool = False
    seen: bool = False


def _require_gaussian(layers: tuple[Layer, ...], state: _State | None = None, where: str = "") -> _State:
    """The state after the layers; InputError for the first layer that breaks the rules. where: prefix of the layers' positions."""
    state = state or _State()
    for position, layer in enumerate(layers):
        name = f"layer {where}{position}"
        if isinstance(layer, WEIGHTS):
            state = _State(True, True, True, True)
        elif isinstance(layer, Activation):
            if not state.gaussian:
                raise InputError(
                    f"Network: {name} ({layer.sigma.name or layer.sigma}) is an Activation without a Dense or Conv before it; its "
                    "input is not Gaussian. Put one in between."
                )
            state = _State(False, False, False, state.seen)
        elif isinstance(layer, LayerNorm):
            if not state.direct:
                raise InputError(f"Network: {name} is a LayerNorm that does not stand right after a Dense or Conv.")
            state = _State(True, False, False, True)
        elif isinstance(layer, AvgPool):
            state = _State(state.gaussian, False, False, state.seen)
        elif isinstance(layer, READOUTS):
            state = _State(False, False, False, state.seen)
        elif isinstance(layer, Residual):
            state = _after_residual(layer, state, where, position)
        else:
            kinds = ", ".join(kind.__name__ for kind in LAYERS[:-1])
            raise InputError(f"Network: {name} is {layer!r}, expected {kinds} or {LAYERS[-1].__name__}.")
    return state


def _after_residual(layer: Residual, state: _State, where: str, position: int) -> _State:
    """The state after a Residual at a position; errors as of `_require_gaussian`."""
    name = f"layer {where}{position}"
    start = replace(state, fresh=False)
    branch = _require_gaussian(layer.branch, start, f"{where}{position}.branch.")
    if not layer.shortcut and not state.seen:
        raise InputError(
            f"Network: {name} is a Residual whose identity shortcut adds the input itself, which is not random. Put a Dense or Conv "
            "before it, or one into the shortcut."
        )
    shortcut = _require_gaussian(layer.shortcut, start, f"{where}{position}.shortcut.")
    if not (branch.fresh or shortcut.fresh):
        raise InputError(
            f"Network: {name} is a Residual of which neither path ends in a Dense or Conv: the two are not independent, and the "
            "kernel of their sum is not the sum of their kernels. End the branch in a Dense or Conv."
        )
    fresh = branch.fresh and (shortcut.fresh if layer.shortcut else state.fresh)
    return _State(branch.gaussian and shortcut.gaussian, False, fresh, True)


def _require_readout(layers: tuple[Layer, ...]) -> None:
    """InputError unless images, if any, become vectors once, outside residual paths, and each layer gets the rows that it takes."""
    for layer in layers:
        if isinstance(layer, Residual) and any(isinstance(inner, READOUTS) for inner in every_layer([layer])):
            raise InputError(
                "Network: GlobalAvgPool or Flatten within a Residual. Put it after the sum, where it gives the same kernel."
            )
    if not any(isinstance(layer, ON_IMAGES) for layer in every_layer(layers)):
        return
    readout = next((i for i, layer in enumerate(layers) if isinstance(layer, READOUTS)), len(layers))
    for position, layer in enumerate(layers):
        kinds = [type(inner) for inner in every_layer([layer])]
        if position < readout and Dense in kinds:
            raise InputError(
                f"Network: layer {position} has a Dense where pixels are still apart. Put GlobalAvgPool() or Flatten() before it; a "
                "Conv(1) is a Dense for each pixel."
            )
        if position > readout and any(kind in ON_IMAGES for kind in kinds):
            raise InputError(
                f"Network: layer {position} ({kinds[0].__name__}) takes images, but layer {readout} "
                f"({type(layers[readout]).__name__}) has made them vectors."
            )
    if readout == len(layers):
        raise InputError(
            f"Network: after its last layer, {type(layers[-1]).__name__}, pixels are still apart. End with GlobalAvgPool() or "
            "Flatten(), and Dense()."
        )
