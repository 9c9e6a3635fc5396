"""Lines of a forward, and the runs of them that are loops over the modules of a container."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
    """Runs of calls of all modules of a container, each on what the last gave, as loops."""
    statements = body.statements
    uses = Counter(r for s in statements for r in refs(s.expr)) + Counter(body.results)
    found: list[Line] = []
    position = 0
    while position < len(statements):
        run = _run(module, resolve, statements[position:], uses)
        if run is None:
            found.append(Line(statements[position]))
            position += 1
        else:
            found.append(run[0])
            position += run[1]
    return found


def _run(
    module: Module, resolve: Resolve, statements: Sequence[Statement], uses: Counter[int]
) -> tuple[Line, int] | None:
    """The loop that the first statements are, and how many they are."""
    first = statements[0]
    container = _container(module, first)
    if container is None:
        return None
    path, children = container
    run = statements[: len(children)]
    called = [_callee(statement) for statement in run]
    if len(run) < 2 or called != [f"{path}.{name}" for name in children]:
        return None
    carried = None
    for before, after in pairwise(run):
        target = before.targets[0]
        assert target is not None
        spot = _replaced(before, after, target, carried)
        if spot is None or uses[target] != 1 or after.context != first.context:
            return None
        carried = spot
    assert carried is not None
    return _loop(module, resolve, path, run, carried), len(run)


def _loop(
    module: Module, resolve: Resolve, path: str, run: Sequence[Statement], carried: int
) -> Line:
    first, last = run[0], run[-1]
    assert isinstance(first.expr, Call)
    start = first.expr.args[carried]
    assert isinstance(start, Ref)
    assert last.targets[0] is not None
    args = list(first.expr.args)
    args[carried] = Ref(last.targets[0])
    container = module.find(path)
    assert container is not None
    variable = _loop_variable(path, container)
    text = flat(resolve(Own(path)))
    statement = replace(last, expr=Call(Raw(variable), tuple(args)), forced=True)
    return Line(statement, text if container.is_list else f"{text}.values()", variable, start.index)


def _callee(statement: Statement) -> str:
    """The path of the module that a statement calls, "" if it calls none."""
    match statement.expr:
        case Call(Own(path), _, ()):
            return path
    return ""


def _container(module: Module, statement: Statement) -> tuple[str, list[str]] | None:
    """The container whose first module a statement calls, and the names of all its modules."""
    path, _, name = _callee(statement).rpartition(".")
    if not path or len(statement.targets) != 1 or statement.targets[0] is None:
        return None
    owner = module.find(path)
    if owner is None or not owner.is_container or next(iter(owner.children)) != name:
        return None
    return path, list(owner.children)


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
