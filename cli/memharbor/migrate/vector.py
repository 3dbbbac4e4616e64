"""An embedding as it travels: packed float32 values, so that a row is carried without a Python object for each. Pure."""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

VALUE_BYTES = 4


class Vector(Sequence[float]):
    """
    Float32 values, to the bit. Equal to another one of the same bits, and to any other sequence of the same numbers.

    Args:
        packed: The values as little-endian float32.

    >>> Vector.of((1.0, -0.5)) == (1.0, -0.5), Vector.of((0.0,)) == Vector.of((-0.0,))
    (True, False)
    """

    __slots__ = ("packed",)

    def __init__(self, packed: bytes) -> None:
        self.packed = packed

    @classmethod
    def of(cls, values: Sequence[float]) -> Vector:
        """
        Pack numbers, each as the nearest float32.

        Raises:
            OverflowError: One is larger than any float32.
            struct.error: One is no number.
        """
        return values if isinstance(values, cls) else cls(struct.pack(f"<{len(values)}f", *values))

    @classmethod
    def from_big_endian(cls, packed: bytes) -> Vector:
        """Take values as PostgreSQL sends them."""
        return cls(_swapped(packed))

    def __len__(self) -> int:
        """Count the values."""
        return len(self.packed) // VALUE_BYTES

    def __iter__(self) -> Iterator[float]:
        """Go through the values."""
        return iter(struct.unpack(f"<{len(self)}f", self.packed))

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[float, ...]: ...
    def __getitem__(self, index: int | slice) -> float | tuple[float, ...]:
        """Give a value, or some of them."""
        values: tuple[float, ...] = struct.unpack(f"<{len(self)}f", self.packed)
        return values[index]

    def __eq__(self, other: object) -> bool:
        """Compare bits with another one, numbers with any other sequence."""
        if isinstance(other, Vector):
            return self.packed == other.packed
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    def __hash__(self) -> int:
        """Hash the numbers, as a tuple of them does."""
        return hash(tuple(self))

    def __repr__(self) -> str:
        """Show the numbers."""
        return f"Vector.of({tuple(self)})"

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number: a sum of float32 values leaves a float only by one that is none."""
        return math.isfinite(sum(_native(self.packed)))

    @property
    def is_zero(self) -> bool:
        """Whether every value is zero, of either sign."""
        return not any(_native(self.packed))

    def sent(self) -> bytes:
        """Spell it as pgvector reads it. Source: pgvector, vector_recv: two int16, then big-endian float4."""
        return struct.pack(">hh", len(self), 0) + _swapped(self.packed)


def _native(packed: bytes) -> array[float]:
    values = array("f", packed)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _swapped(packed: bytes) -> bytes:
    values = array("f", packed)
    values.byteswap()
    return values.tobytes()
