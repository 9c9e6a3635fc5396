"""Goldens: files, mostly under tests/goldens, that `pytest --update-goldens` rewrites."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from corpus import CORPUS

if TYPE_CHECKING:
    from p2bw.compiler.driver import Compiled

ARCHITECTURES = {architecture.name: architecture for architecture in CORPUS}
GOLDENS = Path(__file__).parent / "goldens"

# Child processes of the tests (torchrun's ranks) share two cores with everything else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("COLUMNS", None)  # tables are as wide as they need, whatever the terminal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens", action="store_true", help="rewrite what tests compare with"
    )


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the ranks have: with more, kernels may add in another order."""
    from p2bw.measure.device import using_threads

    with using_threads(1):
        yield


@pytest.fixture
def the_same(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """the_same(path, text): equal to the file, or a readable diff."""
    update = request.config.getoption("--update-goldens")

    def compare(path: Path, text: str) -> None:
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no {path}: run `pytest --update-goldens` and read what it writes")
        want = path.read_text(encoding="utf-8")
        if want != text:
            lines = difflib.unified_diff(
                want.splitlines(), text.splitlines(), path.name, "now", lineterm="", n=2
            )
            diff = "\n".join(list(lines)[:120])
            pytest.fail(f"{path} changed (`pytest --update-goldens` accepts):\n{diff}", False)

    return compare


@pytest.fixture
def golden(the_same: Callable[[Path, str], None]) -> Callable[[str, str], None]:
    """golden("gpt/plan.json", text): equal to the golden file, or a readable diff."""
    return lambda name, text: the_same(GOLDENS / name, text)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Compiled]:
    """compiled("resnet", 2): an example's tiny size in so many stages, compiled once a session."""
    made: dict[tuple[str, int], Compiled] = {}

    def get(name: str, depth: int) -> Compiled:
        if (name, depth) not in made:
            from p2bw.compiler.driver import compile_model

            architecture = ARCHITECTURES[name]
            made[name, depth] = compile_model(
                architecture.path,
                factory=architecture.factory,
                cluster="p3.16xlarge",
                gpus=depth,
                depth=depth,
                microbatch=architecture.batch,
                out=tmp_path_factory.mktemp(name) / f"{name}_{depth}",
            )
        return made[name, depth]

    return get
