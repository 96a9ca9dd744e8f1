"""The house rules of DESIGN.md and STYLE.md, read from the source of every module in ntkdask/.

Imports go down the floors; each foreign library has its one door; files and functions stay short; what is public is
documented; nothing prints or pickles.
"""

import ast
import fnmatch
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ntkdask"

GROUND = {
    "errors",
    "files",
    "lazy",
    "registry",
    "arrays",
    "seeds",
    "cache",
    "threads",
    "compiled",
    "wording",
    "store",
    "states",
}
FLOORS = (
    "ground",
    "planning",
    "activations",
    "networks",
    "preprocessing",
    "solvers",
    "modules",
    "kernels",
    "features",
    "datasets",
    "execution",
    "matrices",
    "workflows",
    "jobs",
    "estimators",
    "report",
    "cli",
    "ntkdask",
)
"""From the ground up: a floor is a folder of the package; the ground is its files."""

DOORS = {
    "cupy": {"arrays"},
    "cupy_backends": {"arrays"},
    "zarr": {"store"},
    "torch": {"modules.*"},
    "safetensors": {"modules.*"},
    "pickle": {"datasets.cifar_python"},
}
"""Libraries that only these modules import."""

SCHEDULING_FLOOR = FLOORS.index("execution")
SCHEDULING_EXCEPTIONS = {
    # module, imported, whether at the top of the module: why
    ("arrays", "dask.system", True): "CPU_COUNT reads a container's quota; the module pulls in nothing else of dask",
    ("datasets.dataset", "dask.array", False): "Dataset gives lazy dask arrays when asked to, and only then",
}

MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80


@dataclass(frozen=True)
class Import:
    """`module` imports `target`, at the top of the file or inside a function."""

    module: str
    target: str
    line: int
    at_top: bool


def dotted(path):
    """`ntkdask/kernels/base.py` → `kernels.base`, `ntkdask/__init__.py` → `ntkdask`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts) or "ntkdask"


PATHS = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module):
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def internal(name):
    """The module of this package that `ntkdask.x.y` names; None for a name inside one."""
    name = name.removeprefix("ntkdask.")
    return name if name in PATHS else None


def imports_of(module):
    """Every import of a module, wherever it stands; `from p import m` counts as p.m where that is a module."""
    tree, found = tree_of(module), []
    at_top = set(ast.walk(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            at_top -= set(ast.walk(node)) - {node}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = internal(inner) or node.module == "dask"
                targets.append(inner if is_module else node.module)
        found += [Import(module, target, node.lineno, node in at_top) for target in targets]
    return found


def own_imports(module):
    """(Import, module of this package) pairs."""
    for item in imports_of(module):
        if item.target.split(".")[0] == "ntkdask":
            target = internal(item.target)
            assert target, f"{module}:{item.line} imports {item.target}, which is no module"
            yield item, target


def floor_of(module):
    head = module.split(".")[0]
    if head in ("ntkdask", "__main__"):
        return FLOORS.index("ntkdask")
    assert head in GROUND or head in FLOORS, (
        f"{module} stands on no floor: put it in a folder of FLOORS, or on the GROUND"
    )
    return 0 if head in GROUND else FLOORS.index(head)


every_module = pytest.mark.parametrize("module", PATHS)


def test_the_walk_sees_the_package():
    assert {"ntkdask", "errors", "kernels", "kernels.neural", "jobs.run"} <= set(PATHS)
    assert {t for _, t in own_imports("kernels.neural")} >= {"arrays", "networks", "kernels.base"}
    assert any(not item.at_top and item.target == "cupy" for item in imports_of("arrays"))


@every_module
def test_imports_go_down(module):
    floor = floor_of(module)
    up = [f"line {i.line}: {t} (floor {floor_of(t)})" for i, t in own_imports(module) if floor_of(t) > floor]
    assert not up, f"{module} (floor {floor}) imports from above: {up}"


def test_no_cycles():
    """Among all imports, those inside functions included; a package's face imports its rooms, not the other way round."""
    graph = {module: {t for _, t in own_imports(module)} - {module} for module in PATHS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' ← '.join(error.args[1])}")


@every_module
def test_foreign_libraries_have_one_door(module):
    wrong = [
        f"line {i.line}: {i.target}"
        for i in imports_of(module)
        if (root := i.target.split(".")[0]) in DOORS and not any(fnmatch.fnmatchcase(module, d) for d in DOORS[root])
    ]
    assert not wrong, f"{module} imports what only {DOORS} may: {wrong}"


def scheduling_imports(module):
    return {
        (module, i.target, i.at_top)
        for i in imports_of(module)
        if i.target.split(".")[0] in ("dask", "distributed", "dask_cuda")
    }


@every_module
def test_numerics_and_storage_do_not_schedule(module):
    if floor_of(module) < SCHEDULING_FLOOR:
        assert scheduling_imports(module) <= set(SCHEDULING_EXCEPTIONS)


def test_exceptions_are_still_needed():
    found = set().union(*(scheduling_imports(module) for module in PATHS))
    assert set(SCHEDULING_EXCEPTIONS) <= found
    for library, modules in DOORS.items():
        for module in modules - {"store", "arrays", "modules.*"}:
            assert library in {i.target for i in imports_of(module)}, f"{module} no longer imports {library}"


@every_module
def test_nothing_prints(module):
    calls = [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [n.lineno for n in calls if n.func.id in ("print", "breakpoint", "exec", "eval")]


@every_module
def test_nothing_asserts_on_input(module):
    """An assert disappears under -O; only what narrows a type for the checker may stay, and it says nothing to a user."""

    def narrows(test):
        return ast.unparse(test).startswith("isinstance(") or ast.unparse(test).endswith(" is not None")

    asserts = [n for n in ast.walk(tree_of(module)) if isinstance(n, ast.Assert)]
    assert not [n.lineno for n in asserts if n.msg or not narrows(n.test)]


def public_definitions(module):
    """(name, node) of the public functions and classes of a module and the public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree_of(module).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                members = (m for m in node.body if isinstance(m, kinds) and not m.name.startswith("_"))
                yield from ((f"{node.name}.{m.name}", m) for m in members)


@every_module
def test_what_is_public_is_documented(module):
    assert ast.get_docstring(tree_of(module)), f"{module} has no docstring"
    assert not [name for name, node in public_definitions(module) if not ast.get_docstring(node)]


@every_module
def test_files_and_functions_are_short(module):
    lines = len(PATHS[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{PATHS[module]} has {lines} lines"
    functions = (n for n in ast.walk(tree_of(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno - n.lineno + 1 > MAX_FUNCTION_LINES}
    assert not long


@every_module
def test_random_numbers_come_from_seeds(module):
    if module == "seeds":
        return
    calls = [ast.unparse(n) for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute)]
    assert not [c for c in calls if c.startswith(("np.random.", "numpy.random.", "xp.random.", "random."))]
    assert "random" not in {i.target for i in imports_of(module)}
