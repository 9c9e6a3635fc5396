import pytest

from p2bw.compiler import units
from p2bw.contract.errors import UsageError


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 s"), (0.00412, "4.12 ms"), (1.5e-5, "15.0 us"), (123.4, "123 s"), (3e-9, "3.00 ns")],
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1023, "1023 B"), (1095216660, "1.02 GiB"), (2**20, "1.00 MiB")]
)
def test_data(value: int, text: str) -> None:
    assert units.data(value) == text


def test_parameters_are_counted_in_billions() -> None:
    assert units.parameters(2_156_000_000) == "2.16 B"
    assert units.parameters(86_400_000) == "86.4 M"


def test_of_one_there_is_no_plural() -> None:
    counted = [units.several(n, what) for what in ("stage", "microbatch") for n in (0, 1, 2)]
    assert counted[:3] == ["0 stages", "1 stage", "2 stages"]
    assert counted[3:] == ["0 microbatches", "1 microbatch", "2 microbatches"]


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), (" 0.5 % ", 0.005), ("0.02", 0.02), ("0", 0.0), (".1%", 0.001)],
)
def test_a_gap_is_a_share(text, share):
    assert units.parse_gap(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "x", "-1%", "100%", "1", "1e-3", "nan", "1%%"])
def test_what_is_no_gap_is_refused(text):
    with pytest.raises(UsageError, match="--gap"):
        units.parse_gap(text)
