"""What a region is to become: its inputs, and whether it is a chain or best written out."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from p2bw.compiler.emit.attributes import Attributes, below
from p2bw.compiler.emit.regions import Layout, Region
from p2bw.compiler.emit.tree import Kind, Module


@dataclass(frozen=True, slots=True)
class Shapes:
    """Judges the regions of one stage."""

    layout: Layout
    attributes: Attributes
    parents: dict[int, Region] = field(default_factory=dict)  # by identity of the region

    def __post_init__(self) -> None:
        waiting = [self.layout.root]
        for region in waiting:
            below = [item for item in region.items if isinstance(item, Region)]
            self.parents.update((id(item), region) for item in below)
            waiting += below

    def is_chain(self, region: Region) -> bool:
        """Whether a region is a Sequential's: each child called once, on what the last gave."""
        before: fx.Node | None = None
        seen = set()
        for item in region.items:
            if not isinstance(item, Region) or item.path in seen:
                return False
            seen.add(item.path)
            name = below(region.path, item.path)
            inputs, outputs = self.inputs(item), self.layout.outputs(item)
            if name is None or not name.isdecimal() or len(inputs) != 1 or len(outputs) != 1:
                return False
            if before is not None and inputs != [before]:
                return False
            before = outputs[0]
        if self.layout.outputs(region) != [before]:
            return False
        contexts = {self.layout.program.facts[node.name].context for node in region.nodes()}
        return len(contexts) == 1

    def inputs(self, region: Region) -> list[fx.Node]:
        """What a region reads and neither makes nor owns, in the order of first use."""
        found: dict[fx.Node, None] = {}
        for node in region.nodes():
            for value in self.layout.reads(node):
                if value.op == "get_attr":
                    if below(region.path, self.attributes.name(value, region.path)) is None:
                        found[value] = None
                elif not region.begin <= self.layout.made.get(value, -1) < region.end:
                    found[value] = None
        return list(found)

    def ambient(self, region: Region) -> int:
        """How many contexts all nodes of a region have in common."""
        contexts = [self.layout.program.facts[node.name].context for node in region.nodes()]
        depth = 0
        while all(len(c) > depth and c[depth] == contexts[0][depth] for c in contexts):
            depth += 1
        return depth

    def is_dissolved(self, region: Region, owner: Module, known: Module | None) -> bool:
        """Whether a module call is better written out where it happens."""
        if known is not None and known.kind in (Kind.LEAF, Kind.SEQUENTIAL):
            return True
        nodes = list(region.nodes())
        reads = [value for node in nodes for value in self.layout.reads(node)]
        held = (str(value.target) for value in reads if value.op == "get_attr")
        if not self.inputs(region) and all(name in self.layout.program.constants for name in held):
            return True  # no tensor to tell the device by
        if any(below(region.path, i.path) is None for i in region.items if isinstance(i, Region)):
            return True
        if owner.kind is Kind.SEQUENTIAL or (known and known.kind is Kind.CLASS):
            return False
        if not region.whole and self._is_minor(region):
            return True
        if all(isinstance(item, Region) and _number_below(region, item) for item in region.items):
            return True  # a container: its modules are called from outside
        # A function in the shape of a module, like an activation.
        bare = len(region.items) == 1 and isinstance(region.items[0], fx.Node)
        return bare and all(self.attributes.owned(region.path, value) is None for value in reads)

    def _is_minor(self, region: Region) -> bool:
        """Whether a part of a module says no more by a class of its own.

        A layer says less only if nothing but operators is left of it; others if they hold no
        parameter, are all that there is of the module around them, only call layers, or are parts
        of a part of a layer.
        """
        reads = (value for node in region.nodes() for value in self.layout.reads(node))
        bare = all(value.op != "get_attr" for value in reads)
        if _is_numbered(region):
            return bare and not any(isinstance(item, Region) for item in region.items)
        layers = all(isinstance(item, Region) and _is_numbered(item) for item in region.items)
        alone = self.parents[id(region)].items == [region]
        return bare or layers or alone or any(map(_is_numbered, self._parts_around(region)))

    def _parts_around(self, region: Region) -> Iterator[Region]:
        while (region := self.parents[id(region)]) is not self.layout.root:
            if not region.whole:
                yield region


def _is_numbered(region: Region) -> bool:
    return region.path.rpartition(".")[2].isdecimal()


def _number_below(region: Region, item: Region) -> bool:
    return item.path.removeprefix(f"{region.path}.").isdecimal()
