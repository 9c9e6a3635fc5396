"""read_any: a problem in any format that we know, told apart by what is in the file."""

import json
from pathlib import Path

from pydantic import ValidationError

from p2bw.compiler.placement.loads import LoadProblem
from p2bw.compiler.problem import PlacementProblem, read_problem
from p2bw.compiler.reader_device_placement import read_device_placement
from p2bw.runtime.errors import InputFileError, UsageError

FORMATS = "a PlacementProblem, or the device-placement JSON of NeurIPS 2020"


def read_any(path: Path) -> PlacementProblem | LoadProblem:
    """The problem in a file; InputFileError names the field that is not valid."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise InputFileError(f"{path}: not JSON ({error}); wanted {FORMATS}") from None
    if not isinstance(fields, dict):
        raise InputFileError(f"{path}: no JSON object; wanted {FORMATS}")
    if not {"maxFPGAs", "nodes"} & fields.keys():
        return read_problem(path)
    try:
        return read_device_placement(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the problem"
        raise InputFileError(f"{path}: {where}: {first['msg']}") from None
    except ValueError as error:
        raise InputFileError(f"{path}: {error}") from None
