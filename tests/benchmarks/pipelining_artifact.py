"""The benchmark's artifact, cut between blocks and written by hand: both runtimes run one code."""

import hashlib
import json
from pathlib import Path

SOURCE = Path(__file__).with_name("pipelining_model.py")
STAGE = """

class Stage(Part):
    def __init__(self) -> None:
        super().__init__({first}, {last}, **{sizes})

    def forward(self, {arguments}):
        return {result}
"""


def write_artifact(
    folder: Path, *, depth: int, microbatch: int, tied: bool, sizes: dict[str, int]
) -> Path:
    """What `p2bw compile` writes, for stages of as many blocks each."""
    source = SOURCE.read_text(encoding="utf-8")
    (folder / "stages").mkdir(parents=True)
    (folder / "source").mkdir()
    (folder / "source" / SOURCE.name).write_text(source, encoding="utf-8")
    edges = [_transfer(k, k + 1, microbatch, sizes) for k in range(depth - 1)]
    stages = []
    for k in range(depth):
        received, sent = edges[max(k - 1, 0) : k], edges[k : k + 1]
        inputs = (["ids"] if k == 0 else []) + (["wanted"] if k == depth - 1 else [])
        names = [edge["tensor"] for edge in received]
        result = f"super().forward({(names or inputs)[0]})"
        text = STAGE.format(
            first=k * sizes["blocks"] // depth,
            last=(k + 1) * sizes["blocks"] // depth,
            sizes=sizes,
            arguments=", ".join([*inputs, *names]),
            result=result if sent else f"loss({result}, wanted)",
        )
        (folder / "stages" / f"stage_{k}.py").write_text(source + text, encoding="utf-8")
        stages.append(
            {
                "index": k,
                "recompute": False,
                "inputs": inputs,
                "arguments": [*inputs, *names],
                "results": [edge["tensor"] for edge in sent] or ["loss"],
                "sends": [edge | {"peer": k + 1} for edge in sent],
                "receives": [edge | {"peer": k - 1} for edge in received],
                "devices": [k],
            }
        )
    ids = {"shape": [microbatch, sizes["tokens"]], "dtype": "int64"}
    both = ["embedding.tokens.weight", "head.logits.weight"]
    plan = {
        "schema": 1,
        "model": {
            "file": SOURCE.name,
            "factory": "model",
            "settings": {**sizes, "tied": tied},
            "sha256": hashlib.sha256(source.encode()).hexdigest(),
        },
        "schedule": "2bw",
        "depth": depth,
        "width": 1,
        "microbatch": microbatch,
        "microbatches_per_update": depth,
        "extra_in_flight": 1,  # as compile chooses where there is memory
        "inputs": [{"name": "ids", **ids}, {"name": "wanted", **ids}],
        "tied": [{"names": both, "stages": [0, depth - 1]}] if tied else [],
        "stages": stages,
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def _transfer(
    source: int, target: int, microbatch: int, sizes: dict[str, int]
) -> dict[str, object]:
    shape = [microbatch, sizes["tokens"], sizes["width"]]
    bytes_ = 4 * microbatch * sizes["tokens"] * sizes["width"]
    return {
        "tensor": f"x_{source}_{target}",
        "shape": shape,
        "dtype": "float32",
        "bytes": bytes_,
        "gradient": True,
    }
