"""Lines of a forward, and the runs of them that are loops over the modules of a container."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from p2bw.compiler.emit.expr import Call, Node, Own, Raw, Ref, flat, refs
from p2bw.compiler.emit.names import identifier
from p2bw.compiler.emit.tree import Body, Module, Statement

Resolve = Callable[[Node], Node]  # attributes of self -> text


@dataclass(slots=True)
class Line:
    """A statement with others written into it, or a loop over the modules of a container."""

    statement: Statement
    loop: str = ""  # what is looped over
    variable: str = ""
    start: int = -1  # the value that the loop starts with

    @property
    def reads(self) -> tuple[int, ...]:
        contexts = (index for context in self.statement.context for index in refs(context))
        start = (self.start,) if self.loop else ()
        return (*refs(self.statement.expr), *contexts, *start)


def find_loops(body: Body, module: Module, resolve: Resolve) -> list[Line]:
    """The statements of a body, runs of calls that make a loop as one line each."""
    statements = body.statements
    uses = Counter(r for s in statements for r in refs(s.expr)) + Counter(body.results)
    found: list[Line] = []
    position = 0
    while position < len(statements):
        run, carried = _run(module, statements, position, uses)
        loop = _loop(module, resolve, run, carried) if len(run) > 1 else None
        found.append(loop or Line(statements[position]))
        position += len(run) if loop else 1
    return found


def _run(
    module: Module, statements: Sequence[Statement], begin: int, uses: Counter[int]
) -> tuple[Sequence[Statement], int]:
    """The longest run of calls of a container's modules in order, each on what the last gave.

    With it goes the position of the argument that is carried from call to call.
    """
    names = _container(module, statements[begin])
    end, carried = begin + 1, None
    while end < len(statements) and end - begin < len(names):
        before, after = statements[end - 1], statements[end]
        target = before.targets[0] if len(before.targets) == 1 else None
        if target is None or uses[target] != 1 or after.context != before.context:
            break
        spot = _replaced(before, after, target, carried)
        if spot is None or _callee(after) != names[end - begin]:
            break
        end, carried = end + 1, spot
    return statements[begin:end], carried or 0


def _loop(module: Module, resolve: Resolve, run: Sequence[Statement], carried: int) -> Line | None:
    """A run of calls as a loop, if it reads better so."""
    first, last = run[0], run[-1]
    path, _, name = _callee(first).rpartition(".")
    container = module.find(path)
    assert container is not None
    names = list(container.children)
    begin = names.index(name)
    text = flat(resolve(Own(path)))
    variable = _loop_variable(path, container)
    call: Node = Raw(variable)
    if len(run) == len(names):
        space = text if container.is_list else f"{text}.values()"
    elif len(run) < 3:
        return None
    elif container.is_list:
        space = f"{text}[{begin or ''}:{begin + len(run) if begin + len(run) < len(names) else ''}]"
    else:
        numbers = [int(n) for n in names[begin : begin + len(run)] if n.isdecimal()]
        if numbers != list(range(int(name), int(name) + len(run))):
            return None
        variable, space = "i", f"range({numbers[0]}, {numbers[-1] + 1})"
        call = Raw(f"{text}[str(i)]")
    assert isinstance(first.expr, Call)
    args, target = list(first.expr.args), last.targets[0]
    start = args[carried]
    assert isinstance(start, Ref)
    assert target is not None
    args[carried] = Ref(target)
    statement = replace(last, expr=Call(call, tuple(args)), forced=True)
    return Line(statement, space, variable, start.index)


def _callee(statement: Statement) -> str:
    """The path of the module that a statement calls, "" if it calls none."""
    match statement.expr:
        case Call(Own(path), _, ()):
            return path
    return ""


def _container(module: Module, statement: Statement) -> list[str]:
    """The module that a statement calls and those behind it in its container, by path."""
    path, _, name = _callee(statement).rpartition(".")
    owner = module.find(path) if path else None
    if owner is None or not owner.is_container:
        return []
    names = list(owner.children)
    return [f"{path}.{n}" for n in names[names.index(name) :]]


def _replaced(before: Statement, after: Statement, target: int, carried: int | None) -> int | None:
    """Where `after` takes what `before` gave, if that is all in which their arguments differ."""
    match before.expr, after.expr:
        case Call(_, old, ()), Call(_, new, ()) if len(old) == len(new) and len(after.targets) == 1:
            spots = [i for i, arg in enumerate(new) if arg == Ref(target)]
            if len(spots) != 1 or carried not in (None, spots[0]):
                return None
            spot = spots[0]
            same = all(old[i] == new[i] for i in range(len(new)) if i != spot)
            return spot if same and isinstance(old[spot], Ref) else None
    return None


def _loop_variable(path: str, container: Module) -> str:
    """`block` for modules whose class is a Block."""
    name = path.rpartition(".")[2]
    classes = {child.class_name for child in container.children.values()}
    for word in ("block", "layer", "stage", "cell"):
        if all(word in cls.lower() for cls in classes):
            return word
    singular = name[:-1] if name.endswith("s") and len(name) > 2 else "module"
    return identifier(singular, ("self",))
