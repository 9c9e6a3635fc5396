"""A placed and cut Program in numbers and names: the stages of the plan."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from p2bw.compiler.placement.evaluate import StageNumbers
from p2bw.compiler.placement.result import Placement
from p2bw.compiler.plan import (
    Memory,
    OpaqueSpec,
    Seconds,
    Stage,
    TensorSpec,
    TiedSpec,
    TransferSpec,
)
from p2bw.compiler.program import OpaqueCall, Program, TensorType
from p2bw.compiler.split import StageGraph, Transfer
from p2bw.contract.plan import describe


def describe_stages(
    program: Program,
    cut: Sequence[StageGraph],
    placement: Placement,
) -> tuple[Stage, ...]:
    """The stages of the plan, with the placement's numbers."""
    random = _random_calls(program)
    tied = {t.names[0]: t for t in tied_parameters(program, cut)}
    return tuple(
        Stage(
            index=graph.index,
            blocks=tuple(
                block.name for block in program.blocks or () if block.nodes[0] in graph.nodes
            ),
            modules=tuple(modules_of(program, graph.nodes)),
            parameters=sum(program.parameters[n].type.elements for n in _held(program, graph)),
            tied=tuple(n for n in _held(program, graph) if n in tied and len(tied[n].stages) > 1),
            recompute=placement.recompute[graph.index],
            random=tuple(i for node in graph.nodes for i in random[node]),
            flops_forward=sum(program.fact(n, "flops_forward") for n in graph.nodes),
            flops_backward=sum(program.fact(n, "flops_backward") for n in graph.nodes),
            compute_s=_seconds(placement.stages[graph.index]),
            memory=_memory(placement.stages[graph.index]),
            inputs=graph.inputs,
            arguments=graph.arguments,
            results=graph.results,
            receives=tuple(_transfer(t, t.producer) for t in graph.receives),
            sends=tuple(_transfer(t, t.consumer) for t in graph.sends),
            devices=placement.devices[graph.index],
        )
        for graph in cut
    )


def tensor_spec(name: str, kind: TensorType) -> TensorSpec:
    return TensorSpec(name=name, shape=kind.shape, dtype=str(kind.dtype).removeprefix("torch."))


def _transfer(transfer: Transfer, peer: int) -> TransferSpec:
    spec = tensor_spec(transfer.tensor, transfer.type)
    return TransferSpec(
        tensor=spec.name,
        peer=peer,
        shape=spec.shape,
        dtype=spec.dtype,
        bytes=transfer.type.bytes,
        gradient=transfer.gradient,
    )


def _held(program: Program, graph: StageGraph) -> tuple[str, ...]:
    """Canonical names of the parameters that a stage holds."""
    targets = (str(program.node(name).target) for name in graph.attributes)
    return tuple(target for target in targets if target in program.parameters)


def tied_parameters(program: Program, cut: Iterable[StageGraph]) -> tuple[TiedSpec, ...]:
    """Parameters with several names, or on several stages."""
    stages: dict[str, list[int]] = {}
    for graph in cut:
        for name in _held(program, graph):
            stages.setdefault(name, []).append(graph.index)
    return tuple(
        TiedSpec(
            names=program.parameters[name].names,
            stages=tuple(where),
            bytes=program.parameters[name].type.bytes,
        )
        for name, where in stages.items()
        if len(where) > 1 or len(program.parameters[name].names) > 1
    )


def opaque_modules(program: Program, cut: Sequence[StageGraph]) -> tuple[OpaqueSpec, ...]:
    """The modules that could not be traced, in program order."""
    stage = {name: graph.index for graph in cut for name in graph.nodes}
    nodes: dict[str, list[str]] = {}
    for name, call in program.opaque.items():
        nodes.setdefault(call.path, []).append(name)
    return tuple(
        OpaqueSpec(
            module=path,
            type=program.opaque[names[0]].type_name,
            stages=tuple(sorted({stage[name] for name in names})),
            reason=program.opaque[names[0]].reason,
            returns=tuple(dict.fromkeys(_returns(program.opaque[name]) for name in names)),
            flops_forward=sum(program.fact(name, "flops_forward") for name in names),
            flops_backward=sum(program.fact(name, "flops_backward") for name in names),
            costs="declared" if program.opaque[names[0]].declared else "counted",
        )
        for path, names in nodes.items()
    )


def _returns(call: OpaqueCall) -> tuple[str, ...]:
    return tuple(describe(kind.shape, kind.dtype) for kind in call.outputs)


def _random_calls(program: Program) -> Mapping[str, range]:
    """Which of the program's seeded random operator calls each node makes."""
    calls, first = {}, 0
    for node in program.compute_nodes:
        count = program.fact(node, "random_calls")
        calls[node.name] = range(first, first + count)
        first += count
    return calls


def _seconds(numbers: StageNumbers) -> Seconds:
    return Seconds(
        forward=numbers.forward_s,
        backward=numbers.backward_s,
        recompute=numbers.recompute_s,
        update=numbers.update_s,
    )


def _memory(numbers: StageNumbers) -> Memory:
    kinds = ("weights", "gradients", "optimizer", "stash", "buffers", "transient", "reserve")
    parts = {kind: getattr(numbers, kind) for kind in kinds}
    return Memory(**parts, total=numbers.total, limit=numbers.limit)


def modules_of(program: Program, nodes: Sequence[str]) -> Iterator[str]:
    """The largest modules that `nodes` hold whole, then what else they touch, for people.

    Glue that belongs to a module of which only a part is here (the residual additions of a layer
    that was cut) goes without saying, unless there is nothing else to say.
    """
    inside = set(nodes)
    members: dict[str, list[str]] = {}
    for node in program.compute_nodes:
        for scope in program.facts[node.name].scopes:
            members.setdefault(scope.path, []).append(node.name)
    whole = {path for path, names in members.items() if path and inside.issuperset(names)}
    labels: dict[str, None] = {}
    partial: dict[str, None] = {}
    for name in nodes:
        scopes = program.facts[name].scopes
        path = next((scope.path for scope in scopes if scope.path in whole), None)
        if path is not None:
            labels[path] = None
        elif not scopes:
            labels["loss"] = None
        elif scopes[-1].path:
            partial[f"{scopes[-1].path} (part)"] = None
    yield from labels or partial or {"(glue)": None}
