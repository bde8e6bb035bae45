"""The architecture: which room may import which, no circle, and how large a part may grow."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "moe_jax"

# From the roof down: a room (a folder or a file of the package) imports only from itself, from its
# neighbours in a line and from lines below. "" is the package's own __init__.py.
ROOMS = (
    ("__main__",),
    ("commands",),
    ("train", "sweep", "adviser", "experiments"),
    ("report",),
    ("dryrun", "benchmark", "conformance"),
    ("init",),
    ("cards", "stores"),
    ("training",),
    ("evaluation",),
    ("analysis",),
    ("config",),
    ("hf",),
    ("upcycle",),
    ("data",),
    ("model",),
    ("ops",),
    ("parallel",),
    ("tree", "strict_json", "files", "untrusted", "spelling", "command_line", ""),
    ("stopping",),
)
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 80
LONGER_FUNCTIONS = {("train.py", "run"): 150}  # the program, on one page


def read_imports(package: pathlib.Path) -> dict[str, set[str]]:
    """For each module of the package, "ops.permute", those of the package that it imports.

    Imports inside functions count; those under `if TYPE_CHECKING` do not.
    """
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in files.items():
        found = _imports(ast.parse(path.read_text(encoding="utf-8")))
        parts = (full.split(".") for full in found)
        inside = {".".join(rest) for first, *rest in parts if first == package.name}
        graph[name] = {n if n in files else n.rpartition(".")[0] for n in inside}
    return graph


def _imports(node: ast.AST):
    """Full names; the last part may be something inside a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for child in node.orelse:
            yield from _imports(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)


def faults(graph: dict[str, set[str]], rooms=ROOMS) -> list[str]:
    """Modules of no room, imports upward, and one circle of modules, in words."""
    level = {room: number for number, line in enumerate(rooms) for room in line}
    known = {name for name in graph if name.split(".")[0] in level}
    found = [f"{name} is in no room of the table" for name in sorted(graph.keys() - known)]
    for name in sorted(known):
        for other in sorted(graph[name] & known):
            if level[other.split(".")[0]] < level[name.split(".")[0]]:
                found.append(f"{name} imports {other}, which is above it")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("circle: " + " <- ".join(error.args[1]))
    return found


@pytest.fixture(scope="module")
def graph():
    return read_imports(PACKAGE)


def test_rooms_import_from_below_only_and_in_no_circle(graph):
    assert faults(graph) == []


def test_the_table_has_no_room_that_is_not_there(graph):
    there = {name.split(".")[0] for name in graph}
    assert {room for line in ROOMS for room in line} <= there


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("ops.permute", "model.moe"),  # reversed
        ("parallel.mesh", "ops.attention"),  # reversed
        ("upcycle.plan", "commands.upcycle"),  # from the ground to the roof
        ("tree", "parallel.sharding"),  # from a file to a room
    ],
)
def test_an_import_upward_is_found(graph, name, other):
    changed = {**graph, name: graph[name] | {other}}
    assert f"{name} imports {other}, which is above it" in faults(changed)


@pytest.mark.parametrize(
    "names",
    [
        ("ops.attention", "ops.bins"),  # in one room
        ("dryrun.hlo", "benchmark.rows"),  # between neighbours
    ],
)
def test_a_circle_is_found_where_no_import_goes_upward(graph, names):
    a, b = names
    changed = {**graph, a: graph[a] | {b}, b: graph[b] | {a}}
    [found] = faults(changed)
    assert found.startswith("circle: ") and a in found and b in found


def test_a_module_of_no_room_is_found(graph):
    assert faults({**graph, "utils": set()}) == ["utils is in no room of the table"]


def test_imports_are_read_wherever_they_stand(tmp_path):
    package = tmp_path / "moe_jax"
    (package / "ops").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "ops" / "__init__.py").write_text("from moe_jax.ops.a import f\n")
    (package / "ops" / "a.py").write_text(
        "import typing\n"
        "from moe_jax import tree as t, ops\n"
        "if typing.TYPE_CHECKING:\n    from moe_jax import model\n"
        "def f():\n    from moe_jax.tree import flatten\n    import moe_jax\n"
    )
    for name in ("tree", "model"):
        (package / f"{name}.py").touch()
    graph = read_imports(package)
    assert graph["ops"] == {"ops.a"}
    assert graph["ops.a"] == {"tree", "ops", ""}
    [found] = faults(graph)
    assert found.startswith("circle: ops")


def test_no_file_and_no_function_is_long():
    long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        if len(text.splitlines()) > MOST_LINES_OF_A_FILE:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                most = LONGER_FUNCTIONS.get((name, node.name), MOST_LINES_OF_A_FUNCTION)
                if node.end_lineno - node.lineno + 1 > most:
                    long.append(f"{name} {node.name}")
    assert long == []


def test_scripts_only_launch_commands():
    scripts = {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")}
    assert scripts == {
        name: "from moe_jax import __main__ as entry\n\n"
        f'if __name__ == "__main__":\n    entry.run("{name}")\n'
        for name in (path.stem for path in (PACKAGE / "commands").glob("[!_]*.py"))
    }
