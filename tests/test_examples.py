"""The docstrings: their examples run, and they say what the signatures and the code say."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import polysrl_dc

PACKAGE = Path(polysrl_dc.__file__).parent
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FILES = {
    prefix + path.stem: path.read_text()
    for folder, prefix in [(PACKAGE, "polysrl_dc."), (BENCHMARKS, "")]
    for path in sorted(folder.glob("[a-z]*.py"))
}
EXPORTED = [getattr(polysrl_dc, name) for name in polysrl_dc.__all__]
PUBLIC = [found for found in EXPORTED if inspect.isclass(found) or inspect.isfunction(found)]


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if ">>> " in text])
def test_the_examples_run(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


def sections(found):
    """Title of each section of a docstring -> the names that it lists."""
    text = inspect.cleandoc(found.__doc__ or "")
    parts = re.split(r"^(\w[\w ]*)\n-{3,}$", text, flags=re.MULTILINE)
    listed = {}
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        heads = re.findall(r"^\S.*?(?= : |$)", body, flags=re.MULTILINE)
        listed[title] = [name for head in heads for name in head.split(", ")]
    return listed


def parameters(found):
    """As a docstring lists them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    every = inspect.signature(found).parameters.values()
    return [stars.get(one.kind, "") + one.name for one in every if one.name != "self"]


def methods(kind):
    """Public ones that this project has written, also those that the class inherits."""
    for name, found in inspect.getmembers(kind, inspect.isroutine):
        if not name.startswith("_") and "polysrl_dc" in str(getattr(found, "__module__", "")):
            yield name, found


def raised(found):
    """Names of the exceptions that a function or method raises itself."""
    source = ast.parse(textwrap.dedent(inspect.getsource(found)))
    nodes = [node for node in ast.walk(source) if isinstance(node, ast.Raise)]
    return {ast.unparse(node.exc.func) for node in nodes if isinstance(node.exc, ast.Call)}


@pytest.mark.parametrize("name", FILES)
def test_listed_parameters_are_those_of_the_signature(name):
    for public, found in inspect.getmembers(importlib.import_module(name), callable):
        if getattr(found, "__module__", "") != name:
            continue
        inside = list(vars(found)) if inspect.isclass(found) else []
        for one in [found, *(getattr(found, method) for method in inside)]:
            listed = sections(one).get("Parameters") if callable(one) else None
            assert listed is None or listed == parameters(one), (public, one)


@pytest.mark.parametrize("found", PUBLIC, ids=lambda found: found.__name__)
def test_what_users_call_says_what_it_takes_gives_and_raises(found):
    assert ">>> " in found.__doc__
    maker = vars(found).get("__post_init__" if is_dataclass(found) else "__init__")
    assert not maker or all(error in found.__doc__ for error in raised(maker))
    bases = [base for base in getattr(found, "__mro__", []) if "polysrl_dc" not in base.__module__]
    for name, one in methods(found) if inspect.isclass(found) else [(found.__name__, found)]:
        told, text = sections(one), inspect.cleandoc(one.__doc__ or "")
        assert text and all(error in text for error in raised(one)), name
        brief = "\n" not in text and (
            len(parameters(one)) < 2 or any(hasattr(base, name) for base in bases)
        )
        if not brief:  # else a line says it all, or DeepChem the rest
            assert told.get("Parameters", []) == parameters(one), name
            gives = inspect.signature(one).return_annotation
            assert gives in (None, "None") or "Returns" in told, name
