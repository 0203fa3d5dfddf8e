"""One call that puts fastdiff's functions and methods in the place of a codebase's, wherever they are, and back."""

import gc
import importlib
import inspect
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch

_INHERITED = object()


def patch(codebase: str, seams: Mapping[str, tuple[Any, ...]]) -> Callable[[], None]:
    """Replaces functions and methods by their namesakes, and returns what puts the published ones back.

    A method is replaced in its class: for every object of it, and whoever has imported the class. A function is
    replaced in every module that has imported it; what else holds it, or was made by it, is named in a warning. What
    torch.compile has made is made anew.

    Args:
        codebase: its name, for messages.
        seams: by module, functions, and classes whose methods (without two underscores, or `__call__`) are meant.

    Raises:
        ImportError: a module is not there.
        RuntimeError: it has no such function or method, or with other arguments; nothing is replaced then.
    """
    changes: list[tuple[Any, str, Any]] = []
    late: list[str] = []
    for name, namesakes in seams.items():
        module = importlib.import_module(name)
        for ours in namesakes:
            if inspect.isclass(ours):
                changes += _methods(codebase, getattr(module, ours.__name__, None), ours)
            else:
                changes += _names(codebase, getattr(module, ours.__name__, None), ours, late)
    changes = [(owner, name, ours) for owner, name, ours in changes if vars(owner).get(name) is not ours]
    before = [(owner, name, vars(owner).get(name, _INHERITED)) for owner, name, _ in changes]
    _set(changes)
    if late:
        kept = ", ".join(late)
        warnings.warn(f"{codebase}: too late for these, which keep the published functions: {kept}", stacklevel=3)

    def undo() -> None:
        _set(before)
        before.clear()

    return undo


def around(module: str, name: str, **methods: Callable[[Any], Callable[..., Any]]) -> type:
    """A namesake of a class, for `patch`: each of its methods is made of the published one, which it calls."""
    owner = getattr(importlib.import_module(module), name, None)
    made: dict[str, Any] = {}
    for method, make in methods.items():
        made[method] = published = getattr(owner, method, None)
        if getattr(published, "made_by", None) is not make:  # a second time it would be around ours
            made[method] = make(published)
            made[method].made_by = make
    return type(name, (), made)


@contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """With another value of an attribute, which is False where there is none: a loss that normalises by itself spares
    the network its tail, and nobody else is given what comes before that."""
    before = getattr(owner, name, False)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _methods(codebase: str, published: Any, ours: type) -> list[tuple[Any, str, Any]]:
    """Where what is to be put: the class, the method's name, our method."""
    functions = filter(inspect.isfunction, vars(ours).values())
    methods = [m for m in functions if m.__name__ == "__call__" or not m.__name__.startswith("__")]
    for method in methods:
        _check(codebase, getattr(published, method.__name__, None), method)
    return [(published, method.__name__, method) for method in methods]


def _names(codebase: str, published: Any, ours: Callable[..., Any], late: list[str]) -> list[tuple[Any, str, Any]]:
    """The same for a function: all modules that have it, by any name. Added to late: who else does."""
    if published is ours:
        return []
    _check(codebase, published, ours)
    modules = {id(vars(module)): module for module in list(sys.modules.values()) if hasattr(module, "__dict__")}
    constants = published.__code__.co_consts
    places = []
    for one in gc.get_referrers(published, *(code for code in constants if isinstance(code, CodeType))):
        if id(one) in modules:
            places += [(modules[id(one)], name, ours) for name in _at(one, published)]
        elif one is not constants and not inspect.isframe(one):
            late.append(getattr(one, "__qualname__", reprlib.repr(one)))
    return places


def _at(space: dict[str, Any], value: Any) -> list[str]:
    return [name for name, other in space.items() if other is value]


def _check(codebase: str, published: Any, ours: Callable[..., Any]) -> None:
    """Versions may lack our last arguments, where these have defaults."""
    given = [*inspect.signature(published).parameters] if callable(published) else []
    expected = inspect.signature(ours)
    last = [*expected.parameters.values()][len(given) :]
    if given != [*expected.parameters][: len(given)] or any(p.default is p.empty for p in last):
        raise RuntimeError(f"{codebase}: expected {ours.__qualname__}{expected}, not found in this version")


def _set(values: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in values:
        if value is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
