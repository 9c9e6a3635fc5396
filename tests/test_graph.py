"""show --graph: read back by small parsers of both languages, whatever the names are."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placement import chain
from typer.testing import CliRunner

from p2bw.__main__ import app
from p2bw.compiler.drawing import Cluster, Drawing, Line, Node, draw
from p2bw.compiler.driver import Compiled, compile_model
from p2bw.compiler.plan import read_plan
from p2bw.compiler.problem import PROBLEM, TensorCost, problem_of
from p2bw.contract.errors import InputFileError, MismatchError
from p2bw.graph import dot, mermaid

Compile = Callable[[str, int], Compiled]
Golden = Callable[[str, str], None]


def drawn(made: Compiled) -> Drawing:
    return draw(read_plan(made.artifact), problem_of(made.artifact))


# What Mermaid's own grammar takes for these statements: https://mermaid.js.org/syntax/flowchart.html
TEXT = r'"([^"\n]*)"'
STATEMENTS = {
    "begin": re.compile(rf"  subgraph s(\d+)\[{TEXT}\]"),
    "module": re.compile(rf"    (s\d+n\d+)\[{TEXT}\]"),
    "port": re.compile(rf"    (s\d+n\d+)\(\[{TEXT}\]\)"),
    "end": re.compile(r"  end"),
    "line": re.compile(rf"  (s\d+n\d+) (-->|==>|-\.-)(?:\|{TEXT}\|)? (s\d+n\d+)"),
}
KINDS = {"-->": "flow", "==>": "cut", "-.-": "tied"}


def mermaid_text(text: str) -> tuple[str, ...]:
    def decoded(part: str) -> str:
        rest = re.sub(r"#(\d+);", "", part)
        assert not set(rest) & set("#;<>&`\"'*\\"), part
        return re.sub(r"#(\d+);", lambda code: chr(int(code[1])), part)

    return tuple(map(decoded, text.split("<br/>")))


def read_mermaid(text: str, name: str) -> Drawing:
    first, *rest = text.split("\n")
    assert first == "flowchart TB"
    assert rest.pop() == ""
    clusters: list[Cluster] = []
    lines: list[Line] = []
    inside = False
    for row in rest:
        ((kind, found),) = ((k, m) for k, s in STATEMENTS.items() if (m := s.fullmatch(row)))
        assert inside == (kind in ("module", "port", "end"))
        match kind:
            case "begin":
                assert int(found[1]) == len(clusters)
                clusters.append(Cluster(mermaid_text(found[2]), ()))
                inside = True
            case "end":
                inside = False
            case "module" | "port":
                (label,) = mermaid_text(found[2])
                own = (*clusters[-1].nodes, Node(found[1], label, kind))
                clusters[-1] = replace(clusters[-1], nodes=own)
            case _:
                label = mermaid_text(found[3]) if found[3] is not None else ()
                lines.append(Line(found[1], found[4], KINDS[found[2]], label))
    return Drawing(name, tuple(clusters), tuple(lines))


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """Of the DOT language: https://graphviz.org/doc/info/lang.html."""
    kinds = re.compile(
        r'(?P<string>"(?:[^"\\]|\\.)*")|(?P<id>[A-Za-z_][A-Za-z_0-9]*|\d+)|(?P<sign>->|[][{}=;,])'
        r"|(?P<space>\s+)",
        re.DOTALL,
    )
    place = 0
    while place < len(text):
        found = kinds.match(text, place)
        assert found is not None, text[place : place + 40]
        place = found.end()
        if found.lastgroup != "space":
            yield found.lastgroup or "", found[0]


def dot_text(token: str) -> tuple[str, ...]:
    """The lines of a label, in Graphviz's order: quotes, then entities, then escapes."""
    text = html.unescape(re.sub(r"(\\\\)|\\\"", lambda m: m[1] or '"', token[1:-1]))
    lines = [""]
    for part in re.findall(r"\\.|[^\\]", text):
        assert part[0] != "\\" or part in ("\\\\", "\\n"), part
        if part == "\\n":
            lines.append("")
        else:
            lines[-1] += part[-1]
    return tuple(lines)


class DotReader:
    """digraph ID { (node|edge) [..]; subgraph ID { label=..; ID [..]; } ID -> ID [..]; }"""

    def __init__(self, text: str) -> None:
        self.tokens = list(tokens(text))

    def take(self, *wanted: str) -> str:
        kind, token = self.tokens.pop(0)
        assert not wanted or token in wanted or kind in wanted, (token, wanted)
        return token

    def attributes(self) -> dict[str, str]:
        found = {}
        if self.tokens[0][1] == "[":
            self.take("[")
            while True:
                name = self.take("id")
                self.take("=")
                found[name] = self.take("id", "string")
                if self.take(",", "]") == "]":
                    break
        self.take(";")
        return found

    def read(self) -> Drawing:
        self.take("digraph")
        (name,) = dot_text(self.take("string"))
        self.take("{")
        clusters, lines = [], []
        while (token := self.take("id", "}")) != "}":
            if token == "subgraph":
                assert self.take("id") == f"cluster_{len(clusters)}"
                clusters.append(self.cluster())
            elif token in ("node", "edge"):
                self.attributes()
            else:
                self.take("->")
                lines.append(self.line(token, self.take("id")))
        assert not self.tokens
        return Drawing(name, tuple(clusters), tuple(lines))

    def cluster(self) -> Cluster:
        nodes = []
        for token in ("{", "label", "="):
            self.take(token)
        title = dot_text(self.take("string"))
        self.take(";")
        while (token := self.take("id", "}")) != "}":
            own = self.attributes()
            (label,) = dot_text(own["label"])
            nodes.append(Node(token, label, "port" if own.get("shape") == "oval" else "module"))
        return Cluster(title, tuple(nodes))

    def line(self, source: str, target: str) -> Line:
        own = self.attributes()
        kind = "tied" if own.get("style") == "dashed" else "cut" if "penwidth" in own else "flow"
        return Line(source, target, kind, dot_text(own["label"]) if "label" in own else ())


def test_a_graph_of_gpt(compiled: Compile, golden: Golden) -> None:
    made = compiled("gpt", 3)
    golden("gpt/graph.mmd", mermaid(drawn(made)))
    golden("gpt/graph.dot", dot(drawn(made)))


@pytest.mark.parametrize("name", ["gpt", "unet", "dlrm", "seq2seq"])
def test_both_languages_say_what_was_drawn(name: str, compiled: Compile) -> None:
    drawing = drawn(compiled(name, 2))
    assert read_mermaid(mermaid(drawing), drawing.name) == drawing
    assert DotReader(dot(drawing)).read() == drawing


@pytest.mark.parametrize("name", ["gpt", "unet", "dlrm", "seq2seq"])
def test_every_transfer_is_one_line_from_its_maker_to_its_readers(
    name: str, compiled: Compile
) -> None:
    made = compiled(name, 2)
    drawing = drawn(made)
    sent = sorted((0, t.tensor) for t in made.plan.stages[0].sends)
    cuts = [line for line in drawing.lines if line.kind == "cut"]
    assert sorted((int(c.source[1]), row.split()[0]) for c in cuts for row in c.label) == sent
    keys = [node.key for cluster in drawing.clusters for node in cluster.nodes]
    assert len(keys) == len(set(keys))
    assert {key for line in drawing.lines for key in (line.source, line.target)} <= set(keys)
    flows = [line for line in drawing.lines if line.kind == "flow"]
    assert all(line.source[1] == line.target[1] for line in flows)
    ends = [(line.source, line.target) for line in (*cuts, *flows)]
    assert len(ends) == len(set(ends))
    assert nx.is_directed_acyclic_graph(nx.DiGraph(ends))


def labels(drawing: Drawing) -> list[list[str]]:
    return [[node.label for node in cluster.nodes] for cluster in drawing.clusters]


def test_tied_parameters_are_dashed(compiled: Compile) -> None:
    drawing = drawn(compiled("gpt", 2))
    (tied,) = (line for line in drawing.lines if line.kind == "tied")
    named = {node.key: node.label for cluster in drawing.clusters for node in cluster.nodes}
    assert (named[tied.source], named[tied.target]) == ("wte", "head")
    assert tied.label == ("wte.weight", "= head.weight")


def synthetic(made: Compiled, blocks: dict[str, int], tensors: dict[str, tuple[str, ...]]):
    """A plan and a problem of blocks with their stages; tensor x of block a: {"x": ("a", ..)}."""
    base, stages = chain([1.0]), []
    template = made.plan.stages[0]
    spec = made.plan.stages[0].sends[0]
    costs = tuple(base.blocks[0].model_copy(update={"name": name}) for name in blocks)
    known = tuple(
        TensorCost(
            name=name,
            producer=maker,
            consumers=tuple(readers),
            bytes=8,
            gradient_bytes=8,
            saved=True,
        )
        for name, (maker, *readers) in tensors.items()
    )
    problem = base.model_copy(update={"blocks": costs, "tensors": known, "parameters": ()})
    for k in range(1 + max(blocks.values())):
        sends = [
            spec.model_copy(update={"tensor": name, "peer": peer})
            for name, (maker, *readers) in tensors.items()
            if blocks[maker] == k
            for peer in sorted({blocks[reader] for reader in readers} - {k})
        ]
        update = {"index": k, "blocks": tuple(b for b in blocks if blocks[b] == k)}
        stages.append(template.model_copy(update={**update, "sends": tuple(sends)}))
    return made.plan.model_copy(update={"depth": len(stages), "stages": tuple(stages)}), problem


def test_layers_that_are_alike_and_in_a_row_are_one_node(compiled: Compile) -> None:
    layers = [f"h.{i}{part}" for i in range(6) for part in (".a", ".b", "")]
    blocks = {"wte": 0, **{name: int(name >= "h.4.b") for name in layers}, "loss": 1}
    plan, problem = synthetic(compiled("gpt", 2), blocks, {})
    assert labels(draw(plan, problem)) == [
        ["wte", "h.0-h.3", "part of h.4"],
        ["part of h.4", "h.5", "loss"],
    ]
    slower = problem.blocks[7].model_copy(update={"forward_s": 2.0})
    other = problem.model_copy(
        update={"blocks": (*problem.blocks[:7], slower, *problem.blocks[8:])}
    )
    assert labels(draw(plan, other))[0] == ["wte", "h.0-h.1", "h.2", "h.3", "part of h.4"]


def test_opaque_modules_are_marked(compiled: Compile) -> None:
    drawing = draw(compiled("moe", 2).plan, problem_of(compiled("moe", 2).artifact))
    found = [label for own in labels(drawing) for label in own if "[opaque: moe]" in label]
    assert found == [label for own in labels(drawing) for label in own if "h." in label]
    assert "[opaque" in dot(drawing)
    plain = draw(compiled("gpt", 2).plan, problem_of(compiled("gpt", 2).artifact))
    assert not any("opaque" in label for own in labels(plain) for label in own)
    plan, problem = synthetic(
        compiled("gpt", 2), {"stem": 0, "h.0.moe": 0, "h.1.moe": 0, "h.2": 1, "gate": 1}, {}
    )
    names = ("h.0.moe", "h.1.moe", "gate")
    foreign = compiled("moe", 2).plan.opaque[0]
    own = tuple(foreign.model_copy(update={"module": name}) for name in names)
    assert labels(draw(plan.model_copy(update={"opaque": own}), problem)) == [
        ["stem", "h.0-h.1 [opaque: moe]"],
        ["h.2", "gate [opaque]"],
    ]


def test_a_tensor_with_several_readers_or_that_is_passed_on_has_a_port(compiled: Compile) -> None:
    made = compiled("gpt", 2)
    plan, problem = synthetic(
        made, {"a": 0, "b": 1, "c": 1, "d": 2}, {"x": ("a", "b", "c", "d"), "y": ("a", "b")}
    )
    # Relayed: stage 1 gives x on.
    first, second = plan.stages[0].sends[:2]
    assert (first.tensor, second.peer) == ("x", 2)
    stages = [
        plan.stages[0].model_copy(update={"sends": (first, *plan.stages[0].sends[2:])}),
        plan.stages[1].model_copy(update={"sends": (second,)}),
        plan.stages[2],
    ]
    drawing = draw(plan.model_copy(update={"stages": tuple(stages)}), problem)
    assert labels(drawing) == [["a"], ["b", "c", "x"], ["d"]]
    shown = {(line.source, line.target, line.kind) for line in drawing.lines}
    assert shown == {
        ("s0n0", "s1n2", "cut"),
        ("s1n2", "s1n0", "flow"),
        ("s1n2", "s1n1", "flow"),
        ("s1n2", "s2n0", "cut"),
        ("s0n0", "s1n0", "cut"),
    }


NASTY = st.text(
    st.characters(codec="utf-8") | st.sampled_from('"\\#;<>&|[](){}`\n%'), min_size=1, max_size=12
)


@given(st.lists(NASTY, min_size=8, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_name_can_leave_its_quotes(names: list[str]) -> None:
    drawing = Drawing(
        names[0],
        (
            Cluster((names[1], names[2]), (Node("s0n0", names[3]),)),
            Cluster((names[4],), (Node("s1n0", names[5], "port"),)),
        ),
        (Line("s0n0", "s1n0", "cut", (names[6], names[7])), Line("s0n0", "s1n0", "tied")),
    )

    def shown(text: str) -> str:
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)

    wanted = Drawing(
        shown(names[0]),
        tuple(
            Cluster(
                tuple(map(shown, cluster.title)),
                tuple(replace(node, label=shown(node.label)) for node in cluster.nodes),
            )
            for cluster in drawing.clusters
        ),
        tuple(replace(line, label=tuple(map(shown, line.label))) for line in drawing.lines),
    )
    assert read_mermaid(mermaid(drawing), shown(names[0])) == wanted
    assert DotReader(dot(drawing)).read() == wanted


HOSTILE = """
import torch
from torch import nn

NAMES = ["a", "a#2", 'x"];y-->z', "end", "h,1=0", "<b>&lt;", "\\n%%{init}", "\\\\N"]

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.up(x).T @ torch.tanh(self.down(x))

def model():
    layers = nn.Sequential()
    for name in NAMES:
        layers.add_module(name, Layer())
    layers[-1].up.weight = layers[0].up.weight
    return layers

def inputs(batch_size):
    return (torch.randn(batch_size, 8),)

def targets(batch_size):
    return (torch.randn(batch_size, 8),)

def loss(outputs, wanted):
    return nn.functional.mse_loss(outputs, wanted)
"""


def test_a_model_with_hostile_names_is_compiled_and_drawn(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HOSTILE)
    made = compile_model(tmp_path / "model.py", gpus=2, depth=2, microbatch=2, out=tmp_path / "out")
    drawing = drawn(made)
    names = {"a", "a#2", 'x"];y-->z', "end", "h,1=0", "<b>&lt;", "\n%%{init}", "\\N", "loss"}
    assert {label.removeprefix("part of ") for own in labels(drawing) for label in own} == names
    assert [line.label for line in drawing.lines if line.kind == "tied"] == [
        ("a.up.weight", "= \\N.up.weight")
    ]
    strange = "\N{REPLACEMENT CHARACTER}"
    for again in (read_mermaid(mermaid(drawing), drawing.name), DotReader(dot(drawing)).read()):
        assert labels(again) == [[x.replace("\n", strange) for x in own] for own in labels(drawing)]
        assert len(again.lines) == len(drawing.lines)


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_draws_it(compiled: Compile) -> None:
    drawing = drawn(compiled("gpt", 2))
    hostile = replace(drawing, name='"];x->y;//<b>&\\')
    for text in (dot(drawing), dot(hostile)):
        done = subprocess.run(
            ["dot", "-Tplain"], input=text, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_it(compiled: Compile) -> None:
    made = compiled("gpt", 2)
    for name, language in (("mermaid", mermaid), ("dot", dot)):
        done = CliRunner().invoke(app, ["show", str(made.artifact), "--graph", name])
        assert (done.exit_code, done.stdout) == (0, language(drawn(made)))
        done = CliRunner().invoke(app, ["show", str(made.artifact), "--graph", name, "--json"])
        assert json.loads(done.stdout) == {"graph": name, "text": language(drawn(made))}
    done = CliRunner().invoke(app, ["show", str(made.artifact), "--graph", "svg"])
    assert done.exit_code == 2
    assert "mermaid or dot" in done.output


def test_what_is_missing_or_does_not_belong_is_refused(compiled: Compile, tmp_path) -> None:
    gpt, dlrm = compiled("gpt", 2), compiled("dlrm", 2)
    with pytest.raises(MismatchError, match="different models"):
        draw(gpt.plan, problem_of(dlrm.artifact))
    (tmp_path / "plan.json").write_text(gpt.plan.to_json())
    with pytest.raises(InputFileError, match=PROBLEM):
        problem_of(tmp_path)
