"""Window geometry against brute force, on random shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidattn
from vidattn.geometry import (
    bias_index_modes_agree,
    bias_rows,
    num_bias_rows,
    region_mask,
    resolve_windows,
    source_tokens,
)

Triple = tuple[int, int, int]


@st.composite
def configurations(draw: st.DrawFn, largest: int = 7) -> tuple[Triple, Triple, Triple]:
    """A grid, a window and a shift."""
    window = tuple(draw(st.integers(1, 4)) for _ in range(3))
    shift = tuple(draw(st.integers(0, extent - 1)) for extent in window)
    return tuple(draw(st.integers(1, largest)) for _ in range(3)), window, shift  # type: ignore[return-value]


def _axis(size: int, window: int, shift: int) -> tuple[int, int, int]:
    """Window, shift and padded size of one axis, as the released code computes them."""
    if size <= window:
        window, shift = size, 0
    return window, shift, size + (window - size % window) % window


def _partition(grid: torch.Tensor, window: Triple) -> torch.Tensor:
    """Cut (D, H, W) into (windows, tokens), the way of the released code."""
    depth, height, width = (size // extent for size, extent in zip(grid.shape, window, strict=True))
    blocks = grid.view(depth, window[0], height, window[1], width, window[2]).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(-1, math.prod(window))


@settings(deadline=None, max_examples=300)
@given(configurations())
def test_source_tokens_are_a_pad_a_roll_and_a_partition(configuration: tuple[Triple, Triple, Triple]) -> None:
    grid, window, shift = configuration
    windows = resolve_windows(grid, window, shift)
    axes = [_axis(*axis) for axis in zip(grid, window, shift, strict=True)]
    assert windows.window == tuple(axis[0] for axis in axes)
    assert windows.shift == tuple(axis[1] for axis in axes)
    assert windows.padded == tuple(axis[2] for axis in axes)
    numbers = torch.arange(math.prod(grid)).view(grid)
    pads = [padded - size for padded, size in zip(windows.padded, grid, strict=True)]
    padded = torch.nn.functional.pad(numbers, (0, pads[2], 0, pads[1], 0, pads[0]), value=-1)
    expected = _partition(padded.roll([-s for s in windows.shift], (0, 1, 2)), windows.window)
    actual = source_tokens(windows)
    assert torch.equal(actual, expected)
    assert (windows.num_windows, windows.num_tokens) == tuple(actual.shape)
    real = actual[actual >= 0]
    assert torch.equal(real.sort().values, numbers.flatten())  # each token once
    assert (actual >= 0).any(1).all()  # no window is all padding


@settings(deadline=None, max_examples=300)
@given(configurations(), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_region_mask_is_that_of_labelled_stretches(
    configuration: tuple[Triple, Triple, Triple], wrap: tuple[bool, bool, bool]
) -> None:
    """Labels as the released code makes them: [:-w], [-w:-s], [-s:] per axis, one stretch where nothing is shifted."""
    windows = resolve_windows(*configuration, wrap)
    labels = torch.zeros(windows.padded, dtype=torch.int64)
    stretches = [
        (slice(0, None),) if shift == 0 or cyclic else (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for window, shift, cyclic in zip(windows.window, windows.shift, wrap, strict=True)
    ]
    for number, region in enumerate(itertools.product(*stretches)):
        labels[region] = number
    regions = _partition(labels, windows.window)
    expected = regions[:, None, :] != regions[:, :, None]
    actual = region_mask(windows)
    if actual is None:
        assert not expected.any()
        assert not any(windows.masked_axes)
    else:
        assert torch.equal(actual, expected)


@settings(deadline=None, max_examples=300)
@given(configurations(), st.data())
def test_windows_with_other_padding(configuration: tuple[Triple, Triple, Triple], data: st.DataObject) -> None:
    """Padding on both sides, before or after the shift, of windows clipped or not: by labels that move along."""
    grid, window, shift = configuration
    clip, shift_first = data.draw(st.booleans()), data.draw(st.booleans())
    padding = None
    if data.draw(st.booleans()):
        padding = []
        for size, extent in zip(grid, window, strict=True):
            before = data.draw(st.integers(0, 4))
            whole = before + size
            behind = 0 if clip and whole <= extent else -whole % extent
            padding.append((before, behind))
    windows = resolve_windows(grid, window, shift, clip=clip, padding=padding, shift_first=shift_first)
    pads, moves = [], []
    for axis, size in enumerate(grid):
        before, behind = (0, 0) if padding is None else padding[axis]
        whole = before + size + behind
        one = whole <= window[axis]
        extent = whole if clip and one else window[axis]
        assert windows.window[axis] == extent
        assert windows.padded[axis] == -(-whole // extent) * extent
        pads.append((before, windows.padded[axis] - before - size))
        moves.append(0 if one else shift[axis])
    numbers = torch.arange(math.prod(grid)).view(grid)
    flat = [tokens for pair in reversed(pads) for tokens in pair]
    back = [-move for move in moves]
    # Of each axis: which tokens come to lie in front of the first one, and so do those of the padding beside them.
    passed = torch.zeros(grid, dtype=torch.int64)
    for axis, (size, move) in enumerate(zip(grid, moves, strict=True)):
        passed += ((torch.arange(size) < move % size).long() << axis).view([-1 if a == axis else 1 for a in range(3)])
    if shift_first:
        rolled = torch.nn.functional.pad(numbers.roll(back, (0, 1, 2)), flat, value=-1)
        labels = passed.roll(back, (0, 1, 2))[None, None].double()
        labels = torch.nn.functional.pad(labels, flat, mode="replicate")[0, 0].long()
    else:
        rolled = torch.nn.functional.pad(numbers, flat, value=-1).roll(back, (0, 1, 2))
        labels = torch.zeros(windows.padded, dtype=torch.int64)
        for axis, (size, move) in enumerate(zip(windows.padded, moves, strict=True)):
            front = (torch.arange(size) < move).long() << axis
            labels += front.view([-1 if a == axis else 1 for a in range(3)])
        labels = labels.roll(back, (0, 1, 2))
    assert torch.equal(source_tokens(windows), _partition(rolled, windows.window))
    regions = _partition(labels, windows.window)
    expected = regions[:, None, :] != regions[:, :, None]
    for actual in (region_mask(windows), region_mask(windows, regions=labels)):
        assert not expected.any() if actual is None else torch.equal(actual, expected)


@settings(deadline=None, max_examples=200)
@given(configurations(), st.sampled_from(["prefix", "geometric"]))
def test_bias_rows(configuration: tuple[Triple, Triple, Triple], bias_index: str) -> None:
    """The full index cut to its first rows and columns, or differences of coordinates in the clipped window."""
    grid, window, shift = configuration
    windows = resolve_windows(grid, window, shift)
    of_tokens = window if bias_index == "prefix" else windows.window
    coordinates = list(itertools.product(*map(range, of_tokens)))[: windows.num_tokens]
    rows = list(itertools.product(*(range(-extent + 1, extent) for extent in window)))
    assert len(rows) == num_bias_rows(window)
    number = {difference: row for row, difference in enumerate(rows)}
    expected = [
        [number[tuple(a - b for a, b in zip(query, key, strict=True))] for key in coordinates]  # type: ignore[index]
        for query in coordinates
    ]
    assert torch.equal(bias_rows(window, windows, bias_index), torch.tensor(expected))


@settings(deadline=None, max_examples=300)
@given(configurations())
def test_when_the_bias_indexings_agree(configuration: tuple[Triple, Triple, Triple]) -> None:
    grid, window, shift = configuration
    windows = resolve_windows(grid, window, shift)
    same = torch.equal(bias_rows(window, windows, "prefix"), bias_rows(window, windows, "geometric"))
    assert bias_index_modes_agree(window, windows) == same


@settings(deadline=None, max_examples=300)
@given(configurations())
def test_report(configuration: tuple[Triple, Triple, Triple]) -> None:
    grid, window, shift = configuration
    report = vidattn.explain_windows(grid, window, shift)
    windows = resolve_windows(grid, window, shift)
    mask = region_mask(windows)
    kinds = 1 if mask is None else len(torch.unique(mask.flatten(1), dim=0))
    share = 0.0 if mask is None else mask.double().mean().item()
    assert report.geometry == windows
    assert report.num_masks == kinds
    assert report.masked_share == pytest.approx(share, abs=1e-12)
    assert report.padding_share == pytest.approx((source_tokens(windows) < 0).double().mean().item(), abs=1e-12)
    text = str(report)
    assert ("warning" in text) != bias_index_modes_agree(window, windows)
    for label in ("effective window", "effective shift", "padding at the end", "number of windows", "masked pairs"):
        assert label in text


def test_report_of_the_first_stage() -> None:
    """Video Swin on 32 frames of 224 x 224."""
    assert str(vidattn.explain_windows((16, 56, 56), window_size=(8, 7, 7), shift_size=(4, 3, 3))).splitlines() == [
        "                         depth  height   width",
        "grid                        16      56      56",
        "configured window            8       7       7",
        "configured shift             4       3       3",
        "effective window             8       7       7",
        "effective shift              4       3       3",
        "padding at the end           0       0       0",
        "windows                      2       8       8",
        "number of windows          128",
        "tokens a window            392",
        "padding slots            0.00%",
        "distinct region masks        8",
        "masked pairs            33.90%",
    ]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "explain_windows: grid: expected values of at least 1", ((0, 4, 4), 2)),
        (TypeError, "explain_windows: window_size: expected an int or three", ((4, 4, 4), None)),
        (ValueError, "explain_windows: shift_size: expected each shift smaller", ((4, 4, 4), 2, 2)),
        (TypeError, "explain_windows: shift_size: expected an int or three", ((4, 4, 4), 2, (True, 0, 0))),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        vidattn.explain_windows(*arguments)
