"""What a model of another library must hold once it is accelerated; the tests of all integrations run it.

A test file lists its ``TARGETS`` and lets a class inherit from ``Integration``::

    @pytest.mark.parametrize("target", TARGETS, ids=str)
    class TestTargets(Integration):
        pass
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as compiled
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import vidattn
from vidattn.backends import tensor_leaves
from vidattn.integrations._fingerprint import fingerprint, resolve

# Two correct float32 runs differ by a few units in the last place, more where sums are long; float64 shows a mistake.
OUTPUT = {torch.float32: 2e-5, torch.float64: 1e-10}
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-10}
# A float32 result further off than that may still be as near to the float64 run as the original's, times this.
AS_NEAR = 4.0
SEED = 5


class Target(NamedTuple):
    """A model of another library, shrunken.

    Attributes:
        library: who has it, as the documentation shall name it.
        model: the model, as the documentation shall name it.
        build: makes it, with the weights of its own constructor.
        inputs: makes keyword arguments of a call.
        attention: names of the classes that attend: each instance is covered by a swapped module.
        integration: file in ``vidattn/integrations``.
        stand_in: whether the code is ours, written after that of a repository which is no package.
        dtypes: in which the original computes as it says: one that casts to float32 inside has no float64.
        trains: whether it is also run in training mode.
        compiles: whether ``torch.compile`` takes the original whole, as one graph.
    """

    library: str
    model: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attention: tuple[str, ...]
    integration: str
    stand_in: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    trains: bool = True
    compiles: bool = True

    def __str__(self) -> str:
        return f"{self.library}-{self.model}".replace(" ", "_")

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build the model with weights that matter, in eval mode."""
        torch.manual_seed(0)
        return spread(self.build()).to(dtype).eval()

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Make the arguments of a call, each floating tensor a leaf."""
        torch.manual_seed(1)
        return tree_map(lambda x: _leaf(x, dtype), self.inputs())


def spread(model: nn.Module) -> nn.Module:
    """Give parameters random values with which attention is neither uniform nor saturated."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "bias_table" in name or "position_bias" in name or "specific_bias" in name:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * 1.2 * parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model


def admit(model: nn.Module, integration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code of a stand-in count as tested, in one test."""
    file = importlib.import_module(f"vidattn.integrations.{integration}")
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        rows = [row for row in file.COUNTERPARTS if row.name in names and row.resembles(module)]
        for row in [*rows, *(part for part in getattr(file, "PARTS", ()) if part.name in names)]:
            watched = resolve(type(module), row.name, row.code)
            if watched is not None:
                found = fingerprint(watched)
                assert found is not None
                monkeypatch.setitem(row.tested, found, "a stand-in")


class Ops(TorchDispatchMode):
    """Counts the ops of this library, and the backends they name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.backends: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "vidattn" and not name.startswith("_"):
            self.calls[name] += 1
            self.backends |= {args[-1]} if args and isinstance(args[-1], str) else set()
        return func(*args, **(kwargs or {}))

    @property
    def forward(self) -> int:
        return sum(count for name, count in self.calls.items() if not name.endswith("_backward"))


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    ops: Ops


def run(
    model: Any, arguments: dict[str, Any], *, grad: bool = True, autocast: bool = False, counted: bool = True
) -> Results:
    """Call a model, its random numbers from one seed; with gradients of all inputs and parameters.

    Where ops are counted, ``torch.compile`` stands aside.
    """
    model.zero_grad(set_to_none=True)
    leaves = [leaf for leaf in tensor_leaves(arguments) if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(SEED)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    ops = Ops()
    with ops if counted else nullcontext(), torch.set_grad_enabled(grad):
        with cast:
            outputs = [leaf for leaf in tensor_leaves(model(**arguments)) if leaf.is_floating_point()]
        if grad:
            given = [out for out in outputs if out.requires_grad]
            torch.autograd.backward(given, [_weights(out) for out in given])
    gradients = {f"input {index}": leaf.grad for index, leaf in enumerate(leaves)} if grad else {}
    gradients |= {name: row.grad for name, row in model.named_parameters()} if grad else {}
    return Results([out.detach() for out in outputs], gradients, ops)


def assert_as_before(after: Results, before: Results, exact: Results | None) -> None:
    """Compare two runs of one dtype: outputs and every gradient, each by its largest value."""
    assert len(after.outputs) == len(before.outputs)
    dtype = before.outputs[0].dtype
    for index, (got, want) in enumerate(zip(after.outputs, before.outputs, strict=True)):
        true = None if exact is None else exact.outputs[index]
        _assert_near(f"output {index}", got, want, true, OUTPUT[dtype], 0.0)
    assert after.gradients.keys() == before.gradients.keys()
    largest = max((_size(row) for row in before.gradients.values() if row is not None), default=0.0)
    for name, old in before.gradients.items():
        new = after.gradients[name]
        assert (new is None) == (old is None), f"the gradient of {name} is {'missing' if new is None else 'new'}"
        if new is None or old is None:
            continue
        true = None if exact is None else exact.gradients[name]
        # A gradient that is zero but for rounding is measured by the others.
        _assert_near(name, new, old, true, GRADIENT[dtype], largest * GRADIENT[dtype] / 10)


def _assert_near(name: str, got: Tensor, want: Tensor, true: Tensor | None, tolerance: float, floor: float) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, name
    error, allowed = _size(got.double() - want.double()), max(tolerance * _size(want), floor)
    if true is not None and not error <= allowed:
        error, allowed = _size(got.double() - true), max(allowed, AS_NEAR * _size(want.double() - true))
    assert error <= allowed, f"{name}: off by {error:.2e}, allowed {allowed:.2e}"  # a NaN compares false


def _size(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)


def _leaf(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_()


def rms_error(one: list[Tensor], exact: list[Tensor]) -> float:
    """Tell the error of all outputs together, as a share."""
    error = sum((x.double() - true.double()).pow(2).sum().item() for x, true in zip(one, exact, strict=True))
    return (error / sum(true.double().pow(2).sum().item() for true in exact)) ** 0.5


class Integration:
    """The tests of a target; ``target`` comes from the class that inherits them."""

    @pytest.fixture(autouse=True)
    def _as_a_user_has_it(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        previous = vidattn.current_backend()
        vidattn.set_backend("auto")
        if target.stand_in:
            admit(target.make(), target.integration, monkeypatch)
        yield
        vidattn.set_backend(previous)

    def test_all_attention_runs_through_the_ops(self, target: Target) -> None:
        model, arguments = target.make(), target.arguments()
        ran: Counter[str] = Counter()
        counted = copy.deepcopy(model)
        attention = {name for name, row in counted.named_modules() if type(row).__name__ in target.attention}
        assert attention
        for name in attention:
            counted.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.update([name]))
        before = run(counted, arguments, grad=False)
        assert before.ops.forward == 0
        report = vidattn.accelerate(model)
        swapped = {row.name for row in report.swapped}
        for name in attention:
            parents = {name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)} | {name, ""}
            inside = any(other.startswith(f"{name}.") for other in swapped)
            assert inside or parents & swapped, f"{name} is left: {report}"
        after = run(model, arguments, grad=False)
        assert_as_before(after, before, None if target.dtypes[0] != torch.float64 else _exact(target, grad=False))
        assert after.ops.forward >= sum(ran.values()) > 0
        assert "reference" not in after.ops.backends or vidattn.why_not("window_attention", backend="cpu")

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_outputs_and_gradients(self, target: Target, training: bool) -> None:
        exact = None
        for dtype in target.dtypes if target.trains or not training else ():
            model, arguments = target.make(dtype).train(training), target.arguments(dtype)
            before = run(copy.deepcopy(model), arguments)
            vidattn.accelerate(model)
            after = run(model, arguments)
            assert any(name.endswith("_backward") for name in after.ops.calls)
            assert_as_before(after, before, exact)
            exact = before if dtype == torch.float64 else exact

    def test_autocast(self, target: Target) -> None:
        model, arguments = target.make(), target.arguments()
        exact = run(model, arguments, grad=False)
        before = run(model, arguments, autocast=True)
        vidattn.accelerate(model)
        after = run(model, arguments, autocast=True)
        assert after.ops.forward > 0
        assert [out.dtype for out in after.outputs] == [out.dtype for out in before.outputs]
        error, plain = (rms_error(result.outputs, exact.outputs) for result in (after, before))
        assert error <= 2 * plain + 1e-4
        given = {name for name, row in before.gradients.items() if row is not None}
        assert given == {name for name, row in after.gradients.items() if row is not None}

    def test_nothing_else_changes_and_all_can_be_undone(self, target: Target) -> None:
        model, arguments = target.make(), target.arguments()
        classes = {name: type(row) for name, row in model.named_modules()}
        state = list(model.state_dict())
        parameters = list(model.parameters())
        before = run(model, arguments, grad=False).outputs
        report = vidattn.accelerate(model)
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        assert list(model.state_dict()) == state
        after = run(model, arguments, grad=False)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            again = run(other, arguments, grad=False)
            assert again.ops.calls == after.ops.calls
            assert all(map(torch.equal, again.outputs, after.outputs))
        assert not vidattn.accelerate(model).swapped
        fresh = target.make()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        report.revert()
        assert {name: type(row) for name, row in model.named_modules()} == classes
        for other in (model, fresh):
            again = run(other, arguments, grad=False)
            assert again.ops.forward == 0 and all(map(torch.equal, again.outputs, before))

    def test_compiles(self, target: Target) -> None:
        if not target.compiles:
            return
        torch._dynamo.reset()
        compiled.clear()
        model, arguments = target.make(), target.arguments()
        before = run(model, arguments)
        vidattn.accelerate(model)
        after = run(torch.compile(model, backend="aot_eager"), arguments, counted=False)
        assert compiled["stats"]["unique_graphs"] > 0
        gradients = {name.removeprefix("_orig_mod."): row for name, row in after.gradients.items()}
        assert_as_before(after._replace(gradients=gradients), before, None)

    def test_other_code_stays_as_it_is(self, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
        """A method that somebody changes, before or after: the result is that of the changed code."""
        model, arguments = target.make(), target.arguments()
        report = vidattn.accelerate(model)
        report.revert()
        methods = {
            (row.namespace, row.name): row.function
            for swapped in report.swapped
            for row in swapped.twin._watched  # type: ignore[attr-defined]
            if row.namespace is swapped.original
        }
        for (kind, name), method in methods.items():
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, _changed(method))
                with vidattn.accelerate(model) as other:
                    assert not [row for row in other.swapped if row.original is kind], name
        accelerated = vidattn.accelerate(model)
        with monkeypatch.context() as patch:
            for (kind, name), method in methods.items():
                patch.setattr(kind, name, _changed(method))
            after = run(model, arguments, grad=False)
            accelerated.revert()
            before = run(model, arguments, grad=False)
            assert all(map(torch.equal, after.outputs, before.outputs)) and after.ops.forward == 0

    def test_methods_put_on_instances_count(self, target: Target) -> None:
        model, plain = target.make(), target.make()
        arguments = target.arguments()
        for swapped in vidattn.accelerate(model).swapped:
            for module in (model.get_submodule(swapped.name), plain.get_submodule(swapped.name)):
                for row in swapped.twin._watched:
                    if row.namespace is swapped.original and row.name != "forward":
                        setattr(module, row.name, MethodType(_changed(row.function), module))
        assert_as_before(run(model, arguments, grad=False), run(plain, arguments, grad=False), None)

    def test_an_unknown_fingerprint_stays_original(self, target: Target, no_version_tested: None) -> None:
        model = target.make()
        report = vidattn.accelerate(model)
        assert not report.swapped
        assert report.skipped and all("untested version" in row.reason for row in report.skipped)
        arguments = target.inputs()
        if len(target.dtypes) == 2:
            admitted = vidattn.accelerate(model, verify=arguments, verify_gradients=True, accept_untested=True)
            assert admitted.swapped and admitted.max_difference is not None

    @pytest.fixture
    def no_version_tested(self, target: Target) -> Iterator[None]:
        """Forget the fingerprints of an integration; afterwards they are there again in their order."""
        rows = importlib.import_module(f"vidattn.integrations.{target.integration}").COUNTERPARTS
        known = [(row.tested, dict(row.tested)) for row in rows]
        for tested, _ in known:
            tested.clear()
        yield
        for tested, before in known:
            tested.clear()
            tested.update(before)


def _exact(target: Target, *, grad: bool) -> Results:
    return run(target.make(torch.float64), target.arguments(torch.float64), grad=grad)


def _changed(function: Any) -> Any:
    """Wrap a function in code of another fingerprint that doubles what it gives."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda x: 2 * x if isinstance(x, Tensor) else x, function(*args, **kwargs))

    return changed


def is_here(package: str) -> bool:
    """Whether a package is installed, without importing it."""
    return importlib.util.find_spec(package) is not None
