"""Does training converge with gradients one update late? Real text, real processes, both curves."""

from pathlib import Path

import pytest
from corpus import ROOT

from p2bw.compiler.driver import compile_model
from p2bw.launch import run
from p2bw.tables import curve

STEPS = 500  # the length of the example's own learning-rate schedule
LAST = 50  # updates whose mean is the final loss: one batch is too small to compare by


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2bw_trains_as_well_as_synchronous_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = compile_model(
        ROOT / "examples" / "gpt.py",
        factory="small",
        gpus=2,
        depth=2,
        microbatch=4,
        cluster="p3.16xlarge",
        out=tmp_path / "small",
    )
    losses = {
        schedule: run(made.artifact, steps=STEPS, schedule=schedule, quiet=True)["losses"]
        for schedule in ("2bw", "flush")
    }
    final = {schedule: sum(values[-LAST:]) / LAST for schedule, values in losses.items()}
    with capsys.disabled():
        print(f"\nGPT of 3.3 M parameters, 2 stages, {STEPS} updates on Python's standard library")
        for schedule, values in losses.items():
            print(f"{schedule:>6} {curve(values)} {values[0]:.3f} -> {final[schedule]:.3f}")
        print(f"2bw / flush = {final['2bw'] / final['flush']:.4f}")
    for values in losses.values():
        assert final["flush"] < 0.6 * values[0]
    assert final["2bw"] < 1.03 * final["flush"]
