"""Checkpoints: the parameters and buffers of a module, written to a file and read back.

safetensors is preferred. Of torch's own files only tensors are read (`weights_only=True`), so that no file can run code. A file
that does not fit the module is refused before anything changes, with the names and shapes that differ.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ntkdask.errors import DataError, InputError, StoreError
from ntkdask.files import home_expanded
from ntkdask.modules.state.shipping import unwrapped

SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store a module's state, beside that of the optimiser."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""


def save_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a module to a file, whole or not at all.

    Parameters
    ----------
    module : torch.nn.Module
        The module. Tied tensors are written once, under their first name; the file's metadata has their other names, as in
        safetensors' own `save_model`.
    path : path
        A file that ends in .safetensors.

    Raises
    ------
    InputError
        For another ending.
    StoreError
        Where the file cannot be written.
    """
    save_tensors(unwrapped(module).state_dict(), path)


def load_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Set the parameters and buffers of a module, in place, to those in a file.

    Parameters
    ----------
    module : torch.nn.Module
        The module. Values are cast to its dtypes and moved to its device; `requires_grad` stays as it is.
    path : path
        A file .safetensors, or .pt or .pth of tensors alone. The state may be under "state_dict", "model", "model_state_dict" or
        "net", and names may begin with "module." or "_orig_mod."; counters of batches may be missing.

    Raises
    ------
    DataError
        For a file that is missing, damaged or holds code.
    InputError
        For a file that does not fit the module, which is then unchanged; the message names what is missing, unexpected or of another
        shape.
    """
    module = unwrapped(module)
    state = module.state_dict()
    loaded = _fitted(load_tensors(path)[0], state)
    problems = _problems(state, loaded)
    if problems:
        raise InputError(
            f"checkpoint {os.fspath(path)} does not fit the {type(module).__name__}: {'; '.join(problems)}. Build the module with "
            "the arguments that it was trained with (width, number of outputs, channels), or give its own checkpoint."
        )
    module.load_state_dict(loaded, strict=False)


def save_tensors(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors and texts to a file .safetensors, whole or not at all; tensors of the same memory are written once."""
    final = home_expanded(path)
    if final.suffix != SUFFIXES[0]:
        raise InputError(f"cannot write {final}: weights are written as {SUFFIXES[0]}. Give the file that ending.")
    first: dict[Any, str] = {}
    kept, aliases = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is a {type(tensor).__name__}, not a tensor: only tensors can be stored.")
        original = first.setdefault(_memory(tensor) or name, name)
        if original == name:
            kept[name] = tensor.detach().to("cpu", copy=True).contiguous()
        else:
            aliases[name] = original
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        save_file(kept, temporary, {"format": "pt", **aliases, **(metadata or {})})
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StoreError(f"cannot write {final}: {error}. Check its folder and the space left there.") from error


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(named tensors on the CPU, metadata) of a file of weights; DataError where it is missing, damaged or holds code."""
    path = home_expanded(path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"cannot read weights from {path}: expected a file that ends in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"there is no file of weights {path}. Check the path.")
    try:
        return _read_safetensors(path) if path.suffix == SUFFIXES[0] else (_read_torch(path), {})
    except (
        Exception
    ) as error:  # torch's readers raise anything from KeyError to UnpicklingError on bytes they do not know
        raise DataError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}: {str(error).partition(chr(10))[0]}). It is damaged, or "
            "it holds other objects, whose loading could run code. Save the state alone, best as .safetensors: "
            "ntkdask.modules.save_weights(module, path), or torch.save(module.state_dict(), path)."
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping, has no iterator)
        metadata = file.metadata() or {}
    for alias, original in metadata.items():
        if original in tensors and alias not in tensors and alias != "format":
            tensors[alias] = tensors[original]
    return tensors, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(state, Mapping) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no mapping of names to tensors")
    return dict(state)


def _fitted(loaded: dict[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `loaded` tensors under the names of `state`: without prefixes of wrappers, and tied tensors under all of their names."""
    while loaded and (
        prefix := next((p for p in PREFIXES if _all_begin(loaded, p) and not _all_begin(state, p)), None)
    ):
        loaded = {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}
    tied: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(_memory(tensor) or name, []).append(name)
    for group in tied.values():
        value = next((loaded[name] for name in group if name in loaded), None)
        if value is not None:
            loaded = {**dict.fromkeys(group, value), **loaded}
    return loaded


def _all_begin(names: Mapping[str, Tensor], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _problems(state: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """Why loaded tensors do not fit a module's state: a phrase for each kind of difference."""
    missing = [name for name in state if name not in loaded and not name.endswith("num_batches_tracked")]
    unexpected = sorted(name for name in loaded if name not in state)
    common = [(name, loaded[name], tensor) for name, tensor in state.items() if name in loaded]
    shapes = [f"{n} is {tuple(t.shape)} there, {tuple(s.shape)} here" for n, t, s in common if t.shape != s.shape]
    kinds = [
        f"{n} is {t.dtype} there, {s.dtype} here"
        for n, t, s in common
        if t.dtype.is_floating_point != s.dtype.is_floating_point or t.dtype.is_complex != s.dtype.is_complex
    ]
    listed = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
        ("of another kind", kinds),
    )
    return [f"{kind}: {_several(names)}" for kind, names in listed if names]


def _several(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{rest}"


def _memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """A key that is equal for tensors with the same memory, dtype and shape; None for a tensor without memory."""
    if not tensor.numel() or tensor.is_meta:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
