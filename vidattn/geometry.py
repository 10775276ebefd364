"""Where a token of a 3D window comes from, which pairs are masked, which bias row a pair reads.

Every window op, reference, kernel launcher and test asks this file; nothing else decides window geometry. Axes are
always (depth, height, width), depth being time for video. The rules are those of Video Swin Transformer (arXiv
2106.13230, section 3.2 and its released code):

* per axis, a window that is not smaller than the grid is clipped to the grid and loses its shift;
* the grid is padded at the end of each axis to a multiple of the effective window;
* the padded grid is rolled by minus the shift, then cut into windows, numbered row-major;
* in the last window of a shifted axis, tokens that wrapped around do not mix with tokens that did not.

Other models' code differs, so a call may say that windows are not clipped (the grid is padded up to them, as in the 2D
Swin of torchvision), where the padding goes, that the shift comes before the padding, or which tokens form a region.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidattn.messages import describe

__all__ = [
    "BIAS_INDEX_MODES",
    "WindowGeometry",
    "WindowReport",
    "bias_rows",
    "explain_windows",
    "num_bias_rows",
    "region_bits",
    "region_mask",
    "resolve_windows",
    "source_tokens",
]

BIAS_INDEX_MODES = ("prefix", "geometric")
_AXES = ("depth", "height", "width")


@dataclass(frozen=True)
class WindowGeometry:
    """Effective window geometry of one grid.

    Attributes:
        grid: token grid (D, H, W), unpadded.
        window: effective (clipped) window (wd, wh, ww).
        shift: effective shift, 0 on axes of one window.
        padded: grid padded to multiples of the window.
        counts: windows per axis.
        wrap: axes that are cyclic: their shifted windows mix tokens across the border, so no region mask applies.
        before: padding in front of each axis; the rest is behind it.
        shift_first: whether the shift rolls the grid before it is padded.
    """

    grid: tuple[int, int, int]
    window: tuple[int, int, int]
    shift: tuple[int, int, int]
    padded: tuple[int, int, int]
    counts: tuple[int, int, int]
    wrap: tuple[bool, bool, bool] = (False, False, False)
    before: tuple[int, int, int] = (0, 0, 0)
    shift_first: bool = False

    @property
    def num_windows(self) -> int:
        """Windows of one batch element."""
        return math.prod(self.counts)

    @property
    def num_tokens(self) -> int:
        """Tokens of one window, padding included."""
        return math.prod(self.window)

    @property
    def masked_axes(self) -> tuple[bool, bool, bool]:
        """Axes on which the last window separates wrapped from unwrapped tokens."""
        depth, height, width = (s > 0 and not cyclic for s, cyclic in zip(self.shift, self.wrap, strict=True))
        return depth, height, width

    @property
    def borders(self) -> tuple[int, int, int]:
        """Where on the shifted, padded grid the tokens that wrapped around begin, on each axis."""
        ends = map(sum, zip(self.before, self.grid, strict=True)) if self.shift_first else self.padded
        depth, height, width = (end - shift for end, shift in zip(ends, self.shift, strict=True))
        return depth, height, width


def resolve_windows(
    grid: Sequence[int],
    window_size: Sequence[int],
    shift_size: Sequence[int] = (0, 0, 0),
    wrap: Sequence[bool] = (False, False, False),
    *,
    clip: bool = True,
    padding: Sequence[Sequence[int]] | None = None,
    shift_first: bool = False,
) -> WindowGeometry:
    """Apply the clip, shift and padding rules to a grid.

    Args:
        grid: token grid (D, H, W), each at least 1.
        window_size: configured window (Wd, Wh, Ww).
        shift_size: configured shift, ``0 <= shift < window`` per axis.
        wrap: axes that are cyclic.
        clip: whether a window that is larger than the grid is clipped to it; else the grid is padded up to the window.
        padding: tokens (before, behind) each axis, with which the rules see the grid; None for what they ask for,
            behind it.
        shift_first: whether the shift comes before the padding.

    Returns:
        The effective geometry. Whether windows fill a grid whose padding was given is for the caller to check.
    """
    window, shift, padded, counts = [], [], [], []
    given = padding or [(0, 0)] * 3
    for size, (before, behind), configured, moved in zip(grid, given, window_size, shift_size, strict=True):
        whole = before + size + behind
        one_window = whole <= configured  # equality too: one window has no neighbour to shift into
        extent = whole if clip and one_window else configured
        window.append(extent)
        shift.append(0 if one_window else moved % size if shift_first else moved)
        counts.append(-(-whole // extent))
        padded.append(counts[-1] * extent)
    return WindowGeometry(
        tuple(grid),  # type: ignore[arg-type]
        tuple(window),  # type: ignore[arg-type]
        tuple(shift),  # type: ignore[arg-type]
        tuple(padded),  # type: ignore[arg-type]
        tuple(counts),  # type: ignore[arg-type]
        tuple(wrap),  # type: ignore[arg-type]
        tuple(before for before, _ in given),  # type: ignore[arg-type]
        shift_first and any(shift),
    )


def _token_coordinates(extents: Sequence[int], count: int, device: torch.device | str | None) -> list[torch.Tensor]:
    """Unravel the flat token numbers ``0 .. count - 1`` by the last two extents; the first coordinate is unbounded."""
    flat = torch.arange(count, device=device)
    return [flat // (extents[1] * extents[2]), flat // extents[2] % extents[1], flat % extents[2]]


def source_tokens(geometry: WindowGeometry, device: torch.device | str | None = None) -> torch.Tensor:
    """Give the grid token that each slot of each window holds.

    Args:
        geometry: effective geometry.
        device: where the result is made.

    Returns:
        int64 (num_windows, num_tokens): flat index into the unpadded grid, -1 for padding.
    """
    windows = _token_coordinates(geometry.counts, geometry.num_windows, device)
    tokens = _token_coordinates(geometry.window, geometry.num_tokens, device)
    flat = torch.zeros(geometry.num_windows, geometry.num_tokens, dtype=torch.int64, device=device)
    real = torch.ones_like(flat, dtype=torch.bool)
    for axis in range(3):
        place = windows[axis][:, None] * geometry.window[axis] + tokens[axis][None, :]
        grid, shift, before = geometry.grid[axis], geometry.shift[axis], geometry.before[axis]
        if not geometry.shift_first:
            place = (place + shift) % geometry.padded[axis]
        place = place - before
        real &= (place >= 0) & (place < grid)
        if geometry.shift_first:
            place = (place + shift) % grid
        flat = flat * grid + place
    return torch.where(real, flat, -1)


def region_bits(
    geometry: WindowGeometry, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which axes a window has two regions on, and on which axes a token of such a window wrapped around, as bit sets.

    Without explicit padding it is the last window of an axis that has two regions.
    """
    windows = _token_coordinates(geometry.counts, geometry.num_windows, device)
    tokens = _token_coordinates(geometry.window, geometry.num_tokens, device)
    last = torch.zeros(geometry.num_windows, dtype=torch.int64, device=device)
    wrapped = torch.zeros(geometry.num_tokens, dtype=torch.int64, device=device)
    for axis, masked in enumerate(geometry.masked_axes):
        if masked:
            window, border = geometry.window[axis], geometry.borders[axis]
            last = last | (windows[axis] == border // window).long() << axis
            wrapped = wrapped | (tokens[axis] >= border % window).long() << axis
    return last, wrapped


def region_mask(
    geometry: WindowGeometry, device: torch.device | str | None = None, regions: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Say which pairs of a shifted window lie in different regions.

    The closed form of the released code's region labels: a pair is masked when, on some shifted axis, the window is the
    last one and exactly one of the two tokens wrapped around.

    Args:
        geometry: effective geometry.
        device: where the result is made.
        regions: integers (D', H', W') on the shifted, padded grid, which number the regions instead; None without.

    Returns:
        bool (num_windows, num_tokens, num_tokens), true where masked; None when no axis masks anything.
    """
    if regions is not None:
        (nd, nh, nw), (wd, wh, ww) = geometry.counts, geometry.window
        labels = regions.reshape(nd, wd, nh, wh, nw, ww).permute(0, 2, 4, 1, 3, 5)
        labels = labels.reshape(geometry.num_windows, geometry.num_tokens)
        return labels[:, :, None] != labels[:, None, :]
    if not any(geometry.masked_axes):
        return None
    last, wrapped = region_bits(geometry, device)
    differing = wrapped[:, None] ^ wrapped[None, :]
    return (last[:, None, None] & differing[None]) != 0


def num_bias_rows(window_size: Sequence[int]) -> int:
    """Rows of the relative position bias table of a configured window."""
    depth, height, width = window_size
    return (2 * depth - 1) * (2 * height - 1) * (2 * width - 1)


def bias_extents(window_size: Sequence[int], geometry: WindowGeometry, bias_index: str) -> tuple[int, int]:
    """Give the (height, width) extents that unravel a token number into the coordinates the bias is indexed by."""
    extents = window_size if bias_index == "prefix" else geometry.window
    return extents[1], extents[2]


def bias_rows(
    window_size: Sequence[int],
    geometry: WindowGeometry,
    bias_index: str = "prefix",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Give the row of the relative position bias table that each (query, key) pair reads.

    "prefix" unravels token numbers by the configured window even when the window is clipped, which is what slicing the
    full index to ``[:N, :N]`` in the released code does; "geometric" unravels by the clipped window.

    Args:
        window_size: configured window, which lays out the table.
        geometry: effective geometry.
        bias_index: "prefix" or "geometric".
        device: where the result is made.

    Returns:
        int64 (num_tokens, num_tokens), row = query, column = key.
    """
    extents = bias_extents(window_size, geometry, bias_index)
    coordinates = _token_coordinates((0, *extents), geometry.num_tokens, device)
    rows = torch.zeros(geometry.num_tokens, geometry.num_tokens, dtype=torch.int64, device=device)
    for configured, coordinate in zip(window_size, coordinates, strict=True):
        offset = coordinate[:, None] - coordinate[None, :] + configured - 1
        rows = rows * (2 * configured - 1) + offset
    return rows


def bias_index_modes_agree(window_size: Sequence[int], geometry: WindowGeometry) -> bool:
    """Tell whether "prefix" and "geometric" read the same bias row for every pair.

    They do when every axis after the first one with more than one token is unclipped: only then does the flat token
    number unravel to the same coordinate differences.
    """
    axis = 0
    while axis < 3 and geometry.window[axis] == 1:
        axis += 1
    return all(geometry.window[later] == window_size[later] for later in range(axis + 1, 3))


@dataclass(frozen=True)
class WindowReport:
    """What a window configuration does to a grid; ``str()`` gives a table.

    Attributes:
        window_size: configured window.
        shift_size: configured shift.
        geometry: effective geometry.
        num_masks: number of distinct region masks, the empty one included.
        masked_share: share of (query, key) pairs that the region mask separates.
        padding_share: share of window slots that hold padding.
        bias_modes_agree: whether "prefix" and "geometric" bias indexing give the same result.
    """

    window_size: tuple[int, int, int]
    shift_size: tuple[int, int, int]
    geometry: WindowGeometry
    num_masks: int
    masked_share: float
    padding_share: float
    bias_modes_agree: bool

    def __str__(self) -> str:
        geometry = self.geometry
        pads = tuple(p - g for p, g in zip(geometry.padded, geometry.grid, strict=True))
        header = f"{'':22}" + "".join(f"{axis:>8}" for axis in _AXES)
        table = [
            ("grid", geometry.grid),
            ("configured window", self.window_size),
            ("configured shift", self.shift_size),
            ("effective window", geometry.window),
            ("effective shift", geometry.shift),
            ("padding at the end", pads),
            ("windows", geometry.counts),
        ]
        lines = [header, *(f"{label:22}" + "".join(f"{value:>8}" for value in values) for label, values in table)]
        lines += [
            f"{'number of windows':22}{geometry.num_windows:>8}",
            f"{'tokens a window':22}{geometry.num_tokens:>8}",
            f"{'padding slots':22}{self.padding_share:>8.2%}",
            f"{'distinct region masks':22}{self.num_masks:>8}",
            f"{'masked pairs':22}{self.masked_share:>8.2%}",
        ]
        if not self.bias_modes_agree:
            lines.append(
                "warning: the window is clipped so that bias_index='prefix' (the released code's indexing) and"
                " 'geometric' read different rows of the bias table"
            )
        return "\n".join(lines)


def explain_windows(
    grid: Sequence[int], window_size: int | Sequence[int], shift_size: int | Sequence[int] = (0, 0, 0)
) -> WindowReport:
    """Explain what a window configuration does to a token grid.

    Args:
        grid: token grid (D, H, W), depth being time.
        window_size: configured window, one int or three.
        shift_size: configured shift, one int or three, ``0 <= shift < window``.

    Returns:
        A report whose ``str()`` is a table: effective window and shift, padding, number of windows, tokens a window,
        distinct region masks, share of masked pairs, and a warning when the two bias indexings differ.

    Raises:
        TypeError: a size is not an int or three ints.
        ValueError: a size is out of range.

    Reference:
        Video Swin Transformer, arXiv 2106.13230, section 3.2.

    Example:
        >>> report = explain_windows((16, 14, 14), window_size=(8, 7, 7), shift_size=(4, 3, 3))
        >>> report.geometry.num_windows, report.geometry.num_tokens, report.num_masks
        (8, 392, 8)
    """
    extents = three_ints("explain_windows", "grid", grid, minimum=1)
    window, shift = window_sizes("explain_windows", window_size, shift_size)
    geometry = resolve_windows(extents, window, shift)
    # A pair is masked iff it differs in an axis on which the window is last, so everything factorises over the axes
    # and no (windows, tokens, tokens) tensor is needed.
    masks, unmasked, real = 1, 1.0, 1.0
    for axis in range(3):
        count, extent = geometry.counts[axis], geometry.window[axis]
        real *= geometry.grid[axis] / geometry.padded[axis]
        if geometry.masked_axes[axis]:
            wrapped = geometry.shift[axis]
            same = (wrapped**2 + (extent - wrapped) ** 2) / extent**2
            unmasked *= (count - 1 + same) / count
            masks *= 2
    return WindowReport(
        window, shift, geometry, masks, 1.0 - unmasked, 1.0 - real, bias_index_modes_agree(window, geometry)
    )


def three_ints(function: str, name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int, int]:
    """Return ``value`` as three ints of at least ``minimum``; one int is repeated."""
    items: Sequence[int | None]
    if isinstance(value, (tuple, list)):
        # What most calls bring needs no look at each number.
        items = value if list(map(type, value)) == [int, int, int] else [_as_int(item) for item in value]
    else:
        items = [_as_int(value)] * 3
    if None in items:
        raise TypeError(
            f"{function}: {name}: expected an int or three ints (depth, height, width), got {describe(value)}"
        )
    if len(items) != 3:
        raise ValueError(f"{function}: {name}: expected three ints (depth, height, width), got {describe(value)}")
    first, second, third = items
    if min(first, second, third) < minimum:  # type: ignore[type-var, operator]
        raise ValueError(f"{function}: {name}: expected values of at least {minimum}, got {describe(value)}")
    if max(first, second, third) >= 2**63:  # type: ignore[type-var, operator]
        raise ValueError(f"{function}: {name}: expected values below 2**63, got {describe(value)}")
    return first, second, third  # type: ignore[return-value]


def _as_int(value: object) -> int | None:
    """Return an integer of any library (symbolic ones pass as ints), None for what is none."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def window_sizes(
    function: str, window_size: int | Sequence[int], shift_size: int | Sequence[int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return configured window and shift as int triples, or raise naming ``function``."""
    window = three_ints(function, "window_size", window_size, minimum=1)
    shift = three_ints(function, "shift_size", shift_size, minimum=0)
    for s, w in zip(shift, window, strict=True):
        if s >= w:
            raise ValueError(
                f"{function}: shift_size: expected each shift smaller than its window {window}, got {shift}"
            )
    return window, shift
