"""A module's twin: a private copy with the same layers and detached weights, in the dtype and on the device of a computation.

All gradients are computed on twins, so that nothing about the user's module changes (no hook, flag, buffer, gradient or
`requires_grad`), whatever fails on the way, and several threads may use one module at a time. Where neither dtype nor device changes,
a twin shares the memory of the parameters. Which parameters a kernel takes gradients of is decided here, too.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ntkdask import seeds
from ntkdask.errors import InputError, nearest
from ntkdask.modules.state.shipping import unwrapped

CACHE_LINE = 64
"""Alignment, in bytes, of memory that torch allocates."""

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)
_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


def require_module(module: object, caller: str) -> nn.Module:
    """`module`, unwrapped; InputError where it is no torch.nn.Module, or in a state in which rows influence one another."""
    module = unwrapped(module)  # capture needs the layers themselves
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{caller}: module is {module!r}; give a torch.nn.Module, or a description of one such as ResNet18()."
        )
    for name, part in module.named_modules():
        kind = f"{type(part).__name__} {name!r}" if name else type(part).__name__
        if isinstance(part, torch.jit.ScriptModule) and any(True for _ in part.parameters()):
            raise InputError(
                f"{caller}: {kind} is a ScriptModule, which hides its layers and parameters from torch.func. Give the module that it "
                "was scripted or traced from."
            )
        if isinstance(part, _BATCH_NORMS) and not part.training and part.running_mean is None:
            raise InputError(
                f"{caller}: {kind} keeps no running statistics, so that rows influence one another in every mode. Build it with "
                "track_running_stats=True, or use another normalisation."
            )
        if part.training and (isinstance(part, (*_BATCH_NORMS, *_DROPOUTS)) or _drops(part)):
            raise InputError(
                f"{caller}: {kind} is in train mode, where rows influence one another or outputs are random. Call module.eval() "
                "first."
            )
    _require_real(module, caller)
    return module


def _drops(part: nn.Module) -> bool:
    """Whether a recurrent or an attention layer has dropout."""
    return isinstance(part, (nn.RNNBase, nn.MultiheadAttention)) and part.dropout > 0


def _require_real(module: nn.Module, caller: str) -> None:
    """InputError where a parameter has no numbers yet, or is not real."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"{caller}: parameter {name!r} is not initialised yet. Call the module once on rows of its shape."
            )
        if parameter.is_meta:
            raise InputError(
                f"{caller}: parameter {name!r} lies on the meta device, which holds no numbers. Build the module on a device, or load "
                "its weights with assign=True."
            )
        if not parameter.is_floating_point():
            raise InputError(
                f"{caller}: parameter {name!r} has dtype {parameter.dtype}; gradients are taken of real floating-point parameters "
                "alone. Keep other numbers as buffers."
            )


def wanted_parameters(module: nn.Module, patterns: tuple[str, ...] | None, caller: str) -> dict[str, int]:
    """{dotted name: number of scalars} of the parameters that require a gradient and match one of `patterns` (None: all).

    A parameter with several names counts once, under its first name, and matches by any of them. InputError where a pattern matches
    no parameter, and where no parameter is left.
    """
    first: dict[int, str] = {}
    names: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
        names[name] = parameter
    if not names:
        raise InputError(f"{caller}: {type(module).__name__} has no parameters, so its tangent kernel is zero.")
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise InputError(
                f"{caller}: parameters={pattern!r} matches none of {type(module).__name__}{nearest(pattern, names)}"
            )
    chosen = {
        first[id(parameter)]
        for name, parameter in names.items()
        if patterns is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    wanted = {
        name: parameter.numel()
        for name, parameter in names.items()
        if name in chosen and parameter.requires_grad and parameter.numel()
    }
    if not wanted:
        raise InputError(
            f"{caller}: none of the {len(chosen)} parameters asked for requires a gradient. Unfreeze one: "
            "parameter.requires_grad_(True)."
        )
    return wanted


def find_owners(module: nn.Module, wanted: Mapping[str, int]) -> dict[str, list[tuple[str, str]]]:
    """{wanted parameter: [(dotted name of a layer that owns it, its name in that layer), ...]}; a shared one has several owners."""
    canonical = {id(p): name for name, p in module.named_parameters() if name in wanted}
    owners: dict[str, list[tuple[str, str]]] = {name: [] for name in wanted}
    for path, part in module.named_modules():
        for parameter_name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in canonical:
                owners[canonical[id(parameter)]].append((path, parameter_name))
    return owners


@contextmanager
def perturbed(twin: nn.Module) -> Iterator[None]:
    """A context in which a twin's parameters are moved at random, by up to a tenth of their size, or by 0.1 where all are zero."""
    before = {parameter: parameter.data for parameter in twin.parameters()}
    try:
        for name, parameter in twin.named_parameters():
            size = float(parameter.norm()) / max(1, parameter.numel()) ** 0.5
            noise = torch.from_numpy(seeds.uniforms(0, ("shaken", name), parameter.numel())).to(parameter)
            parameter.data = parameter + (0.2 * noise.reshape(parameter.shape) - 0.1) * (size or 1.0)
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def make_twin(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of `module` with frozen parameters of `dtype` on `device`, the same training flags, and buffers of its own.

    InputError where the module cannot be copied.
    """

    def converted(tensor: torch.Tensor, must_copy: bool) -> torch.Tensor:
        new_dtype = dtype if tensor.is_floating_point() else tensor.dtype
        # the order of MKL's sums depends on the alignment of its operands; NumPy's memory may begin anywhere
        must_copy = must_copy or tensor.is_inference() or tensor.data_ptr() % CACHE_LINE > 0
        return tensor.detach().to(device=device, dtype=new_dtype, copy=must_copy)

    # an embedding with max_norm renormalises its weights when they are read
    writes_weights = any(getattr(part, "max_norm", None) is not None for part in module.modules())
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(converted(parameter, writes_weights), requires_grad=False)
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = converted(value, True)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # a module may hold anything: locks, generators, open files
        raise InputError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}), which keeps the module itself untouched. "
            "Give it a __deepcopy__, or keep what cannot be copied outside of it."
        ) from error
