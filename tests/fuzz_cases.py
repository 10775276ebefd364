"""Whole calls of the public functions, drawn at random. Each is a program, and that program is what the tests run."""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import BACKENDS, DTYPES, SUPPORTED, device_of, on_cpu, seed_of, seeds_from_the_host
from hypothesis import strategies as st
from tolerance import assert_all_close
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests import cuda_emulator
from vidattn import reference
from vidattn.backends import TRITON_INTERPRETED
from vidattn.geometry import num_bias_rows, resolve_windows
from vidattn.ops._tensors import keeps_lse

# Where the backend "cuda" is under test, nothing is drawn that it refuses.
CUDA = os.environ.get("VIDATTN_BACKEND") == "cuda"
EMULATED = CUDA and not torch.cuda.is_available()
NEVER_REFUSE = ("cpu", "cuda") if CUDA else ("cpu",)
# An interpreter or an emulator takes a thousand times as long, so it gets smaller calls.
SLOW = TRITON_INTERPRETED or CUDA
DEPTH, SIDE, SEQUENCE = (3, 2, 12) if SLOW else (8, 4, 70)
HEAD_DIM = 64 if CUDA else 32 if SLOW else 128
# Half of the calls of "cuda" have longer groups, few of them: of more than the 32 keys of its kernels for short
# sequences, many of more than a tile of 64.
LONG_SEQUENCE = (33, 100)
LONG_WINDOWS = ((2, 7, 7), (4, 5, 5), (1, 8, 8))

Results = dict[str, Tensor]

DEFINITION = """\
import torch
import vidattn


def run(attend=vidattn.{function}, all_dtypes=None, device="cpu", **given):
    def draw(seed, dtype, *shape, size=1.0):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = (size * x).to(dtype)
        return x.to(device, all_dtypes if dtype.is_floating_point else None)

    def pick(seed, end, *shape):
        return torch.randint(end, shape, generator=torch.Generator().manual_seed(seed)).to(device)

    torch.manual_seed(1)  # of the dropout
{tensors}
    out = {call}
    return {{"out": out.detach()}}{gradients}
"""
EMULATION = """

from tests import cuda_emulator

cuda_emulator.install()
cuda_emulator.controls(**{controls}).__enter__()"""
COMPARISON = """

found, plain = run({where}backend={backend!r}), run(backend="reference")
exact = run(all_dtypes=torch.float64, backend="reference")
for name, x in found.items():
    off, usual = ((y.cpu().to(exact[name].dtype) - exact[name]).abs().sum() for y in (x, plain[name]))
    print(f"{{name}}: {backend} is off by {{off:.1e}} in sum, plain PyTorch in the same dtype by {{usual:.1e}}")
"""


@dataclass
class Call:
    """A call. Tensors are given as Python, so that what a failure prints makes the same ones.

    Attributes:
        function: name of the public function.
        dtype: of q, k and v.
        tensors: by name, how each is made.
        arguments: the call's arguments.
        learned: names of the tensors whose gradients are asked for.
        gradient: how the gradient that comes in is made.
        elements: of the result.
        group_tokens: tokens of the longest group.
        controls: of the emulated GPU: its order, and how it rounds.
    """

    function: str
    dtype: torch.dtype
    tensors: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    learned: list[str] = field(default_factory=list)
    gradient: str = ""
    elements: int = 0
    group_tokens: int = 0
    controls: dict[str, Any] = field(default_factory=dict)

    def definition(self) -> str:
        """Python that defines ``run``, which makes the call and returns its results by name."""
        made = "\n".join(f"    {name} = {source}" for name, source in self.tensors.items())
        call = f"attend({', '.join(self.arguments)}, **given)"
        gradients = ""
        if self.learned:
            made += f"\n    grad = {self.gradient}"
            found = f"torch.autograd.grad(out, [{', '.join(self.learned)}], grad)"
            gradients = f" | dict(zip({self.learned!r}, {found}))"
        if "cls_token='per_frame'" in self.arguments:
            call = f"torch.cat({call}, 1)"
        return DEFINITION.format(function=self.function, tensors=made, call=call, gradients=gradients)

    def program(self, backend: str) -> str:
        """Python that compares a backend with the float64 reference and prints how far it is off."""
        where = "" if device_of(backend) == "cpu" else f"device={device_of(backend)!r}, "
        emulation = EMULATION.format(controls=self.controls) if _is_emulated(backend) else ""
        return self.definition() + emulation + COMPARISON.format(backend=backend, where=where)


def _is_emulated(backend: str) -> bool:
    return EMULATED and backend == "cuda"


@contextlib.contextmanager
def _on_emulated_gpu(call: Call) -> Iterator[None]:
    """Run a call under the emulator's options that were drawn, and see that blocks have run."""
    blocks = cuda_emulator.blocks_run()
    with cuda_emulator.controls(**call.controls):
        yield
    if call.elements and cuda_emulator.blocks_run() == blocks:
        raise RuntimeError("expected blocks to run on the emulated GPU, got none")


def check(call: Call) -> None:
    """Compare every backend that runs a call with the float64 reference, and that one with autograd through it."""
    names: dict[str, Any] = {}
    exec(call.definition(), names)
    run: Callable[..., Results] = names["run"]
    backend = "reference"
    try:
        found = {"reference": run(backend=backend)}
        for backend in BACKENDS:
            if backend == "reference":
                continue
            try:
                emulated = _on_emulated_gpu(call) if _is_emulated(backend) else contextlib.nullcontext()
                with seeds_from_the_host(), emulated:
                    found[backend] = on_cpu(run(device=device_of(backend), backend=backend))  # type: ignore[arg-type]
            except ValueError as error:
                if backend in NEVER_REFUSE or "cannot run this call" not in str(error):
                    raise
                continue
            out, plain = found[backend]["out"], found["reference"]["out"]
            if call.function == "temporal_shift":  # which keeps the layout of what it is given
                assert out.stride() == plain.stride(), f"strides {out.stride()}, expected {plain.stride()}"
            else:
                assert out.is_contiguous(), f"strides {out.stride()}, expected a contiguous result"
        yardstick = None if call.function == "temporal_shift" else _Yardstick(call, run, found["reference"])
        for backend, results in found.items():
            if yardstick is not None:
                yardstick.compare(results, backend)
            else:
                for name, x in results.items():
                    assert torch.equal(x, found["reference"][name]), name
    except Exception as error:
        program = textwrap.indent(call.program(backend), "    ")
        raise AssertionError(f"{backend}: {error}\n\nThis program makes the call:\n\n{program}") from error


class _RoundedAnew(TorchDispatchMode):
    """Rounds to a dtype anew: each number goes up, down or not at all, in its last place.

    What operations give is rounded. In 16 bits it is the factors of matrix products that are, inputs aside: sums are
    wider, but the processors that multiply 16 bits take the weights and their gradients in them too.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.dtype.itemsize == 2:
            if op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                args = [x if x.equal(x.to(self.dtype)) else self.rounded(x).to(self.dtype).to(x.dtype) for x in args]
            return op(*args, **(kwargs or {}))
        results = op(*args, **(kwargs or {}))
        return results if op.is_view or op._schema.is_mutable else tree_map(self.results_rounded, results)

    def results_rounded(self, x: Any) -> Any:
        return self.rounded(x) if isinstance(x, Tensor) and x.dtype == self.dtype else x

    def rounded(self, x: Tensor) -> Tensor:
        step = torch.randint(-1, 2, x.shape, generator=self.generator, dtype=x.dtype)
        return x * (1.0 + torch.finfo(self.dtype).eps * step)


class _Yardstick:
    """What is exact, and how far plain PyTorch is from that by rounding, in the call's dtypes and in float64.

    Errors in float64 are what errors in float32 are, in other digits, or what another rounding makes of the result.
    """

    def __init__(self, call: Call, run: Callable[..., Results], results: Results) -> None:
        self.call, self.run, self.results = call, run, results
        self.wide = run(all_dtypes=torch.float64, backend="reference")
        self.empty = self.wide["out"].numel() == 0
        self.exact = self.wide if self.empty else self.differentiated(torch.float64)
        self.single = run(all_dtypes=torch.float32, backend="reference")

    def compare(self, found: Results, backend: str) -> None:
        """Compare the results of a backend; those of the reference are compared in float64."""
        if self.empty:
            assert all(x.shape == self.exact[name].shape and not x.any() for name, x in found.items())
            return
        whole_rows = not keeps_lse(self.call.group_tokens, backend)
        dtype = self.call.dtype
        if backend == "reference":
            found, dtype = self.wide, torch.float64
        for roundings in (0, 5):
            try:
                expected = self.expected(found, dtype, roundings)
                assert_all_close(found, expected, self.exact, dtype, whole_rows=whole_rows)
                return
            except AssertionError:  # plain PyTorch may have been lucky
                if roundings:
                    raise

    def expected(self, found: Results, dtype: torch.dtype, roundings: int) -> Results:
        """Give the least exact of some evaluations in plain PyTorch, so many of them rounded anew."""
        for seed in range(roundings):
            again = self.differentiated(torch.float32, _RoundedAnew(torch.float32, seed))
            self.single = self.further_off(self.single, again)
        if dtype != torch.float64:
            plain = self.further_off(self.results, self.differentiated(None))
            for seed in range(roundings):
                plain = self.further_off(plain, self.differentiated(None, _RoundedAnew(dtype, seed)))
            return self.further_off(plain, self.single) if roundings else plain
        off = {name: x * 2.0**-29 for name, x in self.errors(self.single).items()}
        for seed in range(roundings):  # where float32 is lucky, float64 need not be: a weight of 1 - 1e-10 is 1 in one
            errors = self.errors(self.differentiated(torch.float64, _RoundedAnew(torch.float64, seed)))
            off = {name: torch.maximum(x, errors[name]) for name, x in off.items()}
        return {name: (x + off[name]).to(found[name].dtype) for name, x in self.exact.items()}

    def errors(self, results: Results) -> Results:
        """Give the largest error of each result."""
        return {name: (results[name].double() - x).abs().max() for name, x in self.exact.items()}

    def further_off(self, one: Results, other: Results) -> Results:
        """Give the less exact of two results, in the dtype of the first."""
        first, second = self.errors(one), self.errors(other)
        return {name: x if first[name] > second[name] else other[name].to(x.dtype) for name, x in one.items()}

    def differentiated(self, dtype: torch.dtype | None, mode: TorchDispatchMode | None = None) -> Results:
        """Evaluate plain PyTorch, and its gradients by autograd: the formulas of the op have no part in it.

        Args:
            dtype: of all tensors; None for each its own.
            mode: changes how operations round.
        """
        plain = getattr(reference, self.call.function)

        def attend(*args: Any, **options: Any) -> Any:
            learned = [x.sum() for x in tree_leaves((args, options)) if isinstance(x, Tensor) and x.requires_grad]
            nothing = 0.0 * sum(learned)  # connects what has no part in the result, such as padding that is not needed
            return tree_map(lambda x: x + nothing, plain(*args, **options))

        has_dropout = any(text.startswith("dropout_p") for text in self.call.arguments)
        with mode or contextlib.nullcontext():
            return self.run(attend=attend, all_dtypes=dtype, **({"seed": seed_of(1)} if has_dropout else {}))


# ---- How calls are drawn: what is simplest comes first, because failures shrink to it ----


class _Draft:
    """A call in the making."""

    def __init__(self, draw: st.DrawFn, function: str, dtypes: Sequence[torch.dtype]) -> None:
        self.draw = draw
        self.call = Call(function, draw(st.sampled_from(dtypes)))

    def number(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def chance(self) -> bool:
        return self.draw(st.booleans())

    def is_long(self) -> bool:
        """Draw whether groups are longer than others, and so fewer."""
        return CUDA and self.chance()

    def lengths(self, *most: int) -> list[int]:
        """Draw the lengths of axes; where one of them, drawn too, is long, the others are short."""
        if not self.is_long():
            return [self.number(1, end) for end in most]
        lengths = [self.number(1, min(end, 2)) for end in most]
        lengths[-1 - self.number(0, len(most) - 1)] = self.number(*LONG_SEQUENCE)
        return lengths

    def tensor(self, shape: Sequence[int], dtype: torch.dtype | None = None, sizes: Sequence[float] = (1.0,)) -> str:
        """Draw numbers of one of several sizes, in one of several layouts."""
        size = self.draw(st.sampled_from(sizes))
        axis = self.number(0, len(shape) - 1)
        layout = self.draw(st.sampled_from(("dense", "sliced", "swapped", "behind", "expanded")))
        held, view = list(shape), ""
        if layout == "sliced":
            held[axis] *= 2
            view = f"[{', '.join([':'] * axis + ['::2'])}]"
        elif layout == "swapped":
            held[0], held[axis] = held[axis], held[0]
            view = f".transpose(0, {axis})"
        elif layout == "behind":
            held = [math.prod(shape) + 1]
            view = f"[1:].view({tuple(shape)})"
        elif layout == "expanded":
            held[axis] = 1
            view = f".expand({tuple(shape)})"
        seed = len(self.call.tensors)
        factor = "" if size == 1.0 else f", size={size}"
        return f"draw({seed}, {dtype or self.call.dtype}, {', '.join(map(str, held))}{factor}){view}"

    def token(self, shape: Sequence[int]) -> str:
        """Draw q, k, v, or what padding holds: from tiny numbers to those with which each query sees one key."""
        return self.tensor(shape, sizes=(1.0, 1e-4, 0.01, 5.0, 8.0 if self.call.dtype == torch.float16 else 30.0))

    def score(self, shape: Sequence[int]) -> str:
        """Draw what is added to scores, in any dtype."""
        return self.tensor(shape, self.draw(st.sampled_from(DTYPES)) if self.chance() else None, (1.0, 1e-4, 20.0))

    def learn(self, name: str, source: str, gradient: bool = True) -> None:
        """Add a tensor, which may need a gradient where the backend gives one."""
        if gradient and self.chance():
            source += ".requires_grad_()"
            self.call.learned.append(name)
        self.call.tensors[name] = source

    def give(self, name: str, source: str, gradient: bool = True) -> None:
        """Add a tensor as an argument, which may need a gradient where the backend gives one."""
        self.learn(name, source, gradient)
        self.call.arguments.append(f"{name}={name}")

    def option(self, name: str, values: st.SearchStrategy[Any]) -> Any:
        """Draw an option or leave it out."""
        return self.set(name, self.draw(values)) if self.chance() else None

    def set(self, name: str, value: Any) -> Any:
        shown = "-float('inf')" if value == -math.inf else repr(value)
        self.call.arguments.append(f"{name}={shown}")
        return value

    def numbers(self, name: str, end: int, shape: Sequence[int]) -> None:
        """Add a tensor of integers."""
        source = f"pick({len(self.call.tensors)}, {end}, {', '.join(map(str, shape))})"
        self.call.tensors[name] = source + (".int()" if self.chance() else "")
        self.call.arguments.append(f"{name}={name}")

    def heads(self) -> tuple[int, int]:
        """Draw the heads and their dimension."""
        dims = st.one_of(st.integers(1, 16), st.sampled_from((24, 32, 48, 64, 96, 128)), st.integers(1, HEAD_DIM))
        return self.number(1, 3), min(self.draw(dims), HEAD_DIM)

    def qkv(self, tokens: Sequence[int], heads: int, head_dim: int) -> None:
        """Add q, k and v, packed or apart."""
        if self.chance():
            for name in "qkv":
                self.learn(name, self.token((*tokens, heads, head_dim)))
            self.call.arguments.insert(0, "(q, k, v)")
        else:
            self.learn("qkv", self.token((*tokens, 3, heads, head_dim)))
            self.call.arguments.insert(0, "qkv")

    def finished(self, out: Sequence[int], group_tokens: int = 0) -> Call:
        """Add what all functions have."""
        if self.call.function != "temporal_shift":
            self.option("scale", st.sampled_from((1.0, 0.1, -0.5, 0.0)))
            if not CUDA:
                self.option("dropout_p", st.sampled_from((0.2, 0.9)))
        if EMULATED:  # the order, and whether products and powers are as inexact as a GPU may give them
            inexact = self.chance()
            self.call.controls = {"seed": self.number(0, 31), "truncate": inexact, "approximate": inexact}
        self.call.gradient = self.tensor(out)
        self.call.elements = math.prod(out)
        self.call.group_tokens = group_tokens
        return self.call


def _window3d(draft: _Draft) -> Call:
    long = draft.is_long()
    largest = draft.draw(st.permutations(draft.draw(st.sampled_from(LONG_WINDOWS)) if long else (DEPTH, SIDE, SIDE)))
    least = [max(side - 1, 1) if long else 1 for side in largest]
    window = list(map(draft.number, least, largest))
    grid = [draft.number(first, side + 2) for first, side in zip(least, largest)]
    heads, head_dim = draft.heads()
    batch = draft.draw(st.sampled_from((1, 2, 0)))
    draft.qkv((batch, *grid), heads, head_dim)
    draft.set("window_size", tuple(window))
    shift = draft.option("shift_size", st.tuples(*(st.integers(0, extent - 1) for extent in window)))
    clip = draft.option("clip_window", st.just(False)) is None
    after = not CUDA and draft.option("padding_order", st.just("after_shift")) is not None
    padding = None
    if not CUDA and draft.chance():
        padding = draft.set("padding", tuple(map(draft.draw, map(_padding, grid, window, [clip] * 3))))
    wrap = draft.option("wrap", st.tuples(st.booleans(), st.booleans(), st.booleans()))
    windows = resolve_windows(
        grid, window, shift or (0, 0, 0), wrap or (False,) * 3, clip=clip, padding=padding, shift_first=after
    )
    if not CUDA and draft.chance():
        draft.numbers("regions", 2, windows.padded)
    draft.option("mask_value", st.sampled_from((-math.inf, -5.0, 0.0, 3.0)))
    if draft.chance():
        rows, types, dense = num_bias_rows(window), (), draft.chance()
        if dense:
            rows = draft.number(1, 9)
            draft.numbers("bias_index", rows, (windows.num_tokens, windows.num_tokens))
        else:
            draft.option("bias_index", st.just("geometric"))
        if draft.chance():
            types = (draft.number(1, 3),)
            draft.numbers("window_types", types[0], (windows.num_windows,))
        draft.give("bias_table", draft.score((*types, rows, heads)), not (CUDA and (dense or types)))
    if draft.chance():
        draft.give("pad_qkv", draft.token((3, heads, head_dim)))
    return draft.finished((batch, *grid, heads * head_dim), windows.num_tokens)


@st.composite
def _padding(draw: st.DrawFn, size: int, window: int, clip: bool) -> tuple[int, int]:
    """Tokens before and behind an axis that fill whole windows."""
    before = draw(st.integers(0, 3))
    if clip and before + size <= window:
        return before, draw(st.integers(0, window - before - size))
    return before, -(before + size) % window + window * draw(st.integers(0, 1))


def _window(draft: _Draft) -> Call:
    (tokens,) = draft.lengths(SEQUENCE)
    most = 1 if tokens > SEQUENCE else 3
    masks, types = draft.number(1, most), draft.number(1, most)
    heads, head_dim = draft.heads()
    groups = masks * types * draft.draw(st.sampled_from((1, 2, 0)))
    draft.qkv((groups, tokens), heads, head_dim)
    if draft.chance():
        typed = draft.chance()
        if typed:
            draft.numbers("window_types", 2, (types,))
        draft.give("bias", draft.score((*((2,) if typed else ()), heads, tokens, tokens)), not CUDA)
    if draft.chance():
        mask = draft.score((masks, tokens, tokens))
        hides = draft.chance()  # some rows wholly
        draft.call.tensors["mask"] = f"torch.where({mask} > 0.3, -float('inf'), 0.0)" if hides else mask
        draft.call.arguments.append("mask=mask")
    return draft.finished((groups, tokens, heads * head_dim), tokens)


def _clip(draft: _Draft, cls: bool) -> tuple[int, int, int, int, int]:
    """Add the tokens of a clip, and give the batch, frames, sites, heads and head dimension."""
    frames, sites = draft.lengths(SEQUENCE, SEQUENCE)
    heads, head_dim = draft.heads()
    batch = draft.draw(st.sampled_from((1, 2, 0)))
    draft.qkv((batch, cls + frames * sites), heads, head_dim)
    draft.set("num_frames", frames)
    draft.option("token_order", st.just("hwt"))
    return batch, frames, sites, heads, head_dim


def _temporal(draft: _Draft) -> Call:
    cls = not CUDA and draft.option("cls_query", st.just("all")) is not None
    batch, frames, sites, heads, head_dim = _clip(draft, cls)
    return draft.finished((batch, cls + frames * sites, heads * head_dim), cls + frames)


def _spatial(draft: _Draft) -> Call:
    kind = draft.draw(st.sampled_from((None, "mean", "per_frame", *(() if CUDA else ("all",)))))
    if kind is not None:
        draft.set("cls_query" if kind == "all" else "cls_token", kind)
    cls = kind is not None
    batch, frames, sites, heads, head_dim = _clip(draft, cls)
    rows = frames * sites + (frames if kind == "per_frame" else cls)
    return draft.finished((batch, rows, heads * head_dim), cls + sites)


def _factorized(draft: _Draft) -> Call:
    batch, frames, sites, heads, head_dim = _clip(draft, False)
    over_time = st.integers(0, heads)
    if heads % 2 == 0:
        draft.option("num_temporal_heads", over_time)
    else:
        draft.set("num_temporal_heads", draft.draw(over_time))
    return draft.finished((batch, frames * sites, heads * head_dim), max(frames, sites))


def _mixing(draft: _Draft) -> Call:
    frames, (tokens,) = draft.number(1, 9), draft.lengths(SEQUENCE)
    if tokens > SEQUENCE:
        frames = min(frames, 3)
    heads, head_dim = draft.heads()
    clips = draft.draw(st.sampled_from((1, 2, 0)))
    draft.qkv((clips * frames, tokens), heads, head_dim)
    draft.set("num_frames", frames)
    if draft.option("shift_div", st.integers(1, 9)) is None and draft.chance():
        draft.set("channel_shifts", draft.draw(_channel_shifts(frames, heads * head_dim)))
    return draft.finished((clips * frames, tokens, heads * head_dim), tokens)


def _shift(draft: _Draft) -> Call:
    frames = draft.number(1, 9)
    rest = [draft.number(1, 9) for _ in range(draft.number(1, 3))]
    shape = (frames * draft.draw(st.sampled_from((1, 2, 0))), *rest)
    made = draft.tensor(shape)
    if draft.call.dtype.is_floating_point:
        draft.learn("x", made)
    else:
        draft.call.tensors["x"] = made
    draft.call.arguments.append("x")
    draft.set("num_frames", frames)
    axis = draft.number(1, len(rest))
    draft.set("channel_shifts", draft.draw(_channel_shifts(frames, shape[axis])))
    draft.set("dim", axis)
    return draft.finished(shape)


@st.composite
def _channel_shifts(draw: st.DrawFn, frames: int, channels: int) -> list[tuple[int, int, int]]:
    """Ranges that do not overlap, from frames of the clip and beyond."""
    cuts = sorted(draw(st.lists(st.integers(0, channels), max_size=6)))
    offsets = st.one_of(st.integers(-frames - 1, frames + 1), st.sampled_from((2**40, -(2**62))))
    return [(first, last, draw(offsets)) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]


_MOVED = (*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64)
# By function: how a call is made, and how many of 25 calls it gets.
FUNCTIONS: dict[str, tuple[Callable[[_Draft], Call], int]] = {
    "window3d_attention": (_window3d, 8),
    "window_attention": (_window, 3),
    "temporal_attention": (_temporal, 3),
    "spatial_attention": (_spatial, 4),
    "factorized_dot_product_attention": (_factorized, 2),
    "space_time_mixing_attention": (_mixing, 3),
    "temporal_shift": (_shift, 2),
}


@st.composite
def calls(draw: st.DrawFn, function: str) -> Call:
    """Calls of a public function."""
    dtypes = _MOVED if function == "temporal_shift" else SUPPORTED["cuda"] if CUDA else DTYPES
    return FUNCTIONS[function][0](_Draft(draw, function, dtypes))
