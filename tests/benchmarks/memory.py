"""Predicted against true peak memory of every stage, on the CPU: python tests/benchmarks/memory.py

The truth is what torch's allocator reports while the real runtime trains the stage, by itself in
this process, through four updates.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from p2bw.compiler.driver import compile_model
from p2bw.compiler.plan import Memory, Plan

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(Path(__file__).parents[1]))


@dataclass(frozen=True, slots=True)
class Case:
    """A model small enough to train in a second, and large enough for its tensors to count."""

    name: str
    example: str
    batch: int
    settings: dict[str, int | float] = field(default_factory=dict)


CASES = (
    Case("GPT", "gpt", 4, {"layers": 4, "width": 256, "heads": 4, "context": 128, "vocab": 2048}),
    Case("BERT", "hf_bert", 4, {"layers": 4, "width": 256, "context": 128, "vocab": 2048}),
    Case("Llama", "hf_llama", 4, {"layers": 4, "width": 256, "context": 128, "vocab": 2048}),
    Case("ViT", "hf_vit", 4, {"layers": 4, "width": 256, "size": 64, "patch": 8}),
    Case("ResNet", "resnet", 4, {"width": 32, "size": 64, "classes": 100}),
    Case("U-Net", "unet", 2, {"width": 16, "size": 96}),
    Case("LSTM", "seq2seq", 4, {"layers": 2, "width": 256, "vocab": 2000}),
)


def compiled(case: Case, recompute: str, folder: Path) -> tuple[Plan, Path]:
    made = compile_model(
        EXAMPLES / f"{case.example}.py",
        factory="tiny",
        settings=case.settings,
        gpus=2,
        depth=2,
        microbatch=case.batch,
        device="cpu",
        recompute=recompute,
        out=folder / f"{case.name}_{recompute}",
    )
    return made.plan, made.artifact


def parts(memory: Memory) -> str:
    kinds = ("weights", "gradients", "optimizer", "stash", "buffers", "transient")
    return " ".join(f"{getattr(memory, kind) / 2**20:9.2f}" for kind in kinds)


def main() -> None:
    from peaks import measure_peaks, planned_peaks

    wanted = sys.argv[1:]
    print(
        f"{'MiB':8} {'recompute':9} k  weights  grads.     opt.    stash   buffers   trans.", end=""
    )
    print("  predicted  measured   error")
    for case in CASES:
        for recompute in ("never", "always"):
            if wanted and case.name not in wanted:
                continue
            with tempfile.TemporaryDirectory() as folder:
                plan, artifact = compiled(case, recompute, Path(folder))
                measured = measure_peaks(artifact)
            for stage, said, true in zip(plan.stages, planned_peaks(plan), measured, strict=True):
                print(
                    f"{case.name:8} {recompute:9} {stage.index} {parts(stage.memory)}"
                    f" {said / 2**20:9.2f} {true / 2**20:9.2f} {said / true - 1:+7.2%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
