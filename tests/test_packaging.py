"""What is installed, and whether the README and the project file still tell the truth."""

import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
import typer
from corpus import ROOT
from test_imports import SOURCES, imports

import p2bw
from p2bw.__main__ import app
from p2bw.compiler.topology import make_topology

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements}


def packages_on_disk() -> Iterator[str]:
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        for source in (ROOT / folder).rglob("*.py"):
            inner = source.parent.relative_to(ROOT / folder).parts
            yield ".".join((package, *inner))


def test_every_folder_with_code_is_a_listed_package() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(set(packages_on_disk()))


def test_an_install_claims_one_name() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in listed} == {"p2bw"}


def test_every_package_has_an_init_file() -> None:
    for folder in {source.parent for source in SOURCES}:
        assert (folder / "__init__.py").is_file(), folder


def test_what_is_imported_is_declared() -> None:
    declared = requirement_names(PROJECT["project"]["dependencies"])
    extra = requirement_names(PROJECT["project"]["optional-dependencies"]["onnx"])
    for source in SOURCES:
        imported = {name.partition(".")[0] for name in imports(source)}
        reads_onnx = source.is_relative_to(ROOT / "compiler" / "onnx")
        allowed = declared | extra | {"onnxruntime"} if reads_onnx else declared  # if it is there
        assert imported - sys.stdlib_module_names - {"p2bw"} <= allowed, source


def test_the_version_has_one_source_and_the_changelog_is_open() -> None:
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "p2bw.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", p2bw.__version__)
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["compile", "test"])
def test_the_readme_marks_the_commands_that_ci_runs(name: str) -> None:
    (command,) = re.findall(rf"<!-- ci: {name} -->\n```sh\n(.*)\n```\n", README)
    assert command.startswith("test -d .venv || python3 -m venv .venv; .venv/bin/pip install ")


def test_the_readme_s_command_table_is_the_command_line() -> None:
    listed = re.findall(r"^\| `p2bw (\w+)", README, re.MULTILINE)
    assert sorted(listed) == sorted(typer.main.get_command(app).commands)


def test_the_readme_names_only_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands.values()
    options = set(chain.from_iterable(p.opts for command in commands for p in command.params))
    inside_code = chain(
        re.findall(r"```sh\n(.*?)```", README, re.DOTALL), re.findall(r"`([^`\n]+)`", README)
    )
    for snippet in inside_code:
        if "pip" not in snippet and "pytest" not in snippet:
            assert set(re.findall(r"(?<!\S)--[a-z-]+", snippet)) <= {"--help", *options}, snippet


def test_the_devices_and_clusters_that_the_documents_name_exist() -> None:
    texts = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("examples/*.py"))]
    for text in texts:
        for option, value in re.findall(r"--(device|cluster) ([\w.:-]+)", text):
            make_topology(**{option: value})


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_ci_can_be_run() -> None:
    script = Path(ROOT / ".ci" / "run")
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
