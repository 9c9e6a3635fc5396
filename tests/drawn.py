"""Small placement problems, drawn at random, that brute force can solve."""

from hypothesis import strategies as st

from p2bw.compiler.problem import (
    BlockCost,
    Constraints,
    ParameterCost,
    PlacementProblem,
    TensorCost,
    Times,
)

small = st.integers(0, 9)
size = st.integers(0, 20)
seconds = small.map(lambda tenths: tenths / 10)

# Of a device in bytes, so that much, little or nothing fits; the last binds nothing.
memories = st.sampled_from([150, 200, 300, 10**6])


@st.composite
def problems(draw, topologies, most):
    """Up to so many blocks with skips, fan-out, ties and constraints, on a topology of those."""
    topology = draw(topologies)
    others = [kind.name for kind in topology.kinds[1:]]
    count = draw(st.sampled_from(range(most, 0, -1)))
    names = [f"b{i}" for i in range(count)]
    blocks = tuple(
        BlockCost(
            name=name,
            forward_s=draw(seconds),
            backward_s=draw(seconds),
            on={kind: Times(forward_s=draw(seconds), backward_s=draw(seconds)) for kind in others},
            stash_bytes=draw(size),
            transient_bytes=draw(size),
            buffer_bytes=draw(small),
        )
        for name in names
    )
    tensors = []
    for producer in range(count - 1):
        readers = draw(st.sets(st.integers(producer + 1, count - 1), max_size=3))
        if producer % 3 or draw(st.booleans()):
            readers.add(producer + 1)  # mostly connected: a row with skips
        if readers:
            tensors.append(
                TensorCost(
                    name=f"t{producer}",
                    producer=names[producer],
                    consumers=tuple(names[reader] for reader in sorted(readers)),
                    bytes=draw(size),
                    gradient_bytes=draw(size),
                    saved=draw(st.booleans()),
                )
            )
    parameters = tuple(
        ParameterCost(
            name=f"w{i}",
            bytes=draw(size),
            gradient_bytes=draw(size | st.just(0)),  # now and then it never changes
            optimizer_bytes=draw(size),
            update_s=draw(seconds),
            on={kind: draw(seconds) for kind in others},
            blocks=tuple(sorted(draw(st.sets(st.sampled_from(names), min_size=1, max_size=3)))),
        )
        for i in range(draw(st.integers(0, 4)))
    )
    return PlacementProblem(
        microbatch=draw(st.integers(1, 3)),
        clip_norm=draw(st.sampled_from([None, None, 1.0])),
        schedule=draw(st.sampled_from(["2bw", "2bw", "flush", "gpipe", "stash"])),
        microbatches=draw(st.sampled_from([None, None, 4])),
        blocks=blocks,
        tensors=tuple(tensors),
        parameters=parameters,
        topology=topology,
        constraints=draw(_constraints(names, [tensor.name for tensor in tensors])),
    )


@st.composite
def _constraints(draw, names, tensors):
    if draw(st.integers(0, 3)):
        return Constraints()
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names))
    return Constraints(
        pin=draw(st.dictionaries(st.sampled_from(names), st.integers(0, 1), max_size=1)),
        together=tuple(draw(st.lists(pairs, max_size=1))),
        apart=tuple(p for p in draw(st.lists(pairs, max_size=1)) if p[0] != p[1]),
        never_cut=tuple(draw(st.lists(st.sampled_from(tensors), max_size=1)) if tensors else ()),
        max_stages=draw(st.sampled_from([None, 2, 3])),
    )
