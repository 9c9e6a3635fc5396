"""What a run is asked to do reaches its ranks as a command line."""

import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from p2bw.contract.job import Job, Options, arguments, parse

JOB = Job(artifact=Path("built"), steps=3)
FULL_JOB = Job(
    artifact=Path("built"),
    steps=3,
    seed=4,
    schedule="flush",
    microbatches=6,
    model=Path("there/model.py"),
    clip_norm=float("inf"),
    weights=Path("weights"),
    init="modules",
)
FULL_OPTIONS = Options(
    device="cpu",
    timeout_s=7.5,
    threads=2,
    result=Path("result.json"),
    quiet=True,
    checkpoint=Path("kept"),
    checkpoint_every=5,
    keep=1,
    resume="last",
    metrics=Path("metrics.jsonl"),
    tensorboard=Path("board"),
    trace=Path("trace.json"),
)


def parsed(job: Job, options: Options, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, Options]:
    monkeypatch.setattr(sys, "argv", ["p2bw.runtime", *arguments(job, options)[2:]])
    return parse(None)


def test_every_field_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, default in ((FULL_JOB, JOB), (FULL_OPTIONS, Options())):
        same = [f.name for f in fields(given) if getattr(given, f.name) == getattr(default, f.name)]
        assert same == (["artifact", "steps"] if given is FULL_JOB else [])
    assert parsed(FULL_JOB, FULL_OPTIONS, monkeypatch) == (FULL_JOB, FULL_OPTIONS)


def test_what_is_not_said_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments(JOB, Options()) == ["-m", "p2bw.runtime", "built", "--steps", "3"]
    for options in (Options(), replace(Options(), keep=5)):
        assert parsed(JOB, options, monkeypatch) == (JOB, options)
