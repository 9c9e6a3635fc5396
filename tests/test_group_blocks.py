from dataclasses import replace
from operator import getitem

import pytest
import torch
from annotated import annotated
from corpus import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from p2bw.compiler.devices import find_device
from p2bw.compiler.dump import dump
from p2bw.compiler.program import (
    Attribute,
    MissingFactError,
    NodeFacts,
    Program,
    Scope,
    TensorType,
    tensor_arguments,
)
from p2bw.compiler.split import split
from p2bw.compiler.storage import storage_of
from p2bw.passes import group_blocks, pipeline, run_passes

aten = torch.ops.aten
KIND = TensorType((4,), torch.float32)


class Build:
    """A program written by hand, node by node, with the facts that group_blocks reads."""

    def __init__(self):
        self.graph = fx.Graph()
        self.facts = {}
        self.buffers = {}
        self.x = self.graph.placeholder("x")
        self._know(self.x)

    def _know(self, node, **facts):
        out = facts.pop("out", (KIND,))
        self.facts[node.name] = NodeFacts(
            **{
                "out": out,
                "strides": tuple((1,) for _ in out),
                "requires_grad": tuple(True for _ in out),
                "alias": tuple(None for _ in out),
                "mutates": (),
                "saved": (),
                "forward_s": 0.0,
                "backward_s": 0.0,
                **facts,
            }
        )

    def buffer(self, name):
        self.buffers[name] = Attribute((name,), KIND)
        node = self.graph.create_node("get_attr", name)
        self._know(node)
        return node

    def call(self, *arguments, seconds=1.0, module="net", **facts):
        node = self.graph.call_function(aten.cat.default, (list(arguments),))
        scopes = (Scope("", "Net"), Scope(module, "Part")) if module else ()
        self._know(node, forward_s=seconds, scopes=scopes, **facts)
        return node

    def item(self, node, index):
        picked = self.graph.call_function(getitem, (node, index))
        self._know(picked, alias=(0,))
        return picked

    def program(self, loss):
        self._know(self.graph.output((loss,)), out=())
        return Program(
            graph=self.graph,
            model_name="Net",
            batch_size=1,
            inputs={"x": KIND},
            parameters={},
            buffers=self.buffers,
            constants={},
            facts=self.facts,
            history=("trace",),
        )


def block_of(program):
    return {node: block.name for block in program.blocks for node in block.nodes}


def assert_sound(program):
    """Every node in one block, blocks in a topological order, what must not part together."""
    position = {node.name: i for i, node in enumerate(program.compute_nodes)}
    listed = [node for block in program.blocks for node in block.nodes]
    assert sorted(listed) == sorted(position)
    for block in program.blocks:
        assert list(block.nodes) == sorted(block.nodes, key=position.get)
    names = [block.name for block in program.blocks]
    assert len(set(names)) == len(names)
    rank = {node: i for i, block in enumerate(program.blocks) for node in block.nodes}
    for node in program.compute_nodes:
        for argument in tensor_arguments(node):
            if argument.op == "call_function":
                assert rank[argument.name] <= rank[node.name]
        if node.target is getitem:
            assert rank[node.args[0].name] == rank[node.name]
        for index in program.fact(node, "mutates"):
            store = storage_of(program, tensor_arguments(node)[index].name)
            local = program.node(store[0]).op == "call_function"
            for other in program.compute_nodes:
                if local and position[other.name] > position[node.name]:
                    continue
                seen = [
                    (a.name, 0)
                    for a in tensor_arguments(other)
                    if len(program.facts[a.name].out) == 1
                ]
                seen += [(other.name, i) for i in range(len(program.facts[other.name].out))]
                if any(storage_of(program, *one) == store for one in seen):
                    assert rank[other.name] == rank[node.name]


@st.composite
def programs(draw):
    build = Build()
    single = [build.x, build.buffer("running"), build.buffer("fixed")]
    for i in range(draw(st.integers(1, 30))):
        kind = draw(st.sampled_from(("plain", "plain", "plain", "tuple", "view", "write", "start")))
        near = st.sampled_from(single[-8:])
        arguments = draw(st.lists(near, min_size=1, max_size=3)) if kind != "start" else []
        seconds = draw(st.sampled_from((0.0, 0.01, 1.0, 5.0)))
        module = f"part.{i // 5}" if draw(st.booleans()) else ""
        facts = {"seconds": seconds, "module": module}
        if kind == "tuple":
            node = build.call(*arguments, out=(KIND, KIND), **facts)
            single += [build.item(node, 0), build.item(node, 1)]
            continue
        if kind == "view":
            facts["alias"] = (0,)
            facts["strides"] = (draw(st.sampled_from(((1,), (2,)))),)
        if kind == "write":
            facts |= {"alias": (0,), "mutates": (0,)}
        single.append(build.call(*arguments, **facts))
    loss = build.call(single[-1], module="")
    return build.program(loss)


@given(programs())
@settings(max_examples=150, deadline=None)
def test_any_program(program):
    grouped = group_blocks(program)
    assert_sound(grouped)
    assert group_blocks(program).blocks == grouped.blocks


@pytest.mark.parametrize("architecture", CORPUS, ids=lambda a: a.name)
def test_examples(architecture):
    _, program = annotated(architecture)
    assert_sound(program)
    last = len(program.blocks) - 1
    # Wherever the list of blocks is cut, there are two stages.
    for i in range(last):
        split(program, {block.name: int(j > i) for j, block in enumerate(program.blocks)})


def chain(count, seconds=1.0):
    build = Build()
    node = build.x
    for _ in range(count):
        node = build.call(node, seconds=seconds)
    return build.program(node)


def test_every_operator_is_a_block_of_its_own():
    assert [len(block.nodes) for block in group_blocks(chain(1000)).blocks] == [1] * 1000


def test_what_takes_no_time_goes_with_the_operator_it_serves():
    build = Build()
    first = build.call(build.x)
    view = build.call(first, seconds=0.0, alias=(0,))
    second = build.call(view)
    third = build.call(second)
    home = block_of(group_blocks(build.program(third)))
    assert home[view.name] in (home[first.name], home[second.name])
    assert len({home[node.name] for node in (first, second, third)}) == 3


def test_a_view_of_what_others_read_too_is_made_where_it_is_used():
    build = Build()
    table = build.call(build.x)
    views = [build.call(table, seconds=0.0, alias=(0,)) for _ in range(3)]
    node = build.x
    users = []
    for view in views:
        users.append(build.call(node, view))
        node = build.call(users[-1], view)
    home = block_of(group_blocks(build.program(node)))
    assert [home[view.name] for view in views] == [home[user.name] for user in users]
    assert len({home[table.name], *(home[view.name] for view in views)}) == 4


def test_views_of_several_outputs_stay_with_their_items():
    build = Build()
    table = build.call(build.x)
    halves = build.call(table, seconds=0.0, out=(KIND, KIND), alias=(0, 0))
    low, high = build.item(halves, 0), build.item(halves, 1)
    last = build.call(build.call(low, table), high)
    home = block_of(group_blocks(build.program(last)))
    assert home[halves.name] == home[low.name] == home[high.name]


def test_thousands_of_nodes_take_little_time():
    import time

    program = chain(6400)
    begin = time.process_time()
    assert len(group_blocks(program).blocks) == 6400
    assert time.process_time() - begin < 5  # about half a second alone on the machine


def test_what_is_written_stays_with_who_sees_it():
    build = Build()
    count = build.buffer("count")
    a = build.call(build.x, seconds=10.0)
    b = build.call(a, seconds=10.0)
    early = build.call(a, seconds=10.0)
    written = build.call(a, b, alias=(0,), mutates=(0,), seconds=10.0)
    late = build.call(written, seconds=10.0)
    later = build.call(a, late, early, seconds=10.0)
    build.call(count, alias=(0,), mutates=(0,), module="elsewhere")
    reader = build.call(count, later, seconds=10.0, module="elsewhere")
    home = block_of(group_blocks(build.program(reader)))
    assert home[a.name] == home[b.name] == home[early.name] == home[written.name]
    assert len({home[n.name] for n in (a, late, later, reader)}) == 4


def test_blocks_have_the_names_of_modules():
    build = Build()
    first = build.call(build.x, module="h.0.attn")
    second = build.call(first, module="h.0.attn")
    third = build.call(second, module="h.0.mlp")
    loss = build.call(third, module="")
    program = build.program(loss)
    names = [block.name for block in group_blocks(program).blocks]
    assert names == ["h.0.attn", "h.0.attn#2", "h.0.mlp", "loss"]


def test_the_needed_passes_are_named():
    program = chain(3)
    unknown = replace(program, facts={n: replace(f, alias=None) for n, f in program.facts.items()})
    with pytest.raises(MissingFactError, match="run annotate_autograd first"):
        group_blocks(unknown)
    _, annotated_program = annotated(CORPUS[0])
    passes = pipeline(find_device("cpu"))
    with pytest.raises(MissingFactError, match="annotate_cost needs annotate_autograd"):
        run_passes(program, passes[1:])
    broken = replace(passes[2], function=lambda program: program.nothing)
    with pytest.raises(AttributeError) as error:
        run_passes(replace(annotated_program, blocks=None), [broken])
    assert "in pass annotate_time, after trace, annotate_autograd" in error.value.__notes__[0]


def test_the_dump_shows_facts_and_blocks():
    architecture = next(a for a in CORPUS if a.name == "gpt")
    _, program = annotated(architecture)
    text = dump(program)
    assert text == dump(program)
    assert text.startswith("# GPT, 2 samples, after group_blocks\n")
    lines = text.splitlines()
    assert len(lines) == 1 + len(program.facts) + 1 + len(program.blocks)
    (line,) = [line for line in lines if line.startswith("embedding:")]
    assert "aten.embedding.default(wte_weight, tokens)" in line
    assert "wte, gpt.py:" in line
    assert "saves=input 1" in line
