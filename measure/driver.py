"""profile: measure the device at hand, and a model's blocks on it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch

from p2bw import __version__
from p2bw.compiler.measured import DeviceProfile, Kind, ModelProfile, Profile, Step
from p2bw.compiler.onnx.source import model_source
from p2bw.compiler.options import checked_autocast
from p2bw.compiler.program import Program
from p2bw.compiler.trace import trace
from p2bw.compiler.units import several
from p2bw.contract.errors import ModelError, ResourceError, UsageError
from p2bw.measure.blocks import fits, measure_blocks
from p2bw.measure.cache import Cache
from p2bw.measure.device import choose_device, cores, device_name, measure_device, using_threads
from p2bw.measure.links import measure_link
from p2bw.measure.overhead import measure_overhead
from p2bw.measure.twin import working_beside
from p2bw.measure.updates import measure_updates
from p2bw.modelfile.load import ModelFile, Setting, load_model_file
from p2bw.passes import pipeline, run_passes

MICROBATCHES = (1, 2, 4)  # without --microbatch
_MOST_PROCESSES = 64
_FEED_RUNS = 7


def profile_model(
    model: str | Path,
    *,
    factory: str = "model",
    settings: Mapping[str, Setting] | None = None,
    microbatches: Sequence[int] = (),
    autocast: str | None = None,
    device: str | None = None,
    threads: int = 1,
    processes: int | None = None,
    fresh: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> Profile:
    """Measure a model file's blocks at some microbatch sizes, and the device that they run on.

    On the CPU `processes` do so at the same time, like the ranks of a run on one machine: two, if
    there are the cores; each has `threads`. What was measured before comes from a cache, but not if
    it is to be `fresh`.
    """
    for name, value in (("threads", threads), ("processes", processes), *_named(microbatches)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: give a number from 1 on")
    here = choose_device(device)
    count = _processes(here, processes, threads)
    only = microbatches[0] if len(microbatches) == 1 else None
    with (
        model_source(Path(model), factory, settings or {}, only) as source,
        using_threads(threads),
        _out_of_memory(),
    ):
        casts = checked_autocast(autocast)
        file = load_model_file(source.path, factory, dict(source.settings), casts)
        if not microbatches and source.microbatch is not None:
            microbatches = (source.microbatch,)
        progress("measuring the device")
        kept = Cache(
            (__version__, torch.__version__, device_name(here), threads, count), fresh=fresh
        )
        found = _device(here, threads, count, kept)
        return _profile(file, microbatches, here, found, kept, progress)


def _named(microbatches: Sequence[int]) -> list[tuple[str, int | None]]:
    return [("microbatch", size) for size in microbatches]


def _processes(device: torch.device, asked: int | None, threads: int) -> int:
    if device.type == "cuda":
        if asked not in (None, 1):
            raise UsageError(f"--processes {asked}: a GPU is measured by itself; leave it out")
        return 1
    if asked is not None and asked > _MOST_PROCESSES:
        raise UsageError(f"--processes {asked}: give a number up to {_MOST_PROCESSES}")
    return asked or max(1, min(2, cores() // threads))


def _device(device: torch.device, threads: int, processes: int, cache: Cache) -> DeviceProfile:
    kept = cache.get(DeviceProfile, ("device", "runtime"))
    if kept is None:
        kept = measure_device(device, threads, processes)
        if device.type == "cpu" and cores() > 1:  # on one core, two ranks only disturb each other
            kept = kept.model_copy(update={"runtime_s": measure_overhead()})
        if (link := measure_link(device)) is not None:
            bandwidth, latency_s, backend = link
            told = {"link": bandwidth, "latency_s": latency_s, "backend": backend}
            kept = kept.model_copy(update=told)
        cache.put(("device", "runtime"), kept)
    return kept


def _profile(
    file: ModelFile,
    microbatches: Sequence[int],
    device: torch.device,
    on: DeviceProfile,
    cache: Cache,
    progress: Callable[[str], None],
) -> Profile:
    steps: list[Step] = []
    kinds: dict[str, Kind] = {}
    program: Program | None = None
    for size in sorted(set(microbatches or MICROBATCHES)):
        progress(f"tracing {file.path.name} at microbatch {size}")
        try:
            traced = trace(file, size)
        except ModelError:
            if microbatches or size > 1:
                raise
            continue  # BatchNorm may refuse a single sample
        program = run_passes(traced, pipeline(on.device()))
        whole = fits(program, device, on.processes)
        progress(f"measuring {several(len(program.blocks or ()), 'block')} at microbatch {size}")
        beside = partial(working_beside, file, size, on.threads, on.processes - 1)
        measured = measure_blocks(file, program, device, cache, beside, whole=whole)
        kinds |= measured.kinds
        steps.append(
            Step(
                microbatch=size,
                blocks=measured.blocks,
                feed_s=_feed_s(file, size),
                check=measured.check,
            )
        )
    assert program is not None
    progress("measuring weight updates")
    updates = measure_updates(file, program, device, cache, beside, whole=whole)
    source = ModelProfile(
        file=file.path.name,
        factory=file.factory,
        settings=dict(file.settings),
        autocast=checked_autocast(file.autocast),
        name=program.model_name,
    )
    return Profile(
        p2bw_version=__version__,
        device=on,
        model=source,
        steps=tuple(steps),
        kinds=kinds,
        updates=dict(updates),
    )


def _feed_s(file: ModelFile, batch_size: int) -> float:
    """Seconds to make one microbatch of data: the user's data(), or synthetic."""
    items = file.data(batch_size, 0)
    spent = []
    for _ in range(_FEED_RUNS):
        start_s = time.perf_counter()
        if next(items, None) is None:
            break
        spent.append(time.perf_counter() - start_s)
    return median(spent[1:]) if len(spent) > 1 else 0.0


@contextmanager
def _out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of GPU memory while measuring: {error}; try a smaller --microbatch"
        ) from error
