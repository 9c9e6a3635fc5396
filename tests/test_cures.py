"""Cures: what is named for an infeasible problem works, and a little less does not.

Whether something fits is asked of an enumeration of all placements, not of the solver.
"""

import itertools
import random
import re
from dataclasses import replace

import pytest
from test_placement import chain, topology, weighty

from p2bw.compiler.devices import GIB, find_device, parse_bytes
from p2bw.compiler.placement import Limits, solve
from p2bw.compiler.placement.changes import with_devices, with_memory
from p2bw.compiler.placement.cures import NoPlanError
from p2bw.compiler.placement.evaluate import Shape, evaluate
from p2bw.compiler.placement.instance import make_instance
from p2bw.compiler.placement.stop import Stop
from p2bw.compiler.problem import (
    BlockCost,
    Constraints,
    ParameterCost,
    PlacementProblem,
    TensorCost,
    Times,
)
from p2bw.compiler.topology import Others
from p2bw.contract.errors import InfeasibleError


def anything_fits(problem, depths=None, widths=None, recompute="auto"):
    """By enumeration: is there a placement within all limits?"""
    try:
        instance = make_instance(problem)
    except InfeasibleError:  # contradictory constraints
        return False
    gpus = problem.topology.gpus
    most = min(gpus // min(widths or (1,)), instance.size, problem.constraints.max_stages or gpus)
    if problem.schedule == "2bw":
        most = min(most, problem.microbatches or most)
    return any(
        _fits(instance, depth, recompute, min(widths or (1,)))
        for depth in range(1, most + 1)
        if depths is None or depth in depths
    )


def _fits(instance, depth, recompute, width):
    """Fewer replicas need no more memory. With devices of one kind the layout does not matter."""
    gpus = instance.problem.topology.gpus
    kinds = instance.kinds
    rows = {tuple(kinds[r] for r in row): row for row in itertools.permutations(range(gpus), depth)}
    shapes = [Shape(depth, 1, "listed", tuple((r,) for r in row)) for row in rows.values()]
    if width > 1:
        assert instance.problem.topology.uniform
        shapes = [Shape(depth, width)]
    choices = {"auto": (False, True), "always": (True,), "never": (False,)}[recompute]
    for stages in itertools.product(range(depth), repeat=instance.size):
        if any(stages[c] < stages[e.producer] for e in instance.edges for c in e.consumers):
            continue
        if len(set(stages)) < depth:
            continue
        for shape, relayed in itertools.product(shapes, _relays(instance, stages)):
            # What one stage needs does not depend on whether another recomputes.
            tried = [
                evaluate(instance, shape, stages, (again,) * depth, relayed) for again in choices
            ]
            if all(
                problem.startswith("stage") for found in tried for problem in found.problems
            ) and all(
                any(found.stages[k].total <= found.stages[k].limit for found in tried)
                for k in range(depth)
            ):
                return True
    return False


def _relays(instance, stages):
    """Every set of the tensors that skip a stage."""
    far = [
        i
        for i, edge in enumerate(instance.edges)
        if any(stages[c] - stages[edge.producer] > 1 for c in edge.consumers)
    ]
    return [set(s) for n in range(len(far) + 1) for s in itertools.combinations(far, n)]


def at_size(size):
    """A chain whose stash grows with the microbatch."""
    base = chain([1.0] * 4, gpus=2, microbatch=size, memory=90)
    blocks = tuple(b.model_copy(update={"stash_bytes": 7 * size + 3}) for b in base.blocks)
    return base.model_copy(update={"blocks": blocks})


def skips(memory, gpus=4):
    """The first of four blocks sends something large to the last."""
    base = chain([1.0] * 4, gpus=gpus)
    skip = TensorCost(
        name="skip", producer="b0", consumers=("b3",), bytes=100, gradient_bytes=10, saved=False
    )
    return base.model_copy(
        update={"tensors": (*base.tensors, skip), "topology": topology(gpus, memory)}
    )


def uneven():
    """Two large devices and two small ones, and blocks that are too large for the small."""
    problem = weighty([40, 10, 40, 40], gpus=4, memory=260)
    small = replace(problem.topology.device, name="tiny", memory_bytes=100)
    times = {"tiny": Times(forward_s=1.0, backward_s=2.0)}
    return problem.model_copy(
        update={
            "topology": replace(problem.topology, more=(Others(device=small, gpus=2),)),
            "blocks": tuple(b.model_copy(update={"on": times}) for b in problem.blocks),
            "parameters": tuple(
                p.model_copy(update={"on": {"tiny": 0.0}}) for p in problem.parameters
            ),
        }
    )


def tied():
    word = ParameterCost(
        name="wte", bytes=50, gradient_bytes=50, optimizer_bytes=100, blocks=("b0", "b4")
    )
    return chain([1.0] * 5, gpus=3, memory=240, parameters=(word,))


def transient():
    base = chain([1.0] * 3, memory=130)
    blocks = tuple(b.model_copy(update={"transient_bytes": 100 * i}) for i, b in
                   enumerate(base.blocks))  # fmt: skip
    return base.model_copy(update={"blocks": blocks})


def real():
    """Weights of GiBs on devices that keep some for themselves."""
    problem = weighty([int(1.37 * GIB)] * 4, gpus=2)
    device = find_device("v100-16")
    device = replace(device, memory_bytes=12 * GIB)
    return problem.model_copy(update={"topology": replace(problem.topology, device=device)})


def tangle(seed):
    """A random graph on devices that are too small for it."""
    pick = random.Random(seed)
    names = [f"b{i}" for i in range(6)]
    tensors = []
    for i in range(5):
        readers = sorted(pick.sample(range(i + 1, 6), pick.randint(1, min(3, 5 - i))))
        tensors.append(
            TensorCost(
                name=f"t{i}",
                producer=names[i],
                consumers=tuple(names[r] for r in readers),
                bytes=pick.randint(0, 30),
                gradient_bytes=pick.randint(0, 30),
                saved=pick.random() < 0.5,
            )
        )
    schedule = pick.choice(["2bw", "flush", "gpipe", "stash"])
    return PlacementProblem(
        microbatch=1,
        schedule=schedule,
        blocks=tuple(
            BlockCost(
                name=name,
                forward_s=1.0,
                backward_s=2.0,
                stash_bytes=pick.randint(0, 40),
                transient_bytes=pick.randint(0, 20),
            )
            for name in names
        ),
        parameters=tuple(
            ParameterCost(
                name=f"w{i}",
                bytes=pick.randint(0, 30),
                gradient_bytes=pick.randint(0, 30),
                optimizer_bytes=pick.randint(0, 60),
                blocks=tuple(sorted(pick.sample(names, pick.choice([1, 1, 2]))))[
                    : 1
                    if schedule == "stash"
                    else 2  # there they would stay together
                ],
            )
            for i in range(5)
        ),
        tensors=tuple(tensors),
        topology=topology(3, memory=pick.randint(100, 150)),
        constraints=Constraints(apart=(("b2", "b3"),)),
    )


def constrained(**constraints):
    return chain([1.0] * 4, gpus=2, constraints=Constraints(**constraints))


# name: problem or problems by size, what is asked of solve, kinds of cure that there must be
INFEASIBLE = {
    "a block too large": (weighty([10, 400, 10], memory=1000), {}, {"memory"}),
    "all too large": (weighty([40] * 6, memory=500), {}, {"memory", "devices"}),
    "too few stages": (
        weighty([40] * 5, memory=520, gpus=5), {"depths": (2,)}, {"memory", "stages", "schedule"}),
    "too few stages, two replicas": (
        weighty([40] * 4, memory=300, gpus=4), {"widths": (2,)}, {"memory", "devices"}),
    "more stages than blocks": (chain([1.0] * 3, gpus=4), {"depths": (4,)}, {"stages"}),
    "waiting buffers": (skips(200), {"depths": (4,)}, {"memory", "stages"}),
    "pinned behind an empty stage": (
        chain([1.0] * 3, gpus=3, constraints=Constraints(pin={"b0": 2})), {}, {"constraint"}),
    "pinned beyond the last stage": (
        constrained(pin={"b3": 2, "b0": 0}), {}, {"constraint", "devices"}),
    "pinned twice": (constrained(together=(("b0", "b2"),), pin={"b0": 0, "b1": 1}), {},
                     {"constraint"}),
    "together and apart": (
        constrained(together=(("b0", "b1"),), apart=(("b0", "b1"),)), {}, {"constraint"}),
    "three apart on two": (
        constrained(apart=(("b0", "b1"), ("b1", "b2"), ("b0", "b2"))), {}, {"devices"}),
    "together too large": (
        weighty([40] * 4, memory=450, gpus=4, constraints=Constraints(together=(("b0", "b2"),))),
        {}, {"memory", "constraint"}),
    "never cut": (
        weighty([40] * 4, memory=450, constraints=Constraints(never_cut=("t0", "t1"))),
        {}, {"memory", "constraint"}),
    "max_stages": (
        weighty([40] * 6, memory=500, gpus=6, constraints=Constraints(max_stages=2)),
        {}, {"memory", "constraint"}),
    "more stages than allowed": (
        chain([1.0] * 4, gpus=3, constraints=Constraints(max_stages=1)), {"depths": (3,)},
        {"stages", "constraint"}),
    "microbatch": ({n: at_size(n) for n in range(1, 10)}, {"microbatches": (9,)},
                   {"memory", "microbatch"}),
    "gpipe keeps all": (
        chain([1.0] * 4, memory=105, schedule="gpipe", microbatches=8), {"recompute": "never"},
        {"memory", "microbatches", "schedule", "recompute"}),
    "stash keeps weights": (
        weighty([20] * 4, memory=130, gpus=4, schedule="stash", microbatches=1), {"depths": (4,)},
        {"memory", "schedule", "microbatches"}),
    "stash keeps shared weights together": (
        tied().model_copy(update={"schedule": "stash"}), {}, {"memory", "schedule"}),
    "too few microbatches for 2bw": (
        weighty([40] * 6, memory=500, gpus=6, microbatches=2), {}, {"memory", "microbatches"}),
    "recompute never": (
        chain([1.0] * 6, memory=40, gpus=3), {"recompute": "never", "depths": (3,)},
        {"memory", "recompute"}),
    "uneven devices": (uneven(), {"depths": (3,)}, {"memory"}),
    "tied": (tied(), {}, {"memory"}),
    "transient": (transient(), {}, {"memory"}),
    "real sizes": (real(), {}, {"memory", "devices"}),
    **{f"tangle {seed}": (tangle(seed), {}, {"memory"}) for seed in range(8)},
}  # fmt: skip


def asked(options):
    return {key: value for key, value in options.items() if key != "microbatches"}


def the_error(problems, options):
    if isinstance(problems, PlacementProblem):
        problems = {problems.microbatch: problems}
    with pytest.raises(NoPlanError) as caught:
        solve(problems, **options)
    return caught.value


@pytest.mark.parametrize("name", INFEASIBLE)
def test_what_is_named_fits_and_a_little_less_does_not(name):
    problems, options, kinds = INFEASIBLE[name]
    problem = problems if isinstance(problems, PlacementProblem) else problems[9]
    options_now = asked(options)
    assert not anything_fits(problem, **options_now)
    error = the_error(problems, options)
    assert {cure.kind for cure in error.cures} >= kinds, str(error)
    for cure in error.cures:
        assert cure.smallest, cure
        assert cure.text in str(error)
        larger, smaller = applied(problems, problem, options_now, cure)
        assert anything_fits(larger[0], **larger[1]), cure
        for less, options_less in smaller:
            assert not anything_fits(less, **options_less), cure
    nothing_was_missed(problem, options_now, error.cures)


def applied(problems, problem, options, cure):
    """The problem and options with the cure, read from its text; and with 1 % less of it."""
    number = int(re.search(r"\d+", cure.text)[0]) if re.search(r"\d", cure.text) else None

    def change(**fields):
        return problem.model_copy(update=fields), options

    if cure.kind == "recompute":
        assert cure.text == "--recompute auto"
        return (problem, {**options, "recompute": "auto"}), []
    if cure.kind == "microbatch":
        assert cure.text == f"--microbatch {number}"
        return (problems[number], options), [(problems[number + 1], options)]
    if cure.kind == "microbatches":
        more = 1 if problem.schedule in ("2bw", "stash") else -1
        return change(microbatches=number), [change(microbatches=number - more)]
    if cure.kind == "stages":
        (asked_for,) = options["depths"]
        away = abs(number - asked_for)
        nearer = range(asked_for - away + 1, asked_for + away)
        return (problem, {**options, "depths": (number,)}), [
            (problem, {**options, "depths": (depth,)})
            for depth in nearer if 0 < depth <= problem.topology.gpus
        ]  # fmt: skip
    if cure.kind == "schedule":
        return change(schedule=cure.text.removeprefix("--schedule ")), []
    if cure.kind == "devices":
        assert cure.text == f"--gpus {number}"
        return change(topology=with_devices(problem.topology, number)), [
            change(topology=with_devices(problem.topology, number - 1))
        ]
    if cure.kind == "memory":
        size = parse_bytes(re.search(r"[0-9]+[A-Za-z]+", cure.text)[0])
        on = re.search(r"on each (\S+)", cure.text)
        device = next(d for d in problem.topology.kinds if on is None or d.name == on[1])
        less = device.memory_bytes + (size - device.memory_bytes) * 99 // 100
        return change(topology=with_memory(problem.topology, device, size)), [
            change(topology=with_memory(problem.topology, device, less))
        ]
    constraints = problem.constraints
    if cure.text.startswith("max_stages"):
        return change(constraints=constraints.model_copy(update={"max_stages": number})), [
            change(constraints=constraints.model_copy(update={"max_stages": number - 1}))
        ]
    fewer = [c for text, c in all_dropped(constraints) if text == cure.text]
    assert len(fewer) == 1
    return change(constraints=fewer[0]), []


def all_dropped(constraints):
    """Every way to leave one constraint out, and what a message calls it."""
    for name, stage in constraints.pin.items():
        rest = {k: v for k, v in constraints.pin.items() if k != name}
        text = f"without the pin of {name} to stage {stage}"
        yield text, constraints.model_copy(update={"pin": rest})
    for field, text in (
        ("together", "without {0}, {1} together"),
        ("apart", "without {0} and {1} apart"),
        ("never_cut", "without never_cut of {0}"),
    ):
        values = getattr(constraints, field)
        for i, entry in enumerate(values):
            names = (entry,) if isinstance(entry, str) else entry
            rest = values[:i] + values[i + 1 :]
            yield text.format(*names), constraints.model_copy(update={field: rest})


def nothing_was_missed(problem, options, cures):
    """Whatever one switch makes feasible is named."""
    named = {cure.text for cure in cures}
    for text, fewer in all_dropped(problem.constraints):
        changed = problem.model_copy(update={"constraints": fewer})
        assert anything_fits(changed, **options) == (text in named), text
    if options.get("recompute", "auto") != "auto":
        fits = anything_fits(problem, **{**options, "recompute": "auto"})
        assert fits == ("--recompute auto" in named)
    flush = problem.model_copy(update={"schedule": "flush"})
    if problem.schedule in ("2bw", "gpipe"):
        assert anything_fits(flush, **options) == ("--schedule flush" in named)


def test_the_reason_and_the_cures_are_a_short_list():
    error = the_error(weighty([40] * 6, memory=500), {})
    assert str(error).splitlines() == [
        "no plan fits: cut into 1 to 2 stages, the fullest device needs at least 633 B at "
        "microbatch 1 with 2 weight versions, gradients and optimizer state; toy offers 500 B. "
        "What fits, each alone:",
        "  --memory 633B (133 B more)",
        "  --gpus 3",
    ]


def test_a_model_of_many_blocks_is_explained_too():
    error = the_error(weighty([40] * 700, gpus=4, memory=30_000), {})
    assert re.search(r"the fullest device needs about 3\d\.\d KiB", str(error))
    assert {"memory", "devices"} <= {cure.kind for cure in error.cures if cure.smallest}
    (memory,) = (cure.amount for cure in error.cures if cure.kind == "memory")
    for more, fits in ((1.0, True), (0.99, False)):
        size = 30_000 + round((memory - 30_000) * more)
        problem = weighty([40] * 700, gpus=4, memory=size)
        if fits:
            assert solve({1: problem})
        else:
            with pytest.raises(NoPlanError):
                solve({1: problem})


def test_many_constraints_are_tried_one_by_one_and_three_are_shown():
    uncut = tuple(f"t{i}" for i in range(5))
    problem = weighty([40] * 6, memory=1100, constraints=Constraints(never_cut=uncut))
    error = the_error(problem, {})
    dropped = [cure.text for cure in error.cures if cure.kind == "constraint"]
    assert dropped == [f"without never_cut of {name}" for name in uncut]
    assert str(error).count("never_cut") == 3
    assert "or without one of 2 other constraints" in str(error)


def test_what_could_not_be_settled_is_not_called_the_smallest(monkeypatch):
    monkeypatch.setattr("p2bw.compiler.placement.cpsat.MAX_PAIRS", -1)  # CP-SAT settles nothing
    problem = chain([1.0] * 3, gpus=3, constraints=Constraints(pin={"b0": 2}))
    problem = problem.model_copy(update={"topology": topology(3, 10)})
    error = the_error(problem, {"limits": Limits(ideals=10**4)})
    assert all(cure.smallest for cure in error.cures)
    tight = skips(100)
    heavy = tuple(b.model_copy(update={"transient_bytes": 200}) for b in tight.blocks)
    error = the_error(tight.model_copy(update={"blocks": heavy}), {"depths": (4,)})
    memory = [cure for cure in error.cures if cure.kind == "memory"]
    assert [cure.smallest for cure in memory] == [False]
    assert "less may do: not settled" in str(error)


def test_who_stops_gets_the_reason_without_the_cures():
    stop = Stop()
    told = []

    def tell(progress):
        told.append(progress.phase)
        if progress.phase == "cures":
            stop.interrupted = True

    with pytest.raises(NoPlanError, match="no single change was found") as caught:
        solve({1: weighty([40] * 6, memory=500)}, limits=Limits(stop=stop), progress=tell)
    assert caught.value.cures == ()
    assert told[-1] == "cures"
