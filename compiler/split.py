"""A placed Program, cut: what each stage runs, receives and sends."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from p2bw.compiler.program import Program, TensorType, tensor_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One tensor on its way from one stage to one other, every microbatch.

    A tensor with several consumer stages is sent to each of them; one that is relayed is sent to
    the next stage, which sends it to the one after, up to its last reader. Where `gradient` is
    true, its gradient travels back along the same edge.
    """

    tensor: str
    producer: int  # the sender: of a relayed tensor, each stage on its way but the last
    consumer: int
    type: TensorType
    gradient: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """What stage `index` runs: `Stage.forward(*arguments) -> results`."""

    index: int
    nodes: tuple[str, ...]  # call_function nodes, in program order
    attributes: tuple[str, ...]  # get_attr nodes that they read, in program order
    inputs: tuple[str, ...]  # program inputs that they read, in program order
    receives: tuple[Transfer, ...]  # in program order of the tensors
    sends: tuple[Transfer, ...]  # in program order of the tensors, then by consumer
    results: tuple[str, ...]  # tensors sent (each once, program order), then the loss if it is here

    @property
    def arguments(self) -> tuple[str, ...]:
        """Parameters of `Stage.forward`, in order: program inputs, then received tensors."""
        return (*self.inputs, *(transfer.tensor for transfer in self.receives))

    @property
    def passed_on(self) -> tuple[str, ...]:
        """Tensors that it receives and sends to the next stage, whether it reads them or not."""
        received = {transfer.tensor for transfer in self.receives}
        return tuple(transfer.tensor for transfer in self.sends if transfer.tensor in received)


def split(
    program: Program, stage_of_block: Mapping[str, int], relayed: Collection[str] = ()
) -> tuple[StageGraph, ...]:
    """Cut a program with blocks into stages 0 .. max(stage_of_block).

    Tensors go straight to the stages that read them, but for those that are to be `relayed`.
    """
    assert program.blocks is not None, "group_blocks has not run"
    stage = {node: stage_of_block[block.name] for block in program.blocks for node in block.nodes}
    depth = 1 + max(stage.values())
    position = {node.name: i for i, node in enumerate(program.graph.nodes)}
    reads: list[set[str]] = [set() for _ in range(depth)]
    for node in program.compute_nodes:
        reads[stage[node.name]].update(argument.name for argument in tensor_arguments(node))
    transfers = _transfers(program, stage, reads, relayed)

    def in_order(names: set[str], op: str) -> tuple[str, ...]:
        return tuple(sorted((n for n in names if program.node(n).op == op), key=position.get))  # type: ignore[arg-type]

    stages = []
    for k in range(depth):
        sends = tuple(t for t in transfers if t.producer == k)
        results = dict.fromkeys(t.tensor for t in sends)
        if stage[program.loss.name] == k:
            results[program.loss.name] = None
        stages.append(
            StageGraph(
                index=k,
                nodes=tuple(n.name for n in program.compute_nodes if stage[n.name] == k),
                attributes=in_order(reads[k], "get_attr"),
                inputs=in_order(reads[k], "placeholder"),
                receives=tuple(t for t in transfers if t.consumer == k),
                sends=sends,
                results=tuple(results),
            )
        )
    return tuple(stages)


def _transfers(
    program: Program,
    stage: Mapping[str, int],
    reads: list[set[str]],
    relayed: Collection[str],
) -> tuple[Transfer, ...]:
    found = []
    for node in program.compute_nodes:
        producer = stage[node.name]
        readers = [k for k, names in enumerate(reads) if k != producer and node.name in names]
        assert all(k > producer for k in readers), f"{node.name} flows from {producer} to {readers}"
        for sender, receiver in _hops(producer, readers, node.name in relayed):
            found.append(_transfer(program, node, sender, receiver))
    return tuple(found)


def _hops(producer: int, readers: list[int], relayed: bool) -> Iterator[tuple[int, int]]:
    """From where to where a tensor is sent, in the order of the receivers."""
    if relayed:
        yield from pairwise(range(producer, max(readers, default=producer) + 1))
    else:
        yield from ((producer, reader) for reader in readers)


def _transfer(program: Program, node: fx.Node, producer: int, consumer: int) -> Transfer:
    (tensor_type,) = program.facts[node.name].out
    (gradient,) = program.fact(node, "requires_grad")
    return Transfer(
        tensor=node.name,
        producer=producer,
        consumer=consumer,
        type=tensor_type,
        gradient=gradient,
    )
