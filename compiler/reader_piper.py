"""The JSON of Piper (NeurIPS 2021): nodes with variants by degree of tensor parallelism ("TMPCs").

Variants of one node and degree have to agree on their `syncTimeFw` and `syncTimeBw` (bytes).
"""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from p2bw.compiler.placement.variants import Edge, Variant, VariantNode, VariantProblem

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Degree = Annotated[int, Field(ge=1)]
AGREE = "variants of one degree that differ here are not supported"
UNIT = "in the file's unit of time per microbatch"


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # other fields are for debugging


class _Variant(_Data):
    id: Annotated[str, Field(min_length=1)]
    time: Annotated[Amount, Field(alias="timePerSample")]
    parameters: Annotated[Amount, Field(alias="parameterSize")]
    per_microbatch: Annotated[Amount, Field(alias="memoryUsageA")]
    fixed: Annotated[Amount, Field(alias="memoryUsageB")]
    sync_forward: Annotated[Mapping[int, Amount], Field(alias="syncTimeFw")]
    sync_backward: Annotated[Mapping[int, Amount], Field(alias="syncTimeBw")]


class _Node(_Data):
    id: int
    variants: Annotated[
        Mapping[Degree, Annotated[tuple[_Variant, ...], Field(min_length=1)]],
        Field(alias="TMPCs", min_length=1),
    ]


class _Edge(_Data):
    source: Annotated[int, Field(alias="sourceId")]
    target: Annotated[int, Field(alias="destId")]
    bytes: Annotated[Amount, Field(alias="communicationCost")]


class _File(_Data):
    memory: Annotated[Positive, Field(alias="maxMemoryPerDevice")]
    devices: Annotated[int, Field(alias="maxDevices", ge=1)]
    bandwidth: Positive
    # Piper's README says maxBatchSize, its code reads mbsInBatch.
    microbatches: Annotated[
        int, Field(validation_alias=AliasChoices("mbsInBatch", "maxBatchSize"), ge=1)
    ]
    nodes: Annotated[tuple[_Node, ...], Field(min_length=1)]
    edges: tuple[_Edge, ...]


def read_piper(text: bytes) -> VariantProblem:
    """The problem in a file; ValueError names the field that is not valid."""
    file = _File.model_validate_json(text)
    number = {node.id: i for i, node in enumerate(file.nodes)}
    if len(number) < len(file.nodes):
        raise ValueError("nodes: two of one id")
    _check_edges(file, number)
    for i, node in enumerate(file.nodes):
        _check_variants(file, f"nodes.{i}", node)
    return VariantProblem(
        nodes=tuple(
            VariantNode(
                name=str(node.id),
                variants={degree: _variants(own) for degree, own in node.variants.items()},
            )
            for node in file.nodes
        ),
        edges=tuple(
            Edge(
                source=number[edge.source],
                target=number[edge.target],
                bytes=edge.bytes,
                sync_source={
                    degree: variants[0].sync_backward[edge.target]
                    for degree, variants in file.nodes[number[edge.source]].variants.items()
                },
                sync_target={
                    degree: variants[0].sync_forward[edge.source]
                    for degree, variants in file.nodes[number[edge.target]].variants.items()
                },
            )
            for edge in file.edges
        ),
        memory=file.memory,
        devices=file.devices,
        microbatches=file.microbatches,
        bandwidth=file.bandwidth,
        unit=UNIT,
    )


def _variants(variants: tuple[_Variant, ...]) -> tuple[Variant, ...]:
    return tuple(
        Variant(
            name=own.id,
            time=own.time,
            parameters=own.parameters,
            per_microbatch=own.per_microbatch,
            fixed=own.fixed,
        )
        for own in variants
    )


def _check_edges(file: _File, number: Mapping[int, int]) -> None:
    seen = set()
    for i, edge in enumerate(file.edges):
        for field, end in (("sourceId", edge.source), ("destId", edge.target)):
            if end not in number:
                raise ValueError(f"edges.{i}.{field}: no node has the id {end}")
        if (edge.source, edge.target) in seen:
            raise ValueError(f"edges.{i}: a second edge from {edge.source} to {edge.target}")
        seen.add((edge.source, edge.target))
    try:
        TopologicalSorter(_before(file)).prepare()
    except CycleError as error:
        circle = " <- ".join(map(str, error.args[1]))
        raise ValueError(f"edges: nodes depend on each other: {circle}") from None


def _before(file: _File) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for edge in file.edges:
        found.setdefault(edge.target, []).append(edge.source)
    return found


def _check_variants(file: _File, where: str, node: _Node) -> None:
    """Each variant knows the node's edges, and no others; those of a degree agree on them."""
    sources = {edge.source for edge in file.edges if edge.target == node.id}
    targets = {edge.target for edge in file.edges if edge.source == node.id}
    for degree, variants in node.variants.items():
        here = f"{where}.TMPCs.{degree}"
        if len({own.id for own in variants}) < len(variants):
            raise ValueError(f"{here}: two variants of one id")
        for i, own in enumerate(variants):
            for field, sync, ends in (
                ("syncTimeFw", own.sync_forward, sources),
                ("syncTimeBw", own.sync_backward, targets),
            ):
                for end in sorted(ends ^ sync.keys()):
                    fact = "nothing for the edge with" if end in ends else "no edge with"
                    raise ValueError(f"{here}.{i}.{field}: {fact} node {end}")
            if own.sync_forward != variants[0].sync_forward:
                raise ValueError(f"{here}.{i}.syncTimeFw: {variants[0].id} has another; {AGREE}")
            if own.sync_backward != variants[0].sync_backward:
                raise ValueError(f"{here}.{i}.syncTimeBw: {variants[0].id} has another; {AGREE}")
