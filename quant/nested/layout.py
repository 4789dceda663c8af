"""Where scales and planes of one expert lie, and which prefix of them a width needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GROUP_LENGTH = 32
ALIGNMENT = 4096
TOPS = (4, 5, 8)  # widths whose codes are those of a ggml type: q4_0, q5_0, q8_0
LEAST_WIDTH = 2

_SCALE_BYTES = 2
_WORD_BYTES = 4

Words = NDArray[np.uint32]
Scales = NDArray[np.float16]


def check_widths(base: int, top: int) -> None:
    """ValueError unless `base`..`top` can be nested."""
    if top not in TOPS or not LEAST_WIDTH <= base <= top:
        raise ValueError(
            f"widths {base}..{top}, wanted a top of 4, 5 or 8 and a base of 2 to the top"
        )


@dataclass(frozen=True, slots=True)
class NestedLayout:
    """Segments of one expert: its scales, then one plane a bit, the highest bit first.

    The base is the first `base` planes. A scale is an f16 a group of 32 weights of a row, a plane
    one little-endian u32 a group; both run along the rows, row after row.
    """

    n_rows: int
    row_length: int
    base: int
    top: int

    def __post_init__(self) -> None:
        check_widths(self.base, self.top)
        if self.n_rows < 1 or self.row_length < 1 or self.row_length % GROUP_LENGTH:
            raise ValueError(
                f"{self.n_rows} rows of {self.row_length} weights, wanted rows of whole groups "
                f"of {GROUP_LENGTH}"
            )

    @property
    def n_groups(self) -> int:
        """Groups of the expert, each with one scale."""
        return self.n_rows * self.row_length // GROUP_LENGTH

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales, which come first."""
        return self.n_groups * _SCALE_BYTES

    @property
    def plane_bytes(self) -> int:
        """Bytes of one plane."""
        return self.n_groups * _WORD_BYTES

    @property
    def expert_bytes(self) -> int:
        """Bytes of the whole expert; expert e of a tensor starts at e times that."""
        return self.prefix_bytes(self.top)

    @property
    def is_aligned(self) -> bool:
        """Whether every segment of every expert starts at a page, if the tensor does."""
        return not self.scales_bytes % ALIGNMENT and not self.plane_bytes % ALIGNMENT

    def prefix_bytes(self, width: int) -> int:
        """Return the bytes from the start of the expert to the end of plane `width`."""
        self._check(width)
        return self.scales_bytes + width * self.plane_bytes

    def planes_span(self, width: int, wider: int) -> tuple[int, int]:
        """Return offset and size, within the expert, of planes `width` + 1 to `wider`."""
        self._check(width)
        self._check(wider)
        return self.prefix_bytes(width), max(0, wider - width) * self.plane_bytes

    def split(self, prefix: NDArray[np.uint8], width: int) -> tuple[Scales, Words]:
        """View a prefix as its scales and planes.

        Args:
            prefix: (prefix_bytes(width),) bytes; more are ignored, fewer are a ValueError.
            width: The width read.

        Returns:
            (n_groups,) scales and (width, n_groups) planes.
        """
        wanted = self.prefix_bytes(width)
        if prefix.size < wanted:
            raise ValueError(f"{prefix.size:,} bytes, width {width} has {wanted:,}")
        scales = prefix[: self.scales_bytes].view(np.dtype("<f2"))
        planes = prefix[self.scales_bytes : wanted].view(np.dtype("<u4"))
        return scales, planes.reshape(width, self.n_groups)

    def _check(self, width: int) -> None:
        if not self.base <= width <= self.top:
            raise ValueError(f"width {width}, wanted {self.base} to {self.top}")
