"""How models of other libraries are recognised, and what ``verify`` says of a wrong twin."""

from __future__ import annotations

import linecache
import pickle
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from integration_cases import assert_as_before, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vidattn
from tests import compatibility
from vidattn import integrations, twins
from vidattn.integrations import Counterpart
from vidattn.integrations._fingerprint import fingerprint, resolve

SOURCE = """
import torch
from torch import nn

def double(x):
    return 2 * x

class Doubling(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size))

    def forward(self, x):
        return double(x) * self.weight
"""
CODE = ("Doubling.forward", "double")


def load(source: str, monkeypatch: pytest.MonkeyPatch, name: str = "a_copy") -> Any:
    """Import a module whose source is not on the disk."""
    module = types.ModuleType(name)
    file = f"<{name}-{hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, file, "exec"), module.__dict__)
    return module


class Twofold(twins.Twin):
    """A twin of doublings that adds instead."""

    ops = ("window_attention",)

    def forward(self: Any, x: Tensor) -> Tensor:
        return (x + x) * self.weight if self.is_intact() else self.replaced.forward(self, x)


class Wrong(Twofold):
    """One that is wrong where the weight is large, in the gradient of the weight alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return (x + x) * self.weight.detach() + 0 * self.weight


def known(
    module: Any, monkeypatch: pytest.MonkeyPatch, twin: type[twins.Twin] = Twofold, **options: Any
) -> Counterpart:
    """Make the class of a module known to ``accelerate``."""
    watched = resolve(module.Doubling, "Doubling", CODE)
    assert watched is not None
    found = fingerprint(watched)
    assert found is not None
    row = Counterpart("Doubling", None, twin, CODE, {found: "1.0"}, **options)
    monkeypatch.setattr(integrations, "_all", lambda: (row,))
    monkeypatch.setattr(integrations, "_by_name", lambda: {"Doubling": (row,)})
    return row


def of(source: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    watched = resolve(load(source, monkeypatch).Doubling, "Doubling", CODE)
    return None if watched is None else fingerprint(watched)


def test_a_fingerprint_is_of_what_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    first = of(SOURCE, monkeypatch)
    assert first is not None and len(first) == 16
    same = SOURCE.replace("def forward(self, x):", 'def forward(self, x: "Tensor") -> "Tensor":\n        """Say."""')
    same = same.replace("return 2 * x", "# what it is called for\n    return (2\n        * x)")
    assert same != SOURCE and of(same, monkeypatch) == first
    for old, new in (("2 * x", "3 * x"), ("2 * x", "x * 2"), ("double(x) * self", "double(x) / self")):
        assert old in SOURCE and of(SOURCE.replace(old, new), monkeypatch) not in (first, None)
    assert of(SOURCE.replace("def double", "def treble").replace("double(x)", "treble(x)"), monkeypatch) is None


def test_a_copy_is_recognised_and_a_change_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    row = known(load(SOURCE, monkeypatch), monkeypatch)
    copied = load(SOURCE, monkeypatch, "somewhere_else").Doubling
    model, x = nn.Sequential(copied(3), copied(3)), torch.randn(2, 3)
    before = model(x)
    report = vidattn.accelerate(model)
    assert [swapped.name for swapped in report.swapped] == ["0", "1"]
    assert isinstance(model[0], Twofold) and type(model[0]) is type(model[1]) and model[0].replaced is copied
    torch.testing.assert_close(model(x), before)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(model[0]) and torch.equal(again(x), before)
    report.revert()
    assert type(model[0]) is copied
    changed = load(SOURCE.replace("2 * x", "3 * x"), monkeypatch, "changed").Doubling(3)
    (skipped,) = vidattn.accelerate(changed).skipped
    assert skipped.reason.startswith("untested version: its code has the fingerprint ")
    assert skipped.reason.endswith("; tested: 1.0") and row.tested


def test_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that changes nothing of what the twin does is the same; one that overrides it is another class."""
    known(load(SOURCE, monkeypatch), monkeypatch)
    more = (
        SOURCE
        + """
class Named(Doubling):
    def __init__(self, size, name):
        super().__init__(size)
        self.name = name

class Trebling(Doubling):
    def forward(self, x):
        return 3 * x
"""
    )
    copy = load(more, monkeypatch)
    assert vidattn.accelerate(nn.Sequential(copy.Named(3, "one"))).swapped
    report = vidattn.accelerate(nn.Sequential(copy.Trebling(3)))
    assert not report.swapped and "untested version" in report.skipped[0].reason


def test_a_function_that_is_replaced_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = load(SOURCE, monkeypatch)
    known(copy, monkeypatch)
    model, x = nn.Sequential(copy.Doubling(3)), torch.randn(2, 3)
    vidattn.accelerate(model)
    before = model(x)
    copy.double = lambda x: 3 * x
    torch.testing.assert_close(model(x), 1.5 * before)


def test_parts_decide_where_a_name_says_little(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = load(SOURCE, monkeypatch)
    known(copy, monkeypatch, resembles=lambda module: module.weight.shape == (3,))
    assert vidattn.accelerate(nn.Sequential(copy.Doubling(3))).swapped
    report = vidattn.accelerate(nn.Sequential(copy.Doubling(4)))
    assert not report.swapped and not report.skipped


def test_source_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = load(SOURCE, monkeypatch)
    known(copy, monkeypatch)
    unread: dict[str, Any] = {"__name__": "unread"}
    exec(compile(SOURCE, "<nowhere>", "exec"), unread)
    report = vidattn.accelerate(nn.Sequential(unread["Doubling"](3)))
    assert [row.reason for row in report.skipped] == ["untested version: its source cannot be read"]


def test_untested_code_needs_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    known(load(SOURCE, monkeypatch), monkeypatch)
    same = load(SOURCE.replace("2 * x", "x * 2"), monkeypatch, "same").Doubling
    other = load(SOURCE.replace("2 * x", "3 * x"), monkeypatch, "other").Doubling
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="accept_untested: expected a batch as verify with it, got none"):
        vidattn.accelerate(same(3), accept_untested=True)
    assert vidattn.accelerate(same(3), verify=x, accept_untested=True).swapped
    assert not vidattn.accelerate(same(3), verify=x).swapped
    model = nn.Sequential(same(3), other(3))
    with pytest.raises(RuntimeError, match=r"expected output 0 within .* furthest off is 1, alone"):
        vidattn.accelerate(model, verify=x, accept_untested=True)
    assert [type(module) for module in model] == [same, other]


def test_gradients_are_compared_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = load(SOURCE, monkeypatch)
    known(copy, monkeypatch, Wrong)
    x = torch.randn(2, 3)
    vidattn.accelerate(copy.Doubling(3), verify=x)
    with pytest.raises(RuntimeError, match="expected the gradient of weight within"):
        vidattn.accelerate(copy.Doubling(3), verify=x, verify_gradients=True)
    with pytest.raises(ValueError, match="verify_gradients: expected a batch as verify with it, got none"):
        vidattn.accelerate(copy.Doubling(3), verify_gradients=True)


def test_gradients_of_checkpointed_models_are_compared_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing too; gradients that were there stay."""
    copy = load(SOURCE, monkeypatch)
    known(copy, monkeypatch)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.Doubling(3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    model = Checkpointed()
    model.inner.weight.grad = torch.ones(3)
    assert vidattn.accelerate(model, verify=torch.randn(2, 3), verify_gradients=True).swapped
    assert model.inner.weight.grad is not None and model.inner.weight.grad.sum() == 3


def test_no_library_is_imported() -> None:
    """Looking through a model imports none of those that integrations are about."""
    script = (
        "import sys, torch, vidattn; from torch import nn\n"
        "vidattn.accelerate(nn.Sequential(nn.Linear(2, 2)))\n"
        "names = ('torchvision', 'transformers', 'monai', 'timm', 'diffusers', 'einops')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_entry_is_well_formed() -> None:
    rows = integrations._all()
    assert rows
    for row in rows:
        assert row.tested and all(len(mark) == 16 and version for mark, version in row.tested.items()), row.name
        assert row.code[0].startswith(f"{row.name}."), row.name
        assert (row.twin.__bases__[-1] is not nn.Module and row.twin.ops) or row.twin.level != "attention", row.name


def test_the_table_of_the_documentation_is_current() -> None:
    page = compatibility.PAGE.read_text(encoding="utf-8")
    assert compatibility.updated(page) == page, "python -m tests.compatibility writes it anew"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "transformers", "monai"])
def test_inductor(library: str) -> None:
    """The first model of a library that compiles, forward and backward."""
    target = next(row for row in compatibility.targets() if row.library == library and row.compiles)
    torch._dynamo.reset()
    model, arguments = target.make(), target.arguments()
    before = run(model, arguments)
    assert vidattn.accelerate(model).swapped
    after = run(torch.compile(model), arguments, counted=False)
    gradients = {name.removeprefix("_orig_mod."): row for name, row in after.gradients.items()}
    assert_as_before(after._replace(gradients=gradients), before, None)
