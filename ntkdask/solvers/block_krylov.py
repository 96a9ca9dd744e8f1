"""One block Lanczos process and the conjugate-gradient directions of every shift that it serves.

    Ã V_j = V_{j−1}B_{j−1}ᵀ + V_j D_j + V_{j+1}B_j,      L_j = B_{j−1}Δ_{j−1}⁻¹,   Δ_j = D_j + σ − L_j B_{j−1}ᵀ,
    ξ_j = −L_j ξ_{j−1},   P_j = M^(−½)V_j − P_{j−1}L_jᵀ,   X ← X + P_j Δ_j⁻¹ξ_j,   residual −M^(½)V_{j+1}·B_jΔ_j⁻¹ξ_j.

Ã = A, M = I and σ = α for every alpha served, or Ã = M^(−½)(A + α)M^(−½) and σ = 0 for a single one. The caller makes the
products with A (`conjugate_gradients`). Blocks are (n, r), NumPy or CuPy; r never grows, and falls where rank is lost. The
(r, r) coefficients stay on the host. Saad 2003, §6.7; O'Leary 1980.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.linalg import LinAlgError

from ntkdask import lapack
from ntkdask.arrays import Array, namespace, to_device, to_host

LOST_RANK = 1e-13
"""Singular values of a block below this part of its scale are rounding: their directions are dropped."""


class Preconditioner(Protocol):
    """A symmetric positive definite M(α) that is close to A + αI, given by its square root."""

    def root(self, x: Array, alpha: float) -> Array:
        """M^(½)·x for x (n, r)."""

    def inverse_root(self, x: Array, alpha: float) -> Array:
        """M^(−½)·x for x (n, r)."""


@dataclass
class Shift:
    """One alpha that a process serves.

    Parameters
    ----------
    member : int
        Index of the alpha among all.
    sigma : float
        Its shift σ.
    xi : array (r, k)
        ξ of the last step.
    pivot : array (r, r)
        Δ of the last step.
    directions : array (n, r)
        P of the last step.
    moving : bool
        Whether its iterate still moves.
    """

    member: int
    sigma: float
    xi: np.ndarray
    pivot: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    directions: Array = None
    moving: bool = True


@dataclass
class Step:
    """What one step did for one shift.

    Parameters
    ----------
    member : int
        Index of the alpha.
    move : array (n, k), optional
        What is added to X; None where Δ is not positive definite.
    norms : array (k,)
        Residual norms; empty without a move.
    curvature : float, optional
        The lowest curvature where Δ is not positive definite.
    """

    member: int
    move: Array | None
    norms: np.ndarray
    curvature: float | None = None


@dataclass
class Process:
    """A block Lanczos process and its shifts.

    Parameters
    ----------
    block : array (n, r)
        V_j.
    shifts : list of Shift
        The alphas that it serves.
    alpha : float
        The alpha that Ã contains where there is a preconditioner, else 0.
    previous : array (n, r_previous), optional
        V_{j−1}.
    coupling : array (r, r_previous)
        B_{j−1}.
    scale : float
        The largest entry of |T| met so far.
    norm : float
        The largest ‖Ad‖/‖d‖ met so far.
    """

    block: Array
    shifts: list[Shift]
    alpha: float = 0.0
    previous: Array = None
    coupling: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    scale: float = 0.0
    norm: float = 0.0

    @classmethod
    def start(
        cls,
        residual: Array,
        members: list[int],
        sigmas: list[float],
        alpha: float,
        preconditioner: Preconditioner | None,
    ) -> Process:
        """A process for the right-hand sides `residual` (n, k), with one shift of `sigmas` for each of `members`."""
        if preconditioner is not None:
            residual = preconditioner.inverse_root(residual, alpha)
        size = to_host(namespace(residual).linalg.norm(residual, axis=0))
        unit = residual * _like(1.0 / np.where(size > 0, size, 1.0), residual)
        block, factor = orthonormalise(unit, LOST_RANK)
        return cls(block, [Shift(m, s, factor * size) for m, s in zip(members, sigmas, strict=True)], alpha)

    @property
    def active(self) -> bool:
        """Whether a shift still moves and the space is not exhausted."""
        return self.block.shape[1] > 0 and any(s.moving for s in self.shifts)

    def directions(self, preconditioner: Preconditioner | None) -> Array:
        """The directions (n, r) that the caller multiplies by A."""
        return self.block if preconditioner is None else preconditioner.inverse_root(self.block, self.alpha)

    def advance(self, directions: Array, product: Array, preconditioner: Preconditioner | None) -> list[Step]:
        """One step from product = A·directions: what it does for every shift that still moves."""
        xp = namespace(self.block)
        longest = xp.linalg.norm(product, axis=0) / xp.linalg.norm(directions, axis=0)
        self.norm = max(self.norm, float(longest.max()))
        image = product
        if preconditioner is not None:
            image = preconditioner.inverse_root(product + self.alpha * directions, self.alpha)
        if self.previous is not None:
            image = image - self.previous @ _like(self.coupling.T, image)
        diagonal = self.block.T @ image
        image = image - self.block @ diagonal
        # once more, for what rounding left along the block
        again = self.block.T @ image
        image = image - self.block @ again
        inner = to_host(diagonal + again)
        inner = (inner + inner.T) / 2
        moved = [self._move(s, directions, inner) for s in self.shifts if s.moving]
        size = np.linalg.norm(to_host(xp.linalg.norm(image, axis=0)))
        self.scale = max(self.scale, float(np.abs(inner).max()), float(size))
        following, coupling = orthonormalise(image, LOST_RANK, self.scale)
        rooted = following if preconditioner is None else preconditioner.root(following, self.alpha)
        steps = []
        for shift, lengths, curvature in moved:
            if lengths is None:
                steps.append(Step(shift.member, None, np.empty(0), curvature))
                continue
            left = rooted @ _like(coupling @ lengths, rooted)
            norms = to_host(xp.linalg.norm(left, axis=0))
            steps.append(Step(shift.member, shift.directions @ _like(lengths, rooted), norms))
        self.previous, self.block, self.coupling = self.block, following, coupling
        return steps

    def _move(
        self, shift: Shift, directions: Array, inner: np.ndarray
    ) -> tuple[Shift, np.ndarray | None, float | None]:
        """(shift, Δ⁻¹ξ (r, k), None), or (shift, None, lowest curvature) when Δ is not positive definite."""
        pivot = inner + shift.sigma * np.eye(len(inner))
        if shift.directions is None:
            shift.directions = directions
        else:
            lower = lapack.cholesky_solve(shift.pivot, self.coupling.T).T
            pivot = pivot - lower @ self.coupling.T
            shift.xi = -(lower @ shift.xi)
            shift.directions = directions - shift.directions @ _like(lower.T, directions)
        shift.pivot = (pivot + pivot.T) / 2
        try:
            return shift, lapack.cholesky_solve(shift.pivot, shift.xi), None
        except LinAlgError:
            lowest = _lowest_curvature(shift)
            # a curvature that A's own rounding makes negative means a singular matrix, not an indefinite one
            return shift, None, lowest if lowest < -len(directions) * np.finfo(float).eps * self.norm else 0.0

    def to_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """(arrays, attributes), plain and on the host."""
        arrays = {"block": to_host(self.block), "coupling": self.coupling}
        if self.previous is not None:
            arrays["previous"] = to_host(self.previous)
        for i, shift in enumerate(self.shifts):
            arrays |= {f"{i}.xi": shift.xi, f"{i}.pivot": shift.pivot}
            if shift.directions is not None:
                arrays[f"{i}.directions"] = to_host(shift.directions)
        shifts = [[s.member, s.sigma, s.moving] for s in self.shifts]
        return {k: v.copy() for k, v in arrays.items()}, {
            "alpha": self.alpha,
            "scale": self.scale,
            "norm": self.norm,
            "shifts": shifts,
        }

    @classmethod
    def from_state(cls, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any], device: bool) -> Process:
        """The process that `to_state` described, on the device or the host."""

        def move(name: str) -> Array:
            return to_device(np.asarray(arrays[name]), device) if name in arrays else None

        shifts = [
            Shift(
                m,
                sigma,
                np.asarray(arrays[f"{i}.xi"]),
                np.asarray(arrays[f"{i}.pivot"]),
                move(f"{i}.directions"),
                moving,
            )
            for i, (m, sigma, moving) in enumerate(attributes["shifts"])
        ]
        return cls(
            move("block"),
            shifts,
            attributes["alpha"],
            move("previous"),
            np.asarray(arrays["coupling"]),
            attributes["scale"],
            attributes["norm"],
        )


def orthonormalise(block: Array, tolerance: float, scale: float | None = None) -> tuple[Array, np.ndarray]:
    """(Q (n, r), F (r, k)) with block = Q·F up to tolerance·scale, Q orthonormal and r the rank; F is on the host.

    scale: None for the block's largest singular value. Householder QR, then an SVD of its small factor where rank is lost.
    """
    q, factor = namespace(block).linalg.qr(block)
    factor = to_host(factor)
    left, values, right = np.linalg.svd(factor)
    floor = tolerance * (scale if scale is not None else (float(values[0]) if values.size else 0.0))
    rank = int((values > floor).sum())
    if rank == len(values):
        return q, factor
    return q @ _like(left[:, :rank], q), values[:rank, None] * right[:rank]


def _lowest_curvature(shift: Shift) -> float:
    """The smallest Rayleigh quotient of A + α in the span of the directions: an upper bound of its smallest eigenvalue."""
    gram = to_host(shift.directions.T @ shift.directions)
    try:
        return float(lapack.eigvalsh(np.array(shift.pivot, order="F"), np.array(gram, order="F"))[0])
    except LinAlgError:
        return float(np.linalg.eigvalsh(shift.pivot)[0] / max(np.trace(gram), np.finfo(float).tiny))


def _like(small: np.ndarray, array: Array) -> Array:
    # asarray, not to_device: r may be 0, and there is no pinned memory of size 0
    return namespace(array).asarray(np.ascontiguousarray(small))
