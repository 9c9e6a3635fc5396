"""read_any: a problem in any format that we know, told apart by what is in the file."""

import json
from pathlib import Path

from pydantic import ValidationError

from p2bw.compiler.placement.loads import LoadProblem
from p2bw.compiler.placement.profile import ProfileProblem
from p2bw.compiler.placement.variants import VariantProblem
from p2bw.compiler.plan import wrong_field
from p2bw.compiler.problem import PlacementProblem, read_problem
from p2bw.compiler.reader_device_placement import read_device_placement
from p2bw.compiler.reader_pipedream import read_pipedream
from p2bw.compiler.reader_piper import read_piper
from p2bw.contract.errors import InputFileError, UsageError

FORMATS = (
    "a PlacementProblem, device-placement JSON (NeurIPS 2020), Piper's JSON (NeurIPS 2021) or a "
    "PipeDream graph.txt"
)
BANDWIDTH = 1e9  # bytes per second: the default of PipeDream's optimizer

Problem = PlacementProblem | LoadProblem | ProfileProblem | VariantProblem


def read_any(path: Path, bandwidth: float | None = None) -> Problem:
    """The problem in a file; `bandwidth` of its links, where the format does not say.

    InputFileError names the field that is not valid.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        if b" -- " in text.partition(b"\n")[0]:
            return read_pipedream(text.decode(), bandwidth or BANDWIDTH)
        if bandwidth is not None:
            raise UsageError(f"{path} has its own bandwidth: --bandwidth is for PipeDream's files")
        return _read_json(path, text)
    except ValidationError as error:
        raise InputFileError(f"{path}: {wrong_field(error, 'the problem')}") from None
    except ValueError as error:
        raise InputFileError(f"{path}: {error}") from None


def _read_json(path: Path, text: bytes) -> Problem:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error}); wanted {FORMATS}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"no JSON object; wanted {FORMATS}")
    if {"maxDevices", "maxMemoryPerDevice"} & fields.keys():
        return read_piper(text)
    if {"maxFPGAs", "nodes"} & fields.keys():
        return read_device_placement(text)
    return read_problem(path)
