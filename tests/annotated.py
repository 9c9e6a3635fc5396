"""Annotated programs, made once a session, and a run of some of their nodes on real tensors."""

from functools import cache

import pytest
import torch
from torch import fx
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from p2bw.compiler.devices import find_device
from p2bw.compiler.interpret import call_opaque
from p2bw.compiler.storage import kept_tensor, storage_of
from p2bw.compiler.trace import trace
from p2bw.modelfile.load import flatten_microbatch, load_model_file
from p2bw.passes import pipeline, run_passes


def annotated(architecture):
    """An architecture's file, and its program behind all passes."""
    return _annotated(architecture, torch.backends.mkldnn.enabled)


@cache
def _annotated(architecture, onednn):
    """`onednn`: what tests switch off, and what recurrent layers save depends on."""
    if architecture.name.startswith("hf_"):
        pytest.importorskip("transformers")
    file = load_model_file(architecture.path, architecture.factory)
    program = trace(file, architecture.batch)
    return file, run_passes(program, pipeline(find_device("cpu")))


class CountRandom(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class RealRun:
    """Runs nodes on real tensors as a stage would, and looks at what autograd keeps."""

    def __init__(self, file, program):
        torch.manual_seed(0)
        self.model = model = file.model()
        self.program = program
        batch = program.batch_size
        self.feed = flatten_microbatch(file.inputs(batch), file.targets(batch))
        self.own = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
            **program.constants,
        }

    def __call__(self, nodes, received=(), leaves=()):
        """Values by node name, bytes kept (with `leaves`), and how many random operators ran."""
        values = dict(received)
        kept = {leaf.untyped_storage()._cdata: leaf for leaf in leaves}
        mine = {tensor.untyped_storage()._cdata for tensor in self.own.values()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in mine:
                kept[storage._cdata] = tensor  # alive, so that no other gets its address
            return tensor

        feed = iter(self.feed)
        with saved_tensors_hooks(pack, lambda tensor: tensor), CountRandom() as random:
            for node in self.program.graph.nodes:
                if node.op == "placeholder":
                    values[node.name] = next(feed)
                elif node.op == "get_attr":
                    values[node.name] = self.own[node.target]
                elif node.name in nodes:
                    args, kwargs = fx.node.map_arg(
                        (node.args, node.kwargs), lambda n: values[n.name]
                    )
                    with self.program.entering(node):
                        if opaque := self.program.opaque.get(node.name):
                            values[node.name] = call_opaque(self.model, opaque, args[1])
                        else:
                            values[node.name] = node.target(*args, **kwargs)
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        return values, size, random.calls


def saved_bytes(program, nodes):
    """Bytes that autograd keeps of one microbatch when exactly `nodes` run in one stage.

    Each storage counts once. Parameters, buffers and constants do not count, received tensors and
    program inputs do.
    """
    inside = frozenset(nodes)
    kept = dict(kept_storages(program, inside))
    return sum(kept.values())


def kept_storages(program, nodes):
    """What autograd keeps when `nodes` run in one stage: (kind, node, index) -> bytes, unsorted.

    The key ("tensor", node, output) names a storage that the graph knows, ("fresh", node, index)
    one that only autograd knows. Keys can come more than once, with equal bytes.
    """
    for name in nodes:
        for saved in program.fact(name, "saved"):
            if saved.kind == "fresh":
                yield ("fresh", name, saved.index), saved.bytes
                continue
            maker, output = storage_of(program, *kept_tensor(program, name, saved), within=nodes)
            if maker in nodes:
                yield ("tensor", maker, output), saved.bytes
            elif program.node(maker).op != "get_attr":
                yield ("tensor", maker, output), program.facts[maker].out[output].bytes
