"""How seams are put in and taken out: everywhere at once, all or nothing, and not in silence where it is too late."""

import importlib
import inspect
import sys
import warnings
from types import FunctionType, ModuleType

import pytest
import torch

from fastdiff.integrations.patching import around, patch, setting

CODEBASES = ("bd3lm", "dllm", "duo", "flow_matching", "llada", "mdlm", "nemo", "radd", "sedd")
BODY = """
class Loss:
    def value(self, x):
        return x + 1

    def __call__(self, x):
        return x + 4

class Derived(Loss):
    pass

def make(scale, order=None):
    def loss(x):
        return scale * x
    return loss
"""


class Loss:
    def value(self, x, more=0):
        return x + 2


class Derived:
    def value(self, x):
        return x + 3


def make(scale, order=None):
    return lambda x: -scale * x


@pytest.fixture
def code(monkeypatch):
    """A module `code`, and a module that has imported all of it by name."""
    module, script = ModuleType("code_of_others"), ModuleType("script_of_others")
    exec(BODY, vars(module))
    for one in (module, script):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    exec("from code_of_others import Loss, make as made_by", vars(script))
    return module, script


def test_methods_and_functions_are_replaced_wherever_they_were_imported(code):
    module, script = code
    loss = script.Loss()
    undo = patch("Code", {"code_of_others": (Loss, make)})
    assert loss.value(1) == module.Derived().value(1) == 3
    assert isinstance(loss, script.Loss)
    assert script.made_by(2)(3) == module.make(2)(3) == -6
    undo()
    undo()  # once more does nothing
    assert loss.value(1) == 2
    assert script.made_by(2)(3) == module.make(2)(3) == 6


def test_an_inherited_method_is_replaced_in_the_class_alone(code):
    module, _ = code
    undo = patch("Code", {"code_of_others": (Derived,)})
    assert (module.Derived().value(1), module.Loss().value(1)) == (4, 2)
    undo()
    assert "value" not in vars(module.Derived)


def test_twice_is_once(code):
    undo, again = (patch("Code", {"code_of_others": (Loss, make)}) for _ in range(2))
    undo()
    again()
    assert code[1].Loss().value(1) == 2
    assert code[1].made_by(2)(3) == 6


def doubled(published):
    def __call__(self, x):
        return 2 * published(self, x)

    return __call__


def doubled_with_more(published):
    def value(self, x, *, scale):
        return scale * published(self, x)

    return value


def test_a_method_around_the_published_one_is_put_there_once(code):
    loss = code[1].Loss()
    undo, again = (
        patch("Code", {"code_of_others": (around("code_of_others", "Loss", __call__=doubled),)}) for _ in range(2)
    )
    assert (loss(1), loss.value(1)) == (10, 2)
    undo()
    again()
    assert loss(1) == 5


def test_a_method_around_one_that_is_not_there(code):
    for name, method in (("Loss", {"value": doubled_with_more}), ("Missing", {"__call__": doubled})):
        with pytest.raises(RuntimeError, match="Code: expected doubled"):
            patch("Code", {"code_of_others": (around("code_of_others", name, **method),)})
    assert code[0].Loss().value(1) == 2


def test_says_who_keeps_the_published_function(code):
    held = {"before": code[1].made_by}
    made = code[0].make(2)
    with pytest.warns(UserWarning, match=r"Code: too late for these.*make\.<locals>\.loss") as caught:
        undo = patch("Code", {"code_of_others": (make,)})
    assert "before" in str(caught[0].message)
    undo()
    del made
    held.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch("Code", {"code_of_others": (make,)})()


def test_what_was_compiled_is_compiled_anew(code):
    loss = code[0].Loss()
    compiled = torch.compile(lambda x: loss.value(x), backend="eager")
    assert compiled(torch.tensor(1)) == 2
    undo = patch("Code", {"code_of_others": (Loss,)})
    assert compiled(torch.tensor(1)) == 3
    undo()
    assert compiled(torch.tensor(1)) == 2


def test_all_or_nothing(code):
    def make(scale, size):
        """Other arguments."""

    class Missing:
        def value(self, x):
            """A class that is not there."""

    for wrong, name in ((make, r"make\(scale, size\)"), (Missing, r"Missing\.value\(self, x\)")):
        with pytest.raises(RuntimeError, match=f"Code: expected .*{name}, not found in this version"):
            patch("Code", {"code_of_others": (Loss, wrong)})
        assert code[0].Loss().value(1) == 2
    with pytest.raises(ImportError, match="nowhere"):
        patch("Code", {"code_of_others": (Loss,), "nowhere": (make,)})
    assert code[0].Loss().value(1) == 2


def test_a_setting_ends_with_its_block():
    owner = torch.nn.Module()
    owner.scales = True

    def fail() -> None:
        assert (owner.scales, owner.gives_logits) == (False, True)
        raise KeyError

    with pytest.raises(KeyError), setting(owner, "scales", False), setting(owner, "gives_logits", True):
        fail()
    assert (owner.scales, owner.gives_logits) == (True, False)


@pytest.mark.parametrize("name", CODEBASES)
def test_each_codebase_has_what_is_replaced_and_has_it_back(name, applied):
    """With the arguments that it has there, or the call would say so."""
    standin, seam = (importlib.import_module(f"{package}.{name}") for package in ("standins", "fastdiff.integrations"))

    def functions():
        owners = [*standin.PUBLISHED.values()]
        owners += [one for module in owners for one in vars(module).values() if inspect.isclass(one)]
        found = [(o, n, f) for o in owners for n, f in vars(o).items() if isinstance(f, FunctionType)]
        return {(o, n): (id(f), f.__module__) for o, n, f in found}  # who holds a function would be told it is late

    before = functions()
    undo = applied(standin, getattr(seam, f"apply_to_{name}"))
    assert any(module.startswith("fastdiff.") for _, module in set(functions().values()) - set(before.values()))
    undo()
    assert functions() == before
