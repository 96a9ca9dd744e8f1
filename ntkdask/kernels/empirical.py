"""Empirical tangent kernels of PyTorch modules: the pseudo-NTK and the eNTK. MATH.md §5.

The computation is in `modules.empirical` and below; this file imports no torch until a kernel is made. Rows are examples; images are
(n, H, W, C) as everywhere in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ntkdask.arrays import Array
from ntkdask.errors import InputError
from ntkdask.kernels.base import KernelBase
from ntkdask.modules.optional import require_torch
from ntkdask.registry import register

if TYPE_CHECKING:
    from ntkdask.modules.empirical import Request

PRECISIONS = (None, "float64", "tf32", "bfloat16")
OUTPUTS = ("full", "trace")


@dataclass(frozen=True)
class _EmpiricalKernel(KernelBase):
    """What the kernels of a module share; fields are those of `PseudoNTK`."""

    @property
    def passes_over_rows(self) -> bool:
        """Whether a tile takes time beside that for its entries: for the network's passes over the rows of both sides."""
        return True

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_torch(name)
        from ntkdask.modules.empirical import require_module_like
        from ntkdask.modules.tensors import require_layout

        require_module_like(self._get("module"), name)
        require_layout(self._get("input_layout"), f"{name}: input_layout")
        patterns = self._get("parameters")
        if isinstance(patterns, list):
            object.__setattr__(self, "parameters", tuple(patterns))
        elif patterns is not None and not isinstance(patterns, (str, tuple)):
            raise InputError(
                f"{name}: parameters is {patterns!r}; give a pattern such as 'layer4.*', several, or None for all."
            )
        if self._get("precision") not in PRECISIONS:
            raise InputError(
                f"{name}: precision is {self._get('precision')!r}; give None (the rows' own), 'float64', 'tf32' or 'bfloat16'."
            )
        memory = self._get("memory_bytes")
        if not isinstance(memory, int) or isinstance(memory, bool) or memory <= 0:
            raise InputError(f"{name}: memory_bytes is {memory!r}; give a positive number of bytes, such as 2**30.")

    def _get(self, field: str) -> Any:
        """A field of the subclass."""
        return getattr(self, field)

    def __sklearn_clone__(self) -> _EmpiricalKernel:
        """Itself: it is frozen, and scikit-learn's clone would copy the module's weights."""
        return self

    @property
    def _kind(self) -> str | int:
        """What is computed: "pseudo", or `EmpiricalNTK.output`."""
        return "pseudo"

    def _request(self) -> Request:
        """The computation, as `modules.empirical` takes it."""
        from ntkdask.modules.empirical import Request

        patterns = self._get("parameters")
        return Request(
            type(self).__name__,
            self._get("module"),
            self._kind,
            self._get("input_layout"),
            (patterns,) if isinstance(patterns, str) else patterns,
            self._get("precision"),
            self._get("memory_bytes"),
        )

    def __call__(self, x: Array, y: Array | None = None) -> Array:
        """The kernel of rows (n, *s), (m, *s): (n, m), or (n, m, O, O) for the full eNTK, of the rows' kind and common dtype.

        Raises
        ------
        DtypeError
            For other dtypes than float32 and float64.
        InputError
            For modules and rows that cannot be used; the message says why.
        MemoryBudgetError
            Where one row does not fit `memory_bytes`.

        Notes
        -----
        No rows give an empty matrix.
        """
        return self._request().matrix(x, y)

    def diagonal(self, x: Array) -> Array:
        """Squared norms of gradients of rows (n, *s): (n,); (n, O, O) for the full eNTK."""
        return self._request().diagonal(x)

    def workspace_bytes(self, n: int, m: int, itemsize: int, row_shape: tuple[int, ...] | None = None) -> int:
        """Bytes of the matrix and of at most about `memory_bytes` beside it; with a row's shape, as a dry run of two rows tells.

        Where there is a GPU, at least `memory_bytes` and 256 MiB beside the matrix. Not counted: the first call on rows of a new
        shape once checks captured gradients of two rows against autograd.
        """
        return self._request().workspace_bytes(n, m, itemsize, row_shape)


@register("kernel")
@dataclass(frozen=True)
class PseudoNTK(_EmpiricalKernel):
    """The pseudo-NTK of a module: Θ̂(x, y) = ⟨∇φ(x), ∇φ(y)⟩, φ = O^{−1/2}·Σ_o f_o, ∇ over the parameters that require gradients.

    Parameters
    ----------
    module : torch.nn.Module or a description of one
        In eval mode, with output (n, O). It is never changed: everything runs on a copy.
    input_layout : {"nchw"} or None
        "nchw" gives 4-d rows (n, H, W, C) to the module as (n, C, H, W); None gives rows as they are.
    parameters : str or sequence of str, optional
        A pattern (fnmatch) on dotted names, or several; None for all. Frozen parameters never count.
    precision : {"float64", "tf32", "bfloat16"}, optional
        None computes in the rows' dtype. "float64" computes float32 rows in float64. "tf32" (on a GPU alone) and "bfloat16" round the
        factors of products of float32 gradients to 10 and 7 bits, with sums in float32; forward and backward passes and gradients are
        float32 in both.
    memory_bytes : int
        About what a call may hold beside rows, matrix and module.

    Raises
    ------
    InputError
        For values out of these ranges.

    Notes
    -----
    The largest error, relative to the largest entry, on a convolutional network of 1 114 parameters: float32 1.3e-7, bfloat16 7.8e-4,
    "float64" 5.4e-8, which is the rounding of the result.

    Layers are captured in one forward and one backward pass (Linear, Conv, BatchNorm, LayerNorm, GroupNorm, InstanceNorm, RMSNorm,
    PReLU, Embedding, shared parameters); every other parameter goes through torch.func, which is slower. Two kernels are equal where
    their modules are one object, or equal descriptions.

    References
    ----------
    Mohamadi & Sutherland 2023, eq. 3; MATH.md §5.
    """

    module: Any
    input_layout: str | None = "nchw"
    parameters: str | tuple[str, ...] | None = None
    precision: str | None = None
    memory_bytes: int = 2**30


@register("kernel")
@dataclass(frozen=True)
class EmpiricalNTK(_EmpiricalKernel):
    """The empirical NTK of a module, Θ(x, y) = J(x) J(y)ᵀ ∈ R^{O×O}, J the Jacobian of its logits in its parameters.

    Parameters
    ----------
    module : torch.nn.Module or a description of one
        In eval mode, with output (n, O). It is never changed: everything runs on a copy.
    input_layout : {"nchw"} or None
        "nchw" gives 4-d rows (n, H, W, C) to the module as (n, C, H, W); None gives rows as they are.
    output : {"full", "trace"} or int
        "full" gives (n, m, O, O), from O backward passes; "trace" the mean over logits tr Θ/O, (n, m); a number the kernel of that one
        logit, (n, m).
    parameters : str or sequence of str, optional
        A pattern (fnmatch) on dotted names, or several; None for all. Frozen parameters never count.
    precision : {"float64", "tf32", "bfloat16"}, optional
        As in `PseudoNTK`.
    memory_bytes : int
        About what a call may hold beside rows, matrix and module.

    Raises
    ------
    InputError
        For values out of these ranges.

    References
    ----------
    Jacot et al. 2018; Mohamadi & Sutherland 2023, eq. 2; MATH.md §5.
    """

    module: Any
    input_layout: str | None = "nchw"
    output: str | int = "full"
    parameters: str | tuple[str, ...] | None = None
    precision: str | None = None
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        super().__post_init__()
        is_logit = isinstance(self.output, int) and not isinstance(self.output, bool) and self.output >= 0
        if self.output not in OUTPUTS and not is_logit:
            raise InputError(
                f"EmpiricalNTK: output is {self.output!r}; give 'full', 'trace' (the mean over logits) or the number of a logit."
            )

    def entry_size(self, row_shape: tuple[int, ...]) -> int:
        """Rows of a stored matrix for one row of data: the module's logits for "full", else 1. Runs the module on two rows, once."""
        return self._request().entry_size(tuple(row_shape))

    @property
    def _kind(self) -> str | int:
        return self.output
