"""The device-placement JSON of "Efficient Algorithms for Device Placement of DNN Graph Operators"
(NeurIPS 2020), throughput problems: k accelerators and l CPUs.

Nodes of a colour class share a device. Devices are in the order of the forward edges; a class
without forward nodes is ordered by its backward edges, the other way round. The cost of a tensor
adds to the load of its device and of each that reads it.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from p2bw.compiler.placement.loads import LoadProblem, Node, Transfer

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # other fields are for debugging


class _Node(_Data):
    id: int
    name: str = ""
    accelerated: Annotated[bool, Field(alias="supportedOnFpga")] = True
    cpu_time: Annotated[Amount, Field(alias="cpuLatency")]
    time: Annotated[Amount, Field(alias="fpgaLatency")]
    backward: Annotated[bool, Field(alias="isBackwardNode")] = False
    colour: Annotated[int | None, Field(alias="colorClass")] = None
    size: Amount = 0.0


class _Edge(_Data):
    source: Annotated[int, Field(alias="sourceId")]
    target: Annotated[int, Field(alias="destId")]
    cost: Amount


class _File(_Data):
    memory: Annotated[Amount, Field(alias="maxSizePerFPGA")]
    accelerators: Annotated[int, Field(alias="maxFPGAs", ge=1)]
    cpus: Annotated[int, Field(alias="maxCPUs", ge=0)] = 0
    nodes: Annotated[tuple[_Node, ...], Field(min_length=1)]
    edges: tuple[_Edge, ...]


def read_device_placement(text: bytes) -> LoadProblem:
    """The problem in a file; ValueError names the field that is not valid."""
    file = _File.model_validate_json(text)
    number = {node.id: i for i, node in enumerate(file.nodes)}
    if len(number) < len(file.nodes):
        raise ValueError("nodes: two of one id")
    for i, edge in enumerate(file.edges):
        for field, end in (("sourceId", edge.source), ("destId", edge.target)):
            if end not in number:
                raise ValueError(f"edges.{i}.{field}: no node has the id {end}")
    readers: dict[int, list[int]] = {}
    costs: dict[int, float] = {}
    for i, edge in enumerate(file.edges):
        if costs.setdefault(edge.source, edge.cost) != edge.cost:
            raise ValueError(f"edges.{i}.cost: another edge of node {edge.source} has another cost")
        readers.setdefault(number[edge.source], []).append(number[edge.target])
    return LoadProblem(
        nodes=tuple(
            Node(
                name=str(node.id),
                time=node.time,
                size=node.size,
                cpu_time=node.cpu_time,
                accelerated=node.accelerated,
            )
            for node in file.nodes
        ),
        transfers=tuple(
            Transfer((source, *targets), costs[file.nodes[source].id])
            for source, targets in readers.items()
        ),
        order=tuple(_order(file, number)),
        together=_classes(file),
        memory=file.memory,
        devices=file.accelerators,
        timed_on_cpu=True,
        unit="in the file's unit of time",
    )


def _classes(file: _File) -> tuple[tuple[int, ...], ...]:
    found: dict[int, list[int]] = {}
    for i, node in enumerate(file.nodes):
        if node.colour is not None:
            found.setdefault(node.colour, []).append(i)
    return tuple(tuple(members) for members in found.values() if len(members) > 1)


def _order(file: _File, number: dict[int, int]) -> list[tuple[int, int]]:
    """What comes before what: forward edges, and mirrored backward edges of what has no forward."""
    has_forward = {node.colour for node in file.nodes if not node.backward}
    alone = [
        node.backward and (node.colour is None or node.colour not in has_forward)
        for node in file.nodes
    ]
    order = []
    for edge in file.edges:
        u, v = number[edge.source], number[edge.target]
        backward = file.nodes[u].backward, file.nodes[v].backward
        if backward == (False, False):
            order.append((u, v))
        elif all(backward) and (alone[u] or alone[v]):
            order.append((v, u))
    return order
