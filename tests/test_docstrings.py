"""Docstrings in the NumPy style: every parameter of what is public, and of everything that takes many, has a line of its own.

Ruff's D rules (convention "numpy") look at the form. Here: of the public names, whose editors and reference pages show an argument a
line, all parameters are named and say something; of any other function or dataclass those with MANY parameters.
"""

import ast
import importlib
import inspect
import re
from functools import cache

import pytest
from numpydoc.docscrape import NumpyDocString
from test_floors import PATHS, tree_of

PUBLIC = ("", "activations", "networks", "kernels", "features", "modules", "preprocessing", "datasets", "estimators")
"""Packages whose `__all__` is what users import."""
MANY = 6


@cache
def public_names():
    """(module, name) of the functions and classes that `PUBLIC` packages export, where they are defined."""
    found = set()
    for package in PUBLIC:
        home = importlib.import_module(f"ntkdask.{package}".rstrip("."))
        for name in home.__all__:
            thing = getattr(home, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found.add((thing.__module__.removeprefix("ntkdask.").removesuffix("ntkdask"), thing.__qualname__))
    return found


def parameters(node):
    """Names that a call of a function, or of a class, takes."""
    if isinstance(node, ast.ClassDef):
        made = next((m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
        if made is not None:
            return parameters(made)
        fields = [m for m in node.body if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name)]
        taken = [
            m for m in fields if "ClassVar" not in ast.unparse(m.annotation) and "init=False" not in ast.unparse(m)
        ]
        return [m.target.id for m in taken if not m.target.id.startswith("_")]
    a = node.args
    named = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [n for n in named if n not in ("self", "cls") and not n.startswith("_")]


def definitions(module):
    """(qualified name, node) of the public functions, classes and methods of a module."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in tree_of(module).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                members = [m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
                yield from ((f"{node.name}.{m.name}", m) for m in members)


def is_command(node):
    """Whether Typer makes a command of a function; it shows the docstring as help, and beside each parameter a text of its own."""
    made = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
    return any(d.startswith(("app.command(", "data_app.command(")) for d in made)


def helpless(module):
    """{command: parameters without a help text} of a module."""
    texts = {
        node.targets[0].id: node.value
        for node in tree_of(module).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    wrong = {}
    for name, node in definitions(module):
        if is_command(node):
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            types = {a.arg: texts.get(getattr(a.annotation, "id", None), a.annotation) for a in taken}
            missing = [arg for arg, kind in types.items() if not _has_help(kind)]
            if missing:
                wrong[name] = missing
    return wrong


def _has_help(annotation):
    """Whether an annotation is `Annotated[..., typer.Option(..., help="...")]` with a text that is not empty."""
    keywords = [k for node in ast.walk(annotation) if isinstance(node, ast.Call) for k in node.keywords]
    return any(k.arg == "help" and isinstance(k.value, ast.Constant) and k.value.value for k in keywords)


def undocumented(module):
    """{name: parameters without a line} of a module; a section that names a parameter that is not there counts, too."""
    wrong = {}
    for name, node in definitions(module):
        taken = parameters(node)
        owner = (module, name) in public_names()
        if not taken or not (owner or len(taken) >= MANY) or is_command(node):
            continue
        if isinstance(node, ast.FunctionDef) and any("overload" in ast.unparse(d) for d in node.decorator_list):
            continue
        sections = NumpyDocString(inspect.cleandoc(ast.get_docstring(node) or ""))
        lines = {n.strip().lstrip("*"): p.desc for p in sections["Parameters"] for n in p.name.split(",")}
        missing = [p for p in taken if not any(lines.get(p, []))]
        invented = [p for p in lines if p not in taken]
        if missing or invented:
            wrong[name] = missing + [f"{p}, which it does not take" for p in invented]
    return wrong


@pytest.mark.parametrize("module", PATHS)
def test_every_parameter_has_a_line(module):
    assert not undocumented(module)


def test_every_parameter_of_a_command_has_a_help_text():
    commands = [name for name, node in definitions("cli.commands") if is_command(node)]
    assert {"plan", "run", "data_import"} <= set(commands)
    assert not helpless("cli.commands")


def test_the_public_names_are_seen():
    assert {
        ("kernels.neural", "NTK"),
        ("networks.presets", "myrtle"),
        ("estimators.ridge", "RidgeClassifier"),
    } <= public_names()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_section_begins_on_a_line_of_its_own(path):
    """A heading that ran into its text ("Notes ----- With ...") is no section for editors and reference pages."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            assert not re.search(r"\w -{4,}", ast.get_docstring(node) or ""), getattr(node, "name", path)
