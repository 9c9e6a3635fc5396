"""Which replicas do the same at the same time, so that one of them stands for all."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from p2bw.compiler.links import Network, Port
from p2bw.compiler.simulation.job import PS, Job

Pair = tuple[int, int]  # from stage, to stage

# Ranks that draw jitter of their own; further replicas do as those before them did, so that a large
# pipeline can be simulated at all. What that leaves out is small: how much later the last of many
# comes than the last of a few, each with the mean over a batch.
DRAWN = 256
FEWEST = 4  # replicas that do, however many stages there are


@dataclass(frozen=True, slots=True)
class Route:
    """A way through classes of ports: each class, and how many of the flow's equals share it."""

    ports: tuple[tuple[int, int], ...]  # class of ports, flows of this kind that each carries
    latency: int  # ps


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Replicas and ports in classes.

    Links are shared fairly, so equal replicas on equal links stay equal: the classes are the
    coarsest equitable partition, where each port of a class carries as many flows of each class of
    replicas between each pair of stages. What is simulated for one replica of a class then holds
    for all of it, exactly.
    """

    classes: tuple[tuple[int, ...], ...]  # the replicas of each
    pairs: tuple[Pair, ...]
    routes: tuple[tuple[Route, ...], ...]  # by class of replicas, then pair
    rings: tuple[Route, ...]  # by stage: the sum over all replicas
    bandwidth: tuple[int, ...]  # bytes/s of each class of ports
    names: tuple[str, ...]  # of the first port of each class
    counts: tuple[int, ...]  # ports of each class


def find_symmetry(job: Job, network: Network) -> Symmetry:
    pairs = tuple(sorted({(c.source, c.target) for c in job.pipe.channels}))
    routes = [
        [network.route(job.ranks[a][r], job.ranks[b][r]) for a, b in pairs]
        for r in range(job.width)
    ]
    rings = [_ring(network, ranks) for ranks in job.ranks]
    color, port_color = _refine(job, network, routes, rings)
    members: dict[int, list[int]] = defaultdict(list)
    for replica, own in enumerate(color):
        members[own].append(replica)
    first: dict[int, Port] = {}
    for port, own in port_color.items():
        first.setdefault(own, port)
    carried = _carried(routes, color)
    return Symmetry(
        classes=tuple(map(tuple, members.values())),
        pairs=pairs,
        routes=tuple(
            tuple(
                Route(
                    tuple(
                        (own, carried[first[own]][i, color[same[0]]])
                        for own in dict.fromkeys(port_color[port] for port in ports)
                    ),
                    latency(network, ports),
                )
                for i, ports in enumerate(routes[same[0]])
            )
            for same in members.values()
        ),
        rings=tuple(
            Route(
                tuple(
                    (own, ring[first[own]])
                    for own in dict.fromkeys(port_color[port] for port in ring)
                ),
                # Twice around, as many hops as there are other replicas; the slowest sets the pace.
                2 * (job.width - 1) * _ring_latency(network, ranks),
            )
            for ring, ranks in zip(rings, job.ranks, strict=True)
        ),
        bandwidth=tuple(int(network.bandwidth(port)) for port in first.values()),
        names=tuple(network.name(port) for port in first.values()),
        counts=tuple(Counter(port_color.values())[own] for own in first),
    )


def latency(network: Network, ports: Iterable[Port]) -> int:
    """Picoseconds of a message's way: that of the outermost level, or of all the wires."""
    topology = network.topology
    if topology.wires:
        return sum(round(topology.wires[number].latency_s * PS) for _, number, _ in ports)
    return max((round(topology.levels[level].latency_s * PS) for level, _, _ in ports), default=0)


def _hops(ranks: Sequence[int]) -> list[Pair]:
    return list(zip(ranks, (*ranks[1:], ranks[0]), strict=True)) if len(ranks) > 1 else []


def _ring(network: Network, ranks: Sequence[int]) -> Counter[Port]:
    return Counter(port for a, b in _hops(ranks) for port in network.route(a, b))


def _ring_latency(network: Network, ranks: Sequence[int]) -> int:
    return max((latency(network, network.route(a, b)) for a, b in _hops(ranks)), default=0)


def _carried(
    routes: Sequence[Sequence[Sequence[Port]]], color: Sequence[int]
) -> Mapping[Port, Counter[tuple[int, int]]]:
    """By port: flows of each pair of stages and class of replicas."""
    carried: dict[Port, Counter[tuple[int, int]]] = defaultdict(Counter)
    for replica, own in enumerate(routes):
        for i, ports in enumerate(own):
            for port in ports:
                carried[port][i, color[replica]] += 1
    return carried


def _refine(
    job: Job,
    network: Network,
    routes: Sequence[Sequence[Sequence[Port]]],
    rings: Sequence[Counter[Port]],
) -> tuple[list[int], dict[Port, int]]:
    """Split classes until all members of each look alike from every other."""
    color = _numbered(_start(job, replica) for replica in range(job.width))
    around: dict[Port, list[tuple[int, int]]] = defaultdict(list)
    for stage, ring in enumerate(rings):
        for port, count in ring.items():
            around[port].append((stage, count))
    while True:
        carried = _carried(routes, color)
        ports = list(dict.fromkeys((*carried, *around)))
        looks = _numbered(
            (
                network.bandwidth(port),
                latency(network, [port]),
                tuple(sorted(carried[port].items())) if port in carried else (),
                tuple(around.get(port, ())),
            )
            for port in ports
        )
        port_color = dict(zip(ports, looks, strict=True))
        finer = _numbered(
            (color[r], tuple(tuple(port_color[port] for port in way) for way in routes[r]))
            for r in range(job.width)
        )
        if max(finer) == max(color):
            return color, port_color
        color = finer


def _start(job: Job, replica: int) -> Hashable:
    """What tells replicas apart to begin with: jitter, and ranks that are slower."""
    slow = tuple(job.factors.get(ranks[replica]) for ranks in job.ranks)
    drawn = max(FEWEST, DRAWN // job.pipe.depth)
    return slow, replica % drawn if job.jitter else None


def _numbered(looks: Iterable[Hashable]) -> list[int]:
    """Numbers from 0 on, in the order in which different looks come first."""
    known: dict[Hashable, int] = {}
    return [known.setdefault(look, len(known)) for look in looks]
