"""From the body of a forward to lines of Python.

The lines run the operators in exactly the traced order: a value is written into the expression
that uses it only where Python evaluates it at the same point.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from p2bw.compiler.emit.comments import wrapped
from p2bw.compiler.emit.expr import (
    WIDTH,
    Attr,
    Call,
    Node,
    Own,
    Raw,
    Ref,
    Seq,
    flat,
    lay_out,
    rebuild,
    refs,
    short,
    walk,
    with_refs,
)
from p2bw.compiler.emit.loops import Line, find_loops
from p2bw.compiler.emit.names import identifier
from p2bw.compiler.emit.order import as_read
from p2bw.compiler.emit.tree import Body, Kind, Module, Statement, Value
from p2bw.compiler.program import TensorType

_LENGTH = 72  # of an expression with others written into it
_CALLS = 6
_NAME = 16  # longer names leave less room for what they stand for


@dataclass(slots=True)
class Function:
    """Writes one forward."""

    body: Body
    module: Module
    types: Sequence[TensorType | None]  # None where instances of the class differ
    resolve: Callable[[Node], Node]  # attributes of self -> text
    label: str = ""  # what the world calls the result, if there is one
    names: dict[int, str] = field(default_factory=dict)
    owner: dict[str, int] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)  # names of loop variables

    def lines(self, name: str) -> list[str]:
        """The method's lines, indented for a class."""
        loops = find_loops(self.body, self.module, self.resolve)
        for loop in loops:
            if loop.loop and loop.start >= self.body.arguments:
                self.body.values[loop.start] = Value(None, "x")
        self.reserved = {loop.variable for loop in loops if loop.loop}
        lines, results = self._inlined(loops)
        last = self._last_uses(lines, results)
        for number in range(self.body.arguments):
            wish = self.body.values[number].name
            self._name(number, identifier(wish or "x", {*self.owner, *self.reserved}))
        signature = self._signature(name)
        body: list[str] = []
        shown: list[TensorType | None] = [None]
        context: tuple[Node, ...] = ()
        for position, line in enumerate(lines):
            if line.statement.context != context:
                context = line.statement.context
                if context:
                    items = ", ".join(flat(self._named(item)) for item in context)
                    body.append(f"        with {items}:")
            indent = 12 if context else 8
            body += self._written(line, position, last, indent, shown)
        body += self._passing_on()
        body += self._return(results, shown)
        return [*signature, *(body or ["        pass"])]

    # Inlining.

    def _inlined(self, lines: Sequence[Line]) -> tuple[list[Line], list[Node]]:
        """Write values used once into the expressions that use them, order of evaluation kept."""
        uses = Counter(self.body.results)
        for line in lines:
            for index in line.reads:
                uses[index] += 2 if line.loop else 1  # a loop evaluates its arguments again
        done: list[Line] = []
        pending: list[Line] = []
        for line in lines:
            if pending and (line.loop or line.statement.context != pending[-1].statement.context):
                done += pending
                pending = []
            if not line.loop:
                line, flushed, pending = self._absorb(line, pending)
                done += flushed
            if self._may_wait(line, uses):
                pending.append(line)
            else:
                done += [*pending, line]
                pending = []
        results: list[Node] = [Ref(index) for index in self.body.results]
        single = len(results) == 1 and len(pending) == 1 and not pending[0].statement.context
        if single and pending[0].statement.targets == self.body.results:
            results = [pending.pop().statement.expr]
        if not pending and done and self._returns_all(done[-1]):
            results = [done.pop().statement.expr]
        elif not single:
            pending, results = self._returned(pending, results)
        return [*done, *pending], results

    def _returned(self, pending: list[Line], results: list[Node]) -> tuple[list[Line], list[Node]]:
        """The pending values that are the last results written into what is returned."""
        count = 0
        while count < len(pending) and not pending[-1 - count].statement.context:
            tail = pending[len(pending) - count - 1 :]
            targets = tuple(line.statement.targets[0] for line in tail)
            if targets != self.body.results[len(results) - len(tail) :]:
                break
            returned = Seq("()", (*results[: -len(tail)], *(line.statement.expr for line in tail)))
            if not self._is_readable(Statement((), returned), returned):
                break
            count += 1
        kept = pending[: len(pending) - count]
        tail = pending[len(pending) - count :]
        return kept, [*results[: len(results) - count], *(line.statement.expr for line in tail)]

    def _returns_all(self, line: Line) -> bool:
        """Whether a call of a module gives the results of this forward, in order."""
        statement = line.statement
        if line.loop or statement.context or statement.targets != self.body.results:
            return False
        match statement.expr:
            case Call(Own(path), _, _):
                module = self.module.find(path)
                return module is not None and module.kind is Kind.CLASS
        return False

    def _absorb(self, line: Line, pending: list[Line]) -> tuple[Line, list[Line], list[Line]]:
        """The line with the last pending values written into it; what it forces out; the rest."""
        waiting = {p.statement.targets[0]: p for p in pending}
        reads = [index for index in refs(line.statement.expr) if index in waiting]
        if line.statement.augmented:
            reads = reads[1:] if reads and _receiver(line.statement) == reads[0] else reads
        pending = as_read(pending, reads)
        count = 0
        while count < min(len(reads), len(pending)):
            if pending[-1 - count].statement.targets[0] != reads[-1 - count]:
                break
            count += 1
        needed = {index for index in refs(line.statement.expr) if index in waiting}
        while True:
            taken = pending[len(pending) - count :]
            inside = {p.statement.targets[0]: p.statement.expr for p in taken}

            def fill(index: int, inside: dict[int | None, Node] = inside) -> Node:
                return inside.get(index, Ref(index))

            expr = short(with_refs(line.statement.expr, fill))
            if count == 0 or self._is_readable(line.statement, expr):
                break
            count -= 1
        rest = pending[: len(pending) - count]
        left = {p.statement.targets[0] for p in taken}
        forced = [i for i, p in enumerate(rest) if p.statement.targets[0] in needed - left]
        cut = forced[-1] + 1 if forced else 0
        if cut < len(rest) and forced:
            cut = len(rest)
        new = Line(replace(line.statement, expr=expr))
        return new, rest[:cut], rest[cut:]

    def _is_readable(self, statement: Statement, expr: Node) -> bool:
        """Whether an expression is short enough for one line."""

        def worded(part: Node) -> Node:
            if isinstance(part, Ref):
                return Raw(self.body.values[part.index].name or "value")
            return Raw(f"self.{part.path}") if isinstance(part, Own) else part

        calls = [part for part in walk(expr) if isinstance(part, Call)]
        if len(calls) > _CALLS or sum(map(_is_numbered, calls)) > 1:
            return False
        length = len(flat(rebuild(expr, worded)))
        for target in statement.targets:
            if target is not None:
                length += max(0, len(self.body.values[target].name) - _NAME)
        return length <= _LENGTH

    def _may_wait(self, line: Line, uses: Counter[int]) -> bool:
        statement = line.statement
        if line.loop or statement.forced or statement.augmented or len(statement.targets) != 1:
            return False
        target = statement.targets[0]
        return target is not None and uses[target] == 1

    # Names.

    def _last_uses(self, lines: Sequence[Line], results: Sequence[Node]) -> dict[int, int]:
        last = {index: position for position, line in enumerate(lines) for index in line.reads}
        last.update({index: len(lines) for result in results for index in refs(result)})
        return last

    def _name(self, number: int, name: str) -> None:
        self.names[number] = name
        self.owner[name] = number

    def _choose(self, number: int, position: int, last: dict[int, int], fresh: set[str]) -> str:
        """A name that no value still needed has."""
        wish = self.body.values[number].name or "x"
        alive = self.reserved | {
            name
            for name, index in self.owner.items()
            if last.get(index, -1) > position or name in fresh
        }
        for candidate in (wish, *("yzw" if wish == "x" else "")):
            if identifier(candidate, ()) not in alive:
                return identifier(candidate, alive)
        return identifier(wish, alive)

    def _named(self, node: Node) -> Node:
        return self.resolve(with_refs(node, lambda index: Raw(self.names[index])))

    # Text.

    def _signature(self, name: str) -> list[str]:
        arguments = [f"{self.names[i]}: Tensor" for i in range(self.body.arguments)]
        count = len(self.body.results)
        returned = "None" if count == 0 else "Tensor"
        if count > 1:
            returned = (
                f"tuple[{', '.join(['Tensor'] * count)}]" if count < 5 else "tuple[Tensor, ...]"
            )
        return signature(name, arguments, returned)

    def _written(
        self,
        line: Line,
        position: int,
        last: dict[int, int],
        indent: int,
        shown: list[TensorType | None],
    ) -> list[str]:
        statement = line.statement
        if line.loop:
            return self._written_loop(line, position, last, indent, shown)
        expr = self._named(statement.expr)
        if statement.augmented or statement.inplace:
            receiver = _receiver(statement)
            if receiver is not None and len(statement.targets) == 1:
                assert statement.targets[0] is not None
                self.names[statement.targets[0]] = self.names[receiver]
                self.owner[self.names[receiver]] = max(
                    (receiver, statement.targets[0]), key=lambda index: last.get(index, -1)
                )
        match expr:
            case Call(Attr(Raw(place), _), (operand, *_), _) if statement.augmented:
                return lay_out(f"{place} {statement.augmented} ", operand, indent)
        if not statement.targets or (statement.inplace and _receiver(statement) is not None):
            return lay_out("", expr, indent)
        targets = self._targets(statement, position, last)
        text = lay_out(f"{targets} = ", expr, indent)
        if len(text[0]) > WIDTH and len(statement.targets) > 1:
            space = " " * indent
            text = lay_out(") = ", expr, indent)
            names = [f"{space}    {name}," for name in targets.split(", ")]
            text = [f"{space}(", *names, *text]
        return self._commented(text, statement.targets, shown)

    def _written_loop(
        self,
        line: Line,
        position: int,
        last: dict[int, int],
        indent: int,
        shown: list[TensorType | None],
    ) -> list[str]:
        statement, space = line.statement, " " * indent
        (target,) = statement.targets
        assert target is not None
        text = []
        start = self.names[line.start]
        free = line.start >= self.body.arguments or self.body.values[line.start].name == "x"
        if free and last.get(line.start, -1) <= position:
            self._name(target, start)
        else:
            self._name(target, self._choose(target, position, last, {start}))
            text.append(f"{space}{self.names[target]} = {start}")
        text.append(f"{space}for {line.variable} in {line.loop}:")
        inner = lay_out(f"{self.names[target]} = ", self._named(statement.expr), indent + 4)
        return text + self._commented(inner, statement.targets, shown)

    def _targets(self, statement: Statement, position: int, last: dict[int, int]) -> str:
        fresh: set[str] = set()
        texts = []
        for target in statement.targets:
            if target is None:
                texts.append("_")
                continue
            name = self._choose(target, position, last, fresh)
            fresh.add(name)
            self._name(target, name)
            texts.append(name)
        if statement.nested:
            state = "_" if texts[1:] == ["_", "_"] else f"({', '.join(texts[1:])})"
            return f"{texts[0]}, {state}"
        return ", ".join(texts)

    def _commented(
        self,
        text: list[str],
        targets: Sequence[int | None],
        shown: list[TensorType | None],
    ) -> list[str]:
        """The type of the result at the end of the line, where it changes and fits."""
        types = {self.types[target] for target in targets if target is not None}
        if len(types) != 1:
            return text
        (kind,) = types
        if kind is None or kind == shown[0]:
            return text
        shown[0] = kind
        many = " each" if len(targets) - targets.count(None) > 1 else ""
        comment = f"  # {kind}{many}"
        if len(text[-1]) + len(comment) <= WIDTH:
            text[-1] += comment
        return text

    def _passing_on(self) -> list[str]:
        """A comment that names the arguments among the results."""
        if not self.body.passed_on:
            return []
        names = ", ".join(self.names[number] for number in self.body.passed_on)
        text = f"{names}: passed on to the next stage as received"
        return [f"        # {line}" for line in wrapped(text, WIDTH - 10)]

    def _return(self, results: Sequence[Node], shown: list[TensorType | None]) -> list[str]:
        if not results:
            return []
        if len(results) == 1:
            text = lay_out("return ", self._named(results[0]), 8)
            comment = f"  # {self.label}: {self.types[self.body.results[0]]}"
            if self.label and len(text[-1]) + len(comment) <= WIDTH:
                text[-1] += comment
                return text
            return self._commented(text, self.body.results, shown)
        flat_text = f"        return {', '.join(flat(self._named(result)) for result in results)}"
        if len(flat_text) <= WIDTH:
            return [flat_text]
        return lay_out("return ", Seq("()", tuple(map(self._named, results))), 8)


def signature(name: str, arguments: Sequence[str], returned: str) -> list[str]:
    """The first lines of a method, as ruff lays them out."""
    listed = ["self", *arguments]
    line = f"    def {name}({', '.join(listed)}) -> {returned}:"
    if len(line) <= WIDTH:
        return [line]
    inner = [f"        {', '.join(listed)}"]
    if len(inner[0]) > WIDTH:
        inner = [f"        {argument}," for argument in listed]
    return [f"    def {name}(", *inner, f"    ) -> {returned}:"]


def _is_numbered(call: Call) -> bool:
    """Whether a call is of one of many modules, like a layer; each deserves its own line."""
    return isinstance(call.func, Own) and call.func.path.rpartition(".")[2].isdecimal()


def _receiver(statement: Statement) -> int | None:
    """The local value that an in-place call updates."""
    match statement.expr:
        case Call(Attr(Ref(index), _), _, _):
            return index
        case Call(Raw(), (Ref(index), *_), _):
            return index
    return None
