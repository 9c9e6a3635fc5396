"""What a stage really keeps in memory, against what its plan counts."""

from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from torch import Tensor

from p2bw.compiler.driver import Compiled, compile_model
from p2bw.contract.job import Job
from p2bw.runtime.compute import Compute
from p2bw.runtime.local import Trained, train_in_threads

pytestmark = pytest.mark.usefixtures("one_thread")


def run_and_measure(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, int], Trained]:
    """Most bytes per stage that autograd and the runtime keep for microbatches in flight."""
    kept: dict[int, dict[int, dict[int, int]]] = {}
    peaks: dict[int, int] = {}
    forward = Compute.forward

    def watch(
        self: Compute, number: int, version: int, arguments: list[Tensor]
    ) -> dict[str, Tensor]:
        versions = [leaf for leaves in self.weights.sets for leaf in leaves.values()]
        own = (*versions, *self.module.parameters(), *self.module.buffers())
        weights = {tensor.untyped_storage().data_ptr() for tensor in own}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results = forward(self, number, version, arguments)
        flying = self.in_flight[number]
        for tensor in flying.arguments.values():
            pack(tensor)
        stages = kept.setdefault(self.stage.index, {})
        stages[number] = found
        for gone in set(stages) - set(self.in_flight):
            del stages[gone]
        peaks[self.stage.index] = max(
            peaks.get(self.stage.index, 0), sum(sum(f.values()) for f in stages.values())
        )
        return results

    monkeypatch.setattr(Compute, "forward", watch)
    return peaks, train_in_threads(Job(artifact=compiled.artifact, steps=3))


@pytest.mark.parametrize(
    "name",
    [
        "gpt",
        "mlp",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet", "unet", "hf_llama")),
    ],
)
def test_a_stage_keeps_what_its_plan_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: the stash of all microbatches in flight, two versions of the weights and never a
    third, and the optimizer's state but for its counters."""
    (example,) = (example for example in CORPUS if example.name == name)
    options = {"gpus": 3, "depth": 3, "device": "cpu", "microbatch": example.batch}
    made = compile_model(example.path, factory=example.factory, out=tmp_path / name, **options)
    stash, trained = run_and_measure(made, monkeypatch)
    assert stash == {stage.index: stage.memory.stash for stage in made.plan.stages}
    for worker, stage in zip(trained.workers, made.plan.stages, strict=True):
        updaters = (worker.own, worker.shared)
        versions = [leaf for leaves in worker.weights.sets for leaf in leaves.values()]
        live = [*versions, *(p for u in updaters for p in u.parameters.values())]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in live}
        assert sum(storages.values()) == stage.memory.weights
        states = [s for u in updaters if u.optimizer for s in u.optimizer.state.values()]
        tensors = [t for state in states for t in state.values() if t.dim()]
        assert sum(t.nbytes for t in tensors) == stage.memory.optimizer
