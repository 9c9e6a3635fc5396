from pathlib import Path

import pytest

from p2bw.compiler.artifact import check_destination, write_artifact
from p2bw.contract.errors import UsageError


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_write_makes_exactly_the_files(tmp_path: Path) -> None:
    out = tmp_path / "build" / "gpt"
    write_artifact(out, {"plan.json": "{}", "stages/stage_0.py": "x = 1\n"})
    write_artifact(out, {"plan.json": "{}\n", "stages/stage_1.py": b"y = 2\n"})
    assert _tree(out) == {"plan.json": b"{}\n", "stages/stage_1.py": b"y = 2\n"}
    assert [p.name for p in out.parent.iterdir()] == ["gpt"]


def test_a_failed_write_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpt"
    write_artifact(out, {"plan.json": "old"})
    before = _tree(out)
    write = Path.write_bytes

    def full_disk(path: Path, data: bytes) -> int:
        if path.name == "stage_0.py":
            raise OSError(5, "Input/output error")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UsageError, match="cannot write"):
        write_artifact(out, {"plan.json": "new", "stages/stage_0.py": "x"})
    assert _tree(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["gpt"]


def test_what_runs_have_left_outlives_another_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpt"
    write_artifact(out, {"plan.json": "1"})
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    (out / "checkpoints" / "step-00000001" / "manifest.json").write_text("days of training")
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    left = {name: data for name, data in _tree(out).items() if name != "plan.json"}
    write_artifact(out, {"plan.json": "2"})
    assert _tree(out) == {"plan.json": b"2", **left}

    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if target == out and path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(out, {"plan.json": "3"})
    assert _tree(out) == {"plan.json": b"2", **left}


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no artifact"):
        check_destination(tmp_path)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpt").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        check_destination(tmp_path / "gpt")
    with pytest.raises(UsageError, match="not a writable folder"):
        check_destination(tmp_path / "gpt" / "deeper")


def test_new_and_empty_and_old_destinations_are_fine(tmp_path: Path) -> None:
    check_destination(tmp_path / "a" / "b")
    check_destination(tmp_path)
    write_artifact(tmp_path / "old", {"plan.json": "{}"})
    check_destination(tmp_path / "old")
