"""Contract a weighted directed acyclic graph along edges that cannot close a cycle."""

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_DUST = 1 / 16  # of the limit: what is smaller may join a block that is full already,
_SLACK = 1.25  # until it is this many times too full


class UnionFind:
    """Disjoint sets of 0 .. count-1."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def union(self, a: int, b: int) -> int:
        """Join two sets; the smaller of the two representatives stands for both."""
        a, b = sorted((self.find(a), self.find(b)))
        self._parent[b] = a
        return a

    def groups(self) -> Iterator[tuple[int, ...]]:
        """The sets, by their smallest member; members ascending."""
        members: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            members.setdefault(self.find(item), []).append(item)
        return (tuple(found) for found in members.values())


Size = tuple[float, ...]  # shares of several resources, each of a total of 1


@dataclass(slots=True)
class Contraction:
    """A graph on 0 .. n-1 (numbered in a topological order) while its nodes are being merged.

    `cuts`: for each edge, the bytes that would have to cross if the graph were cut there; `alone`:
    nodes that are merged with no other.
    """

    sizes: list[Size]
    cuts: Mapping[tuple[int, int], int]
    alone: Collection[int] = ()
    joined: UnionFind = field(init=False)
    _after: list[dict[int, int]] = field(init=False)
    _before: list[set[int]] = field(init=False)
    _cores: list[float] = field(init=False)  # the largest share of any node merged into a node
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self._cores = [max(size) for size in self.sizes]
        self.count = len(self.sizes)
        self.joined = UnionFind(self.count)
        self._after = [{} for _ in self.sizes]
        self._before = [set() for _ in self.sizes]
        for (u, v), cut in self.cuts.items():
            self._after[u][v] = cut
            self._before[v].add(u)

    def run(self, limit: float) -> None:
        """Merge along safe edges, costliest cut first, while no share of a node passes `limit`.

        Contracting u -> v is safe if v is u's only successor or u is v's only predecessor: no
        other path leads from u to v. The second kind gives up the cut right behind u, which the
        other successors still need, so it is only done to get rid of dust.
        """
        heap = [self._key(u, v) for u, after in enumerate(self._after) for v in after]
        heapq.heapify(heap)
        while heap:
            key = heapq.heappop(heap)
            u, v = key[-2:]
            if v not in self._after[u] or key != self._key(u, v):
                continue  # merged or changed since; if changed, the new key is in the heap
            if self._mergeable(u, v, limit):
                for edge in self._merge(u, v):
                    heapq.heappush(heap, self._key(*edge))

    def _key(self, u: int, v: int) -> tuple[bool, int, int, int]:
        return (len(self._after[u]) > 1, -self._after[u][v], u, v)

    def _mergeable(self, u: int, v: int, limit: float) -> bool:
        if u in self.alone or v in self.alone:
            return False
        size = max(a + b for a, b in zip(self.sizes[u], self.sizes[v], strict=True))
        dust = min(max(self.sizes[u]), max(self.sizes[v])) <= _DUST * limit
        swept = dust and size <= _SLACK * max(limit, self._cores[u], self._cores[v])
        if len(self._after[u]) == 1:
            return swept or size <= limit * (1 + 1e-9)  # these are sums of rounded numbers
        return swept and len(self._before[v]) == 1

    def _merge(self, u: int, v: int) -> Iterable[tuple[int, int]]:
        """Merge two nodes into one of them; the edges whose keys have changed."""
        del self._after[u][v]
        self._before[v].remove(u)
        keep = self.joined.union(u, v)
        drop = v if keep == u else u
        self.count -= 1
        self._cores[keep] = max(self._cores[keep], self._cores[drop])
        self.sizes[keep] = tuple(
            a + b for a, b in zip(self.sizes[keep], self.sizes[drop], strict=True)
        )
        for w, cut in self._after[drop].items():
            self._after[keep][w] = min(cut, self._after[keep].get(w, cut))
            self._before[w].remove(drop)
            self._before[w].add(keep)
        for w in self._before[drop]:
            cut = self._after[w].pop(drop)
            self._after[w][keep] = min(cut, self._after[w].get(keep, cut))
            self._before[keep].add(w)
        self._after[drop] = {}
        self._before[drop] = set()
        return [(keep, w) for w in self._after[keep]] + [(w, keep) for w in self._before[keep]]
