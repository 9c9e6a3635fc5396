"""What each part may import and do: the rules that keep the parts apart and the code safe."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpus import ROOT

PARTS = (
    *("cli", "compiler", "contract", "measure", "modelfile", "passes", "runtime", "telemetry"),
)
SOURCES = tuple(sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py")))
COMMAND_LINE = {
    f"p2bw.{path.stem}" for path in (ROOT / "cli").glob("*.py") if path.stem != "__init__"
}
every_source = pytest.mark.parametrize(
    "source", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def imports(source: Path) -> Iterator[str]:
    """Dotted names of what a file imports anywhere; `from a import b` may be a or a.b."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_from(source: Path, *packages: str) -> list[str]:
    return [
        name
        for name in imports(source)
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    ]


def sources_of(part: str) -> list[Path]:
    return [source for source in SOURCES if source.is_relative_to(ROOT / part)]


STANDALONE = [
    s for part in ("contract", "modelfile", "runtime", "telemetry") for s in sources_of(part)
]


def test_the_runtime_stands_alone() -> None:
    heavy = ("ortools", "networkx", "pydantic", "typer", "rich")
    for source in STANDALONE:
        assert not imported_from(source, "p2bw.compiler", "p2bw.passes", *heavy), source


def test_the_passes_do_not_know_who_runs_them() -> None:
    for source in sources_of("passes"):
        assert not imported_from(source, "p2bw.compiler.driver"), source


@pytest.mark.parametrize("part", PARTS[1:])
def test_nothing_imports_the_command_line(part: str) -> None:
    for source in sources_of(part):
        assert not imported_from(source, *COMMAND_LINE), source


def test_the_solver_is_imported_by_programs_and_minimum_cuts_alone() -> None:
    files = {source.name for source in SOURCES if imported_from(source, "ortools")}
    programs = {"program.py", "sums.py", "cpsat.py", "additive_cpsat.py", "positions.py"}
    assert files <= programs | {"stop.py"}


@every_source
def test_no_code_is_run_that_came_as_data(source: Path) -> None:
    assert not imported_from(source, "pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml")
    forbidden = {
        *("eval", "exec", "torch.load", "torch.save", "os.system", "os.popen"),
        # These pickle what they send.
        *("dist.broadcast_object_list", "dist.send_object_list", "dist.recv_object_list"),
        *("dist.all_gather_object", "dist.gather_object", "dist.scatter_object_list"),
    }
    if source == ROOT / "modelfile" / "load.py":
        forbidden.remove("exec")  # the model file itself: code that the user asks us to run
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).replace("torch.distributed.", "dist.")
            assert called not in forbidden, f"{source}:{node.lineno}"
            for keyword in node.keywords:
                shell = keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
                assert not shell, f"{source}:{node.lineno}"


def test_no_file_names_a_place_on_one_machine_or_is_unfinished() -> None:
    texts = [
        *SOURCES,
        *(ROOT / "examples").glob("*.py"),
        *(ROOT / "tests" / "goldens").rglob("*.*"),
        *ROOT.glob("*.md"),
        ROOT / "pyproject.toml",
        ROOT / ".ci" / "run",
    ]
    place = re.compile(r"(?<![\w.~])/(home|root|Users|tmp|work|mnt|scratch)\b")
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not place.search(line), f"{path}:{number}"
            assert not unfinished.search(line), f"{path}:{number}"


def test_the_runtime_needs_no_solver_and_no_command_line() -> None:
    """Imports every module of the runtime where those packages can't be imported."""
    modules = [
        ".".join(("p2bw", *source.relative_to(ROOT).with_suffix("").parts))
        for source in STANDALONE
        if source.stem not in ("__init__", "__main__")
    ]
    code = f"""
import sys
for name in ("ortools", "networkx", "pydantic", "typer", "rich", "p2bw.compiler", "p2bw.passes"):
    sys.modules[name] = None  # importing it raises ImportError
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
