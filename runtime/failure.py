"""How a failure of one rank becomes the failure of all, said once."""

import json
import os
from pathlib import Path

from p2bw.runtime.errors import P2BWError

FAILURE_FILE = "P2BW_FAILURE_FILE"  # environment: where a rank leaves why it failed


def record_failure(error: BaseException, message: str, trace: str) -> bool:
    """Leave the first error for `run` to raise; false if `run` did not start this rank."""
    name = os.environ.get(FAILURE_FILE)
    if not name or Path(name).exists():
        return bool(name)
    record = {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, P2BWError) else P2BWError.exit_code,
        "message": message,
        "traceback": trace,
    }
    beside = Path(f"{name}.new")
    beside.write_text(json.dumps(record), encoding="utf-8")
    os.replace(beside, name)
    return True
