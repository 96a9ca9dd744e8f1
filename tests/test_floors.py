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
    "array_layout",
    "receipts",
    "arrays",
    "seeds",
    "cache",
    "threads",
    "compiled",
    "lapack",
    "wording",
    "store",
    "layout",
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
    "zarr": {"store", "layout"},
    "torch": {"modules.*"},
    "safetensors": {"modules.*"},
    "pickle": set(),
}
"""Libraries that only these modules import."""

SCHEDULING_FLOOR = FLOORS.index("execution")
SCHEDULING_EXCEPTIONS = {
    # module, imported, whether at the top of the module: why
    ("arrays", "dask.system", True): "CPU_COUNT reads a container's quota; the module pulls in nothing else of dask",
    ("datasets.dataset", "dask.array", False): "Dataset gives lazy dask arrays when asked to, and only then",
}

MAX_FOLDER_FILES = 20
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
"""Of code: the docstring does not count."""


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


@cache
def nodes_of(module):
    """Every node of a module's source, and whether it stands at the top: outside functions."""
    found = []

    def walk(node, at_top):
        found.append((node, at_top))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            walk(child, at_top and not inside)

    walk(tree_of(module), True)
    return found


def nodes(module, *kinds):
    return [node for node, _ in nodes_of(module) if isinstance(node, kinds)]


def internal(name):
    """The module of this package that `ntkdask.x.y` names; None for a name inside one."""
    name = name.removeprefix("ntkdask.")
    return name if name in PATHS else None


@cache
def imports_of(module):
    """Every import of a module, wherever it stands; `from p import m` counts as p.m where that is a module."""
    found = []
    for node, at_top in nodes_of(module):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = internal(inner) or node.module == "dask"
                targets.append(inner if is_module else node.module)
        found += [Import(module, target, node.lineno, at_top) for target in targets]
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


def broken(rule):
    """{module: what `rule(module)` finds wrong}, of the modules where it finds something."""
    return {module: wrong for module in PATHS if (wrong := rule(module))}


def test_the_walk_sees_the_package():
    assert {"ntkdask", "errors", "kernels", "kernels.neural", "jobs.run"} <= set(PATHS)
    assert {t for _, t in own_imports("kernels.neural")} >= {"arrays", "networks", "kernels.base"}
    assert any(not item.at_top and item.target == "cupy" for item in imports_of("arrays"))


# --- the layout -----------------------------------------------------------------------------------------------------


def test_the_ground_is_the_files_of_the_root():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files == GROUND | {"__init__", "__main__"}


def test_every_floor_is_a_folder():
    folders = {module.split(".")[0] for module in PATHS} - GROUND - {"__main__", "ntkdask"}
    assert folders == set(FLOORS) - {"ground", "ntkdask"}


def test_folders_are_small():
    folders = [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir() and p.name != "__pycache__")]
    files = {str(folder.relative_to(PACKAGE)): sum(p.is_file() for p in folder.iterdir()) for folder in folders}
    assert not {folder: count for folder, count in files.items() if count > MAX_FOLDER_FILES}


def test_files_are_short():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in PATHS.items()}
    assert not {module: count for module, count in lines.items() if count > MAX_FILE_LINES}


def code_lines(function):
    """Lines of a function from `def` on, its docstring left out."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)


def test_functions_are_short():
    def long(module):
        lines = {f.name: code_lines(f) for f in nodes(module, ast.FunctionDef, ast.AsyncFunctionDef)}
        return {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}

    assert not broken(long)


# --- imports --------------------------------------------------------------------------------------------------------


def test_imports_go_down():
    def up(module):
        floor = floor_of(module)
        return [f"line {i.line}: {t} (floor {floor_of(t)})" for i, t in own_imports(module) if floor_of(t) > floor]

    assert not broken(up)


def test_no_cycles():
    """Among all imports, those inside functions included; a package's face imports its rooms, not the other way round."""
    graph = {module: {t for _, t in own_imports(module)} - {module} for module in PATHS}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' ← '.join(error.args[1])}")


def test_foreign_libraries_have_one_door():
    def wrong(module):
        return [
            f"line {i.line}: {i.target}"
            for i in imports_of(module)
            if (root := i.target.split(".")[0]) in DOORS
            and not any(fnmatch.fnmatchcase(module, door) for door in DOORS[root])
        ]

    assert not broken(wrong)


def test_linear_algebra_lets_go_of_the_interpreter_lock():
    """SciPy's LAPACK wrappers hold it for a whole call: a worker is silent that long. `threads` loads the library, to count it."""
    allowed = {"lapack", "threads"}
    users = {module for module in PATHS for i in imports_of(module) if i.target.startswith("scipy.linalg")}
    assert users == allowed


def scheduling_imports(module):
    return {
        (module, i.target, i.at_top)
        for i in imports_of(module)
        if i.target.split(".")[0] in ("dask", "distributed", "dask_cuda")
    }


def test_numerics_and_storage_do_not_schedule():
    def wrong(module):
        return floor_of(module) < SCHEDULING_FLOOR and scheduling_imports(module) - set(SCHEDULING_EXCEPTIONS)

    assert not broken(wrong)


def test_exceptions_are_still_needed():
    found = set().union(*(scheduling_imports(module) for module in PATHS))
    assert set(SCHEDULING_EXCEPTIONS) <= found
    for library, modules in DOORS.items():
        for module in modules - {"store", "arrays", "modules.*"}:
            assert library in {i.target for i in imports_of(module)}, f"{module} no longer imports {library}"


# --- what no module does --------------------------------------------------------------------------------------------


def test_nothing_prints():
    def wrong(module):
        calls = [n for n in nodes(module, ast.Call) if isinstance(n.func, ast.Name)]
        return [f"line {n.lineno}" for n in calls if n.func.id in ("print", "breakpoint", "exec", "eval")]

    assert not broken(wrong)


def test_nothing_asserts_on_input():
    """An assert disappears under -O; only what narrows a type for the checker may stay, and it says nothing to a user."""

    def narrows(test):
        return ast.unparse(test).startswith("isinstance(") or ast.unparse(test).endswith(" is not None")

    def wrong(module):
        return [f"line {n.lineno}" for n in nodes(module, ast.Assert) if n.msg or not narrows(n.test)]

    assert not broken(wrong)


def test_random_numbers_come_from_seeds():
    def wrong(module):
        if module == "seeds":
            return []
        attributes = [ast.unparse(n) for n in nodes(module, ast.Attribute)]
        used = [a for a in attributes if a.startswith(("np.random.", "numpy.random.", "xp.random.", "random."))]
        return used + [i.target for i in imports_of(module) if i.target == "random"]

    assert not broken(wrong)


def test_kernels_are_asked_for_what_their_protocol_promises():
    """Outside `kernels/`, nobody looks with getattr for what a kernel may or may not have."""

    def wrong(module):
        if module.split(".")[0] == "kernels":
            return []
        calls = [n for n in nodes(module, ast.Call) if ast.unparse(n.func) in ("getattr", "hasattr") and n.args]
        return [f"line {n.lineno}: {ast.unparse(n)}" for n in calls if "kernel" in ast.unparse(n.args[0]).lower()]

    assert not broken(wrong)


# --- documentation --------------------------------------------------------------------------------------------------


def public_definitions(module):
    """(name, node) of the public functions and classes of a module and the public methods of its public classes."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree_of(module).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                members = (m for m in node.body if isinstance(m, kinds) and not m.name.startswith("_"))
                yield from ((f"{node.name}.{m.name}", m) for m in members)


def test_what_is_public_is_documented():
    def wrong(module):
        names = [] if ast.get_docstring(tree_of(module)) else ["the module"]
        return names + [name for name, node in public_definitions(module) if not ast.get_docstring(node)]

    assert not broken(wrong)
