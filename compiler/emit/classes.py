"""Which modules of a stage are the same class, and in what their instances differ."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from p2bw.compiler.emit.expr import Num, skeleton
from p2bw.compiler.emit.names import identifier
from p2bw.compiler.emit.tree import Kind, Module, Statement

COLUMNS = 6  # classes with more parameters than this are told apart instead


@dataclass(slots=True)
class Class:
    """One class of the emitted file and all modules that are its instances."""

    instances: list[Module]
    name: str = ""
    # Per number in the class, in order: the parameter that stands for it, "" if all agree.
    columns: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)  # name -> first column with it

    @property
    def sample(self) -> Module:
        return self.instances[0]


@dataclass(slots=True)
class Classes:
    """All classes of a stage, children before parents, and the numbers of every instance."""

    order: list[Class] = field(default_factory=list)
    of: dict[int, Class] = field(default_factory=dict)  # by identity of the module
    numbers: dict[int, list[Num]] = field(default_factory=dict)

    def arguments(self, module: Module) -> dict[str, int | float | str]:
        """The constructor's arguments for one instance."""
        cls = self.of[id(module)]
        return {n: self.numbers[id(module)][i].value for n, i in cls.parameters.items()}


def classify(root: Module) -> Classes:
    """Group the modules below and including the root into classes."""
    classes = Classes()
    heights: dict[int, int] = {}
    levels: dict[int, list[Module]] = {}
    for module in root.walk():
        below = max((heights[id(child)] for child in module.children.values()), default=0)
        heights[id(module)] = below + (module.kind is Kind.CLASS)
        if module.kind is Kind.CLASS:
            levels.setdefault(heights[id(module)], []).append(module)
    for height in sorted(levels):
        groups: dict[object, list[Module]] = {}
        for module in levels[height]:
            numbers: list[Num] = []
            key = _key(classes, module, numbers)
            classes.numbers[id(module)] = numbers
            groups.setdefault(key, []).append(module)
        for instances in groups.values():
            for cls in _settle(classes, instances):
                for module in cls.instances:
                    classes.of[id(module)] = cls
                classes.order.append(cls)
    _sort(classes, root)
    _name(classes, root)
    return classes


def _key(classes: Classes, module: Module, numbers: list[Num]) -> object:
    """What makes two modules the same class: everything but numbers, which go to `numbers`."""
    bodies = tuple(
        (body.arguments, body.results, *(_line(s, numbers) for s in body.statements))
        for body in module.bodies
    )
    return (module.type_name, _held(classes, module, numbers), bodies)


def _line(statement: Statement, numbers: list[Num]) -> object:
    texts = skeleton(statement.expr, numbers), skeleton(statement.context, numbers)
    return (statement.targets, texts, statement.augmented, statement.nested)


def _held(classes: Classes, module: Module, numbers: list[Num]) -> object:
    """The tensors and children of a module."""
    tensors = []
    for name, tensor in module.tensors.items():
        numbers.extend(Num(size, "size") for size in tensor.type.shape)
        kind = (tensor.type.dtype, len(tensor.type.shape), tensor.parameter, tensor.trainable)
        tensors.append((name, kind, tensor.persistent, tensor.literal))
    children = tuple((n, _child(classes, c, numbers)) for n, c in module.children.items())
    return (tuple(tensors), children)


def _child(classes: Classes, module: Module, numbers: list[Num]) -> object:
    if module.kind is Kind.CLASS:
        cls = classes.of[id(module)]
        own = classes.numbers[id(module)]
        numbers.extend(Num(own[column].value, name) for name, column in cls.parameters.items())
        # Tensors that only the world outside of the class knows are part of its definition.
        return ("class", id(cls))
    if module.kind in (Kind.LEAF, Kind.OPAQUE):
        assert module.constructor is not None
        return ("leaf", skeleton(module.constructor, numbers), _held(classes, module, numbers))
    return (module.kind.value, module.is_container, _held(classes, module, numbers))


def _settle(classes: Classes, instances: list[Module]) -> Iterator[Class]:
    """Decide the parameters of a group; too many, and it is several classes."""
    rows = [classes.numbers[id(module)] for module in instances]
    cls = Class(instances, columns=[""] * len(rows[0]))
    names: dict[tuple[int | float | str, ...], str] = {}
    for column, numbers in enumerate(zip(*rows, strict=True)):
        values = tuple(number.value for number in numbers)
        if len(set(map(repr, values))) == 1:
            continue
        if values not in names:
            taken = {*cls.parameters, *_taken(instances[0])}
            names[values] = identifier(numbers[0].name, taken)
            cls.parameters[names[values]] = column
        cls.columns[column] = names[values]
    if len(cls.parameters) <= COLUMNS:
        yield cls
        return
    groups: dict[str, list[Module]] = {}
    for module, row in zip(instances, rows, strict=True):
        groups.setdefault(repr([number.value for number in row]), []).append(module)
    for alike in groups.values():
        yield Class(alike, columns=[""] * len(rows[0]))


def _taken(module: Module) -> Iterator[str]:
    yield from module.children
    yield from module.tensors
    yield from ("forward", "training")


def _sort(classes: Classes, root: Module) -> None:
    """Definition order: what a class uses stands above it, in the order of the model."""
    ordered: dict[int, Class] = {}
    for module in root.walk():
        if module.kind is Kind.CLASS:
            cls = classes.of[id(module)]
            ordered.setdefault(id(cls), cls)
    classes.order = list(ordered.values())


def _name(classes: Classes, root: Module) -> None:
    """Names after the user's classes; parts of a module cut in the middle say which part."""
    by_type: dict[str, list[Class]] = {}
    for cls in classes.order:
        if cls.sample is not root:
            by_type.setdefault(cls.sample.class_name, []).append(cls)
    taken: dict[str, Class | None] = dict.fromkeys(("Stage", "Tensor", "OrderedDict"))
    classes.of[id(root)].name = "Stage"
    for type_name, group in by_type.items():
        base = identifier(type_name, set(), "Part")
        for cls in group:
            name = base + _part(cls.sample)
            other = taken.get(name)
            if other is not None:
                mine, theirs = set(cls.sample.children), set(other.sample.children)
                extra = [n for n in cls.sample.children if n not in theirs]
                if theirs < mine and len(extra) <= 2:
                    name += "With" + "And".join(map(_camel, extra))
            cls.name = identifier(name, taken)
            taken[cls.name] = cls


def _part(module: Module) -> str:
    if module.whole:
        return ""
    return "Head" if module.opens else "Tail" if module.closes else "Middle"


def _camel(name: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[^0-9a-zA-Z]+", name))
