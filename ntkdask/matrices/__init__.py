"""Stored symmetric and rectangular matrices: as `A @ v`, factorised in tiles, their spectrum."""

from ntkdask.matrices.stored import StoredMatrix

__all__ = ["StoredMatrix"]
