"""Our predictions of the PipeDream-2BW paper's figures (docs/paper.md), against the paper."""

from collections.abc import Callable
from pathlib import Path

import paper
import paper_page
import pytest
from corpus import ROOT


def test_the_calibration_is_the_one_figure_that_is_given() -> None:
    model = paper.GPT_355M
    assert model.parameters == pytest.approx(0.354e9, rel=0.01)
    flops = 3 * (model.layers * model.layer_flops + model.head_flops)
    layer = paper.layer_s(model, 1, launch=0.0)
    seconds = 3 * (model.layers * layer + paper.head_s(model, 1))
    assert flops / seconds == pytest.approx(45e12)


@pytest.mark.parametrize(
    ("model", "billions"),
    [(paper.GPT_1_3B, 1.313), (paper.GPT_2_2B, 2.156), (paper.GPT_3_8B, 3.781)],
)
def test_the_models_have_the_paper_s_sizes(model: paper.Model, billions: float) -> None:
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize(("what", "printed", "shape", "scheme"), paper.RATIOS)
def test_ratios_are_within_20_percent_of_the_printed_ones(
    what: str, printed: float, shape: tuple[paper.Model, int, int, int], scheme: paper.Scheme
) -> None:
    assert paper.ratio(shape, scheme) == pytest.approx(printed, rel=0.2)


@pytest.mark.parametrize(("figure", "model", "batch", "read"), paper.MEMORY)
def test_memory_is_within_a_gigabyte_of_the_figures(
    figure: str, model: paper.Model, batch: int, read: tuple[float | None, ...]
) -> None:
    for scheme, seen in zip(paper.SCHEMES, read, strict=True):
        found = paper.worst_bytes(model, 8, scheme, batch // paper.MICROBATCH)
        if seen is None:
            assert found > paper.DEVICE.usable_bytes
        else:
            assert found <= paper.DEVICE.usable_bytes
            assert found / paper.GB == pytest.approx(seen, abs=1.0)


def test_gpipe_takes_on_as_much_as_fits() -> None:
    model = paper.GPT_3_8B
    m = paper.fitting(model, 16, 64)
    fits = [
        paper.worst_bytes(model, 16, "gpipe", n) <= paper.DEVICE.usable_bytes for n in (m, m + 1)
    ]
    assert fits == [True, False]
    assert paper.fitting(model, 16, m - 1) == m - 1


@pytest.mark.parametrize(("model", "depth"), [(paper.GPT_2_2B, 8), (paper.GPT_3_8B, 16)])
def test_the_planner_decides_as_the_paper_s(model: paper.Model, depth: int) -> None:
    assert paper.decide(model, 64, 2048).depth == depth


def test_recomputation_pays_for_2_2b_and_is_about_even_for_1_3b() -> None:
    def gains(model: paper.Model, without: int, launch: float = paper.LAUNCH_S) -> float:
        with_it = paper.with_microbatch(model, 16, True, launch)
        return with_it / paper.with_microbatch(model, without, False, launch)

    assert gains(paper.GPT_1_3B, 4) == pytest.approx(66 / 67, rel=0.1)
    assert gains(paper.GPT_2_2B, 1) == pytest.approx(43 / 29, rel=0.2)
    assert gains(paper.GPT_2_2B, 2) > 1  # which fits by our count, not by the paper's
    # As the page says: what decides is the time to launch.
    assert gains(paper.GPT_2_2B, 2, paper.LAUNCH_S / 2) < 1
    assert gains(paper.GPT_2_2B, 1, 0.0) < 1


@pytest.mark.parametrize(("model", "again", "read"), paper.FIGURE_12)
def test_figure_12_is_predicted_within_20_percent(
    model: paper.Model, again: bool, read: dict[int, int]
) -> None:
    for size, seen in read.items():
        found = paper.with_microbatch(model, size, again)
        assert found == pytest.approx(seen, rel=0.2)


def test_launching_takes_what_was_measured_where_nothing_else_shows() -> None:
    """Of 9 measurements up to 2,048 tokens all but one are within 7 % of their median."""
    assert pytest.approx(1.02e-3, rel=0.01) == paper.LAUNCH_S
    each = [ms / paper.ENCODER_LAYERS / 1000 for ms in paper.ENCODER_MS.values()]
    assert sum(abs(s / paper.LAUNCH_S - 1) < 0.07 for s in each) == len(each) - 1


@pytest.mark.slow
def test_the_page_is_what_is_predicted_now(the_same: Callable[[Path, str], None]) -> None:
    the_same(ROOT / "docs" / "paper.md", paper_page.page())
