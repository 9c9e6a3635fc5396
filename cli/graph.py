"""A drawing as Mermaid or DOT text.

Names of modules and tensors are foreign: they stand in quotes and escaped, and the identifiers are
our own.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2bw.compiler.drawing import Drawing

_PLAIN = frozenset(" _.,:=()[]/+-")
_DOT_CODES = {"\\": "\\\\", '"': '\\"', "&": "&amp;"}
_STRANGE = "\N{REPLACEMENT CHARACTER}"


def mermaid(drawing: "Drawing") -> str:
    """A Mermaid flowchart."""
    return "\n".join(_mermaid(drawing)) + "\n"


def _mermaid(drawing: "Drawing") -> Iterator[str]:
    yield "flowchart TB"
    for k, cluster in enumerate(drawing.clusters):
        yield f"  subgraph s{k}[{_mermaid_text(cluster.title)}]"
        for node in cluster.nodes:
            label = _mermaid_text([node.label])
            yield f"    {node.key}" + (f"[{label}]" if node.kind == "module" else f"([{label}])")
        yield "  end"
    for line in drawing.lines:
        arrow = {"flow": "-->", "cut": "==>", "tied": "-.-"}[line.kind]
        label = f"|{_mermaid_text(line.label)}|" if line.label else ""
        yield f"  {line.source} {arrow}{label} {line.target}"


def _mermaid_text(lines: Iterable[str]) -> str:
    """Quoted; whatever could mean something to Mermaid, HTML or Markdown is an entity code."""

    def code(character: str) -> str:
        if character.isalnum() or character in _PLAIN:
            return character
        return f"#{ord(character)};" if character.isprintable() else _STRANGE

    return '"' + "<br/>".join("".join(map(code, line)) for line in lines) + '"'


def dot(drawing: "Drawing") -> str:
    """A DOT digraph, for Graphviz."""
    return "\n".join(_dot(drawing)) + "\n"


def _dot(drawing: "Drawing") -> Iterator[str]:
    yield f"digraph {_dot_text([drawing.name])} {{"
    yield '  node [shape=box, fontname="sans-serif"];'
    yield '  edge [fontname="sans-serif", fontsize=10];'
    for k, cluster in enumerate(drawing.clusters):
        yield f"  subgraph cluster_{k} {{"
        yield f"    label={_dot_text(cluster.title)};"
        for node in cluster.nodes:
            shape = "" if node.kind == "module" else ", shape=oval"
            yield f"    {node.key} [label={_dot_text([node.label])}{shape}];"
        yield "  }"
    styles = {"flow": [], "cut": ["penwidth=2"], "tied": ["style=dashed", "dir=none"]}
    for line in drawing.lines:
        attributes = [
            *styles[line.kind],
            *([f"label={_dot_text(line.label)}"] if line.label else []),
        ]
        shown = f" [{', '.join(attributes)}]" if attributes else ""
        yield f"  {line.source} -> {line.target}{shown};"
    yield "}"


def _dot_text(lines: Iterable[str]) -> str:
    """Quoted; what could end the quotes, or be an escape (\\N) or an entity (&lt;), is escaped."""

    def code(character: str) -> str:
        known = _DOT_CODES.get(character)
        return known or (character if character.isprintable() else _STRANGE)

    return '"' + "\\n".join("".join(map(code, line)) for line in lines) + '"'


LANGUAGES: dict[str, Callable[["Drawing"], str]] = {"mermaid": mermaid, "dot": dot}
