"""From regions to modules: the user's hierarchy, rebuilt around the nodes of one stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import fx

from p2bw.compiler.emit import opaque
from p2bw.compiler.emit.attributes import Attributes, below, literal
from p2bw.compiler.emit.expr import (
    Attr,
    Call,
    Device,
    Node,
    Own,
    Raw,
    Ref,
    Seq,
    Store,
    call,
    rebuild,
)
from p2bw.compiler.emit.hints import base_name, call_name, is_float, name_queries, unpacked_names
from p2bw.compiler.emit.idioms import augmented, render
from p2bw.compiler.emit.leaf import BUFFERS, Leaf, Match
from p2bw.compiler.emit.leaves import match_leaf
from p2bw.compiler.emit.names import short_name
from p2bw.compiler.emit.op import Op, with_item
from p2bw.compiler.emit.regions import Layout, Region
from p2bw.compiler.emit.shapes import Shapes
from p2bw.compiler.emit.tree import Body, Kind, Module, Statement, Value
from p2bw.compiler.program import TensorType

RECURRENT = ("LSTM", "GRU", "RNN")


@dataclass(slots=True)
class _Frame:
    """A forward under construction: which value has which number."""

    module: Module
    region: Region
    ambient: int  # how many of a node's contexts are around the whole forward
    body: Body
    parent: "_Frame | None" = None
    numbers: dict[fx.Node, int] = field(default_factory=dict)
    arguments: list[fx.Node] = field(default_factory=list)


class Builder:
    """Builds the module tree of one stage."""

    def __init__(self, layout: Layout, names: Mapping[str, str]) -> None:
        self.layout = layout
        self.program = layout.program
        self.names = names  # of tensors at the stage's boundary
        self.root = Module("", Kind.CLASS, "Stage")
        self.attributes = Attributes(self.program)
        self.shapes = Shapes(layout, self.attributes)

    def build(self) -> Module:
        region = self.layout.root
        body = Body()
        frame = _Frame(self.root, region, 0, body)
        for node in self.layout.arguments:
            self._argument(frame, node, self.names[node.name])
            if node.op != "placeholder":
                body.values[-1] = replace(body.values[-1], passing=True)
        self._fill(frame)
        name_queries(body)
        body.results = tuple(self._number(frame, value) for value in self.layout.results)
        self._place(frame)
        self.root.bodies.append(body)
        return self.root

    # Values.

    def _argument(self, frame: _Frame, node: fx.Node, name: str) -> int:
        number = len(frame.arguments)
        assert number not in frame.numbers.values()
        frame.arguments.append(node)
        frame.numbers[node] = number
        frame.body.values.append(Value(self._type(node), name))
        frame.body.arguments += 1
        return number

    def _type(self, node: fx.Node) -> TensorType | None:
        out = self.program.facts[node.name].out
        return out[0] if len(out) == 1 else None

    def _number(self, frame: _Frame, value: fx.Node) -> int:
        """The number of a value; one from outside becomes an argument of the forward."""
        if value in frame.numbers:
            return frame.numbers[value]
        number = -1 - len(frame.arguments)  # arguments are renumbered once all are known
        frame.arguments.append(value)
        frame.numbers[value] = number
        return number

    def _target(self, frame: _Frame, value: fx.Node, name: str) -> int:
        number = len(frame.body.values)
        frame.numbers[value] = number
        frame.body.values.append(Value(self._type(value), name))
        return number

    def _ref(self, frame: _Frame, region: Region) -> "_Reference":
        return _Reference(self, frame, region)

    def reference(self, frame: _Frame, path: str, node: fx.Node) -> Node:
        value = self.layout.resolve(node)
        if value.op == "get_attr":
            name = self.attributes.name(value, path)
            own = below(frame.module.path, name)
            if own is not None:
                frame.module.hold(own, self.attributes.tensor(value))
                self.attributes.use(value, name)
                return Own(own)
        return Ref(self._number(frame, value))

    # Statements.

    def _fill(self, frame: _Frame) -> None:
        for item in frame.region.items:
            if isinstance(item, Region):
                self._region(frame, item)
            else:
                self._operation(frame, frame.region, item)

    def _context(self, frame: _Frame, node: fx.Node) -> tuple[Node, ...]:
        return tuple(map(with_item, self.program.facts[node.name].context[frame.ambient :]))

    def _op(self, frame: _Frame, region: Region, node: fx.Node) -> Op:
        return Op(node, self._ref(frame, region), self.layout.type)

    def _operation(self, frame: _Frame, region: Region, node: fx.Node) -> None:
        op = self._op(frame, region, node)
        if (
            op.name == "lift_fresh_copy.default"
            and str(op["self"].target) in self.program.constants
        ):
            constant = self.program.constants[str(op["self"].target)]
            dtype = Raw(repr(constant.dtype))
            expr: Node = call("torch.tensor", literal(constant), dtype=dtype, device=Device())
        elif self.layout.is_store(node):
            expr = self._store(op)
        else:
            expr = render(op)
        statement = Statement(
            (),
            expr,
            self._context(frame, node),
            source=self.program.facts[node.name].source,
            augmented=augmented(op),
            inplace=op.name.partition(".")[0].endswith("_") and not op.name.startswith("__"),
        )
        if node in self.layout.survey.parts:
            self._unpack(frame, statement, node, unpacked_names(op, expr, frame.body))
        elif self.layout.last_use.get(node, -1) >= 0:
            statement.targets = (self._target(frame, node, base_name(op, expr, frame.body)),)
            match expr:
                case Call(Attr(Ref(), _), _, _):
                    pass
                case _:
                    statement.augmented = ""  # the result needs a name of its own
        elif self._is_idle(node):
            return  # nothing uses it and it does nothing
        frame.body.statements.append(statement)

    def _store(self, op: Op) -> Node:
        """A write into a slice of a tensor, of which only the tensor is used again."""
        number = self.layout.number_stored(op.node)
        value = op.literal(op.node.args[1] if number is None else number)
        return Store(op.expr("self"), value, op.name.partition(".")[0])

    def _is_idle(self, node: fx.Node) -> bool:
        facts = self.program.facts[node.name]
        return facts.mutates == () and facts.random_calls == 0

    def _unpack(self, frame: _Frame, statement: Statement, node: fx.Node, names: list[str]) -> None:
        parts = self.layout.survey.parts[node]
        count = len(self.program.facts[node.name].out)
        targets: list[int | None] = []
        for index in range(count):
            part = parts.get(index)
            used = part is not None and self.layout.last_use.get(part, -1) >= 0
            name = names[index] if index < len(names) else names[0]
            targets.append(self._target(frame, part, name) if part is not None and used else None)
        statement.targets = tuple(targets)
        statement.forced = True

    # Module calls.

    def _opaque(self, frame: _Frame, region: Region, path: str) -> None:
        """A call of a module that could not be traced."""
        node = next(region.nodes())
        call = self.program.opaque[node.name]
        _, inputs, state = node.args
        assert isinstance(inputs, list)
        assert isinstance(state, list)
        module = frame.module.child(path)
        module.kind, module.type_name = Kind.OPAQUE, region.type_name
        module.constructor = opaque.constructor(call)
        module.children.clear()
        module.tensors.clear()
        for tensor in state:
            self.attributes.use(tensor, self.attributes.name(tensor, region.path))
        expr = opaque.written(path, call, inputs, self._ref(frame, region))
        name = call_name(path, module, expr.args, self._type_of(node), frame.body)
        parts = self.layout.survey.parts.get(node, {})
        used = {i: v for i, v in parts.items() if self.layout.last_use.get(v, -1) >= 0}
        for statement in opaque.statements(
            call, expr, name, frame.body, lambda i, name: self._target(frame, used[i], name), used
        ):
            statement.context = self._context(frame, node)
            statement.source = self.program.facts[node.name].source
            frame.body.statements.append(statement)

    def _region(self, frame: _Frame, region: Region) -> None:
        leaf = self._match(frame, region)
        path = below(frame.module.path, region.path)
        assert path is not None
        first = region.items[0]
        if isinstance(first, fx.Node) and first.name in self.program.opaque:
            self._opaque(frame, region, path)
            return
        known = frame.module.find(path)
        if leaf is not None and self._fits(known, leaf):
            self._leaf(frame, region, path, leaf)
        elif self.shapes.is_chain(region) and not (known and (known.bodies or known.children)):
            self._sequential(frame, region, path)
        elif self.shapes.is_dissolved(region, frame.module, known):
            for item in region.items:
                if isinstance(item, Region):
                    self._region(frame, item)
                else:
                    self._operation(frame, region, item)
        else:
            self._class(frame, region, path)

    def _match(self, frame: _Frame, region: Region) -> Leaf | None:
        """The torch.nn module that a region is, if it is one."""
        nodes = [item for item in region.items if isinstance(item, fx.Node)]
        if not region.whole or len(nodes) != len(region.items):
            return None
        contexts = {self.program.facts[node.name].context for node in nodes}
        outputs = self.layout.outputs(region)
        last = self.layout.values(nodes[-1])
        if len(contexts) != 1 or any(value not in last for value in outputs):
            return None
        ops = [Op(node, lambda _: Raw(""), self.layout.type) for node in nodes]
        leaf = match_leaf(
            region.type_name,
            Match(ops, partial(self.attributes.owned, region.path), self.attributes.is_trainable),
        )
        if leaf is None or (len(outputs) > 1 and region.class_name not in RECURRENT):
            return None
        return leaf

    def _fits(self, known: Module | None, leaf: Leaf) -> bool:
        if known is None or known.kind is Kind.HOLDER:
            return not (known and known.children)
        return known.kind is Kind.LEAF and known.constructor == leaf.constructor

    def _leaf(self, frame: _Frame, region: Region, path: str, leaf: Leaf) -> None:
        module = frame.module.child(path)
        module.kind, module.type_name = Kind.LEAF, region.type_name
        module.constructor, module.provides = leaf.constructor, leaf.provides
        module.tensors = {n: t for n, t in module.tensors.items() if n not in leaf.provides}
        nodes = list(region.nodes())
        for node in nodes:
            for argument in self.layout.reads(node):
                if self.attributes.owned(region.path, argument) is not None:
                    self.attributes.use(argument, self.attributes.name(argument, region.path))
        ref = self._ref(frame, region)
        args = tuple(
            Seq("()", tuple(map(ref, value))) if isinstance(value, tuple) else ref(value)
            for value in leaf.inputs
        )
        last = nodes[-1]
        statement = Statement(
            (),
            Call(Own(path), args),
            self._context(frame, last),
            source=self.program.facts[last.name].source,
        )
        name = call_name(path, module, args, self._type_of(last), frame.body)
        if region.class_name in RECURRENT:
            self._unpack(frame, statement, last, [name, "hidden", "cell"])
            statement.nested = region.class_name == "LSTM"
        else:
            used = [v for v in self.layout.values(last) if self.layout.last_use.get(v, -1) >= 0]
            if used:
                statement.targets = (self._target(frame, used[0], name),)
        frame.body.statements.append(statement)

    def _type_of(self, node: fx.Node) -> TensorType | None:
        out = self.program.facts[node.name].out
        return out[0] if out else None

    def _sequential(self, frame: _Frame, region: Region, path: str) -> None:
        module = frame.module.child(path)
        module.kind, module.type_name = Kind.SEQUENTIAL, region.type_name
        (source,) = self.shapes.inputs(region.items[0])  # type: ignore[arg-type]
        argument = self._ref(frame, region)(source)
        inner = _Frame(module, region, self.shapes.ambient(region), Body(), frame)
        self._fill(inner)
        (output,) = self.layout.outputs(region)
        args = (argument,)
        name = call_name(path, module, args, self._type_of(output), frame.body)
        statement = Statement(
            (self._target(frame, output, name),),
            Call(Own(path), args),
            self._context(frame, output),
        )
        frame.body.statements.append(statement)

    def _class(self, frame: _Frame, region: Region, path: str) -> None:
        module = frame.module.child(path)
        ambient = self.shapes.ambient(region)
        inner = _Frame(module, region, ambient, Body(path=region.path), frame)
        if module.kind is Kind.HOLDER:
            module.kind, module.type_name = Kind.CLASS, region.type_name
            module.whole, module.opens, module.closes = region.whole, region.opens, region.closes
            module.source = next((self.program.facts[n.name].source for n in region.nodes()), "")
        inputs, outputs = self.shapes.inputs(region), self.layout.outputs(region)
        for value in inputs:
            self._argument(inner, value, self._argument_name(frame, value, inputs, outputs))
        self._fill(inner)
        name_queries(inner.body)
        inner.body.results = tuple(self._number(inner, value) for value in outputs)
        assert len(inner.arguments) == inner.body.arguments
        self._place(inner)
        number = self._method(module, inner.body)
        args = tuple(self.reference(frame, frame.region.path, v) for v in inner.arguments)
        function: Node = Own(path) if number == 0 else Attr(Own(path), f"forward_{number + 1}")
        names = [inner.body.values[r].name for r in inner.body.results]
        if len(outputs) == 1:
            names = [call_name(path, module, args, self._type_of(outputs[0]), frame.body)]
        context = tuple(
            map(
                with_item,
                self.program.facts[next(region.nodes()).name].context[frame.ambient : ambient],
            )
        )
        targets = tuple(self._target(frame, v, n) for v, n in zip(outputs, names, strict=True))
        frame.body.statements.append(
            Statement(targets, Call(function, args), context, forced=len(targets) > 1)
        )

    def _argument_name(
        self, frame: _Frame, value: fx.Node, inputs: list[fx.Node], outputs: list[fx.Node]
    ) -> str:
        """What a forward calls its argument: x for what it gives back changed."""
        if value.op == "get_attr":
            return str(value.target).rpartition(".")[2]
        kind = self._type(value)
        floats = [v for v in inputs if is_float(self._type(v)) and v.op != "get_attr"]
        if floats == [value]:
            return "x"
        if is_float(kind) and any(self._type(output) == kind for output in outputs):
            return "x"
        return self._name_in(frame, value)

    def _name_in(self, frame: _Frame, value: fx.Node) -> str:
        if value in self.layout.arguments:
            return short_name(self.program, value)
        number = frame.numbers.get(value)
        if number is not None and 0 <= number < len(frame.body.values):
            return frame.body.values[number].name
        return self._name_in(frame.parent, value) if frame.parent else "x"

    def _method(self, module: Module, body: Body) -> int:
        for number, known in enumerate(module.bodies):
            if known.same_as(body):
                return number
        module.bodies.append(body)
        return len(module.bodies) - 1

    def _place(self, frame: _Frame) -> None:
        """Read the device off an argument, or else off a tensor of the module itself."""
        device: Node = Raw("None")
        if frame.body.arguments:
            device = Attr(Ref(0), "device")
        else:
            for module in frame.module.walk():
                names = {n: t.parameter for n, t in module.tensors.items()}
                names |= {n: n not in BUFFERS for n in module.provides}
                if names:
                    kind = "parameters" if any(names.values()) else "buffers"
                    device = Attr(Raw(f"next(self.{kind}())"), "device")

        def placed(part: Node) -> Node:
            return device if isinstance(part, Device) else part

        for statement in frame.body.statements:
            statement.expr = rebuild(statement.expr, placed)
            statement.context = tuple(rebuild(c, placed) for c in statement.context)


@dataclass(frozen=True, slots=True)
class _Reference:
    """A node of the graph -> the expression that stands for it in a forward."""

    builder: Builder
    frame: _Frame
    region: Region

    def __call__(self, node: fx.Node) -> Node:
        return self.builder.reference(self.frame, self.region.path, node)
