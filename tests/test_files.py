"""Folders written by processes that fail or are killed at every step: the old files, the new ones, or none to be read."""

import os
import signal

import pytest

from fastreft.files import OURS, check_writable, staged

LAST = "config.json"
OLD = {LAST: "old", "weights": "old", "tokenizer": "old"}
NEW = {LAST: "new", "weights": "new", "tokenizer": "new", "more": "new"}


def write(folder, files):
    with staged(folder, last=LAST) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)


def held(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def readable(folder):
    """What a reader takes the folder for."""
    found = held(folder)
    return None if LAST not in found else {name: found.get(name) for name in OLD}


def calls_of(folder):
    """How often a save moves files."""
    count = 0
    real = os.replace

    def counted(*args):
        nonlocal count
        count += 1
        real(*args)

    os.replace = counted
    try:
        write(folder, NEW)
    finally:
        os.replace = real
    return count


@pytest.mark.parametrize("next_writes", ["the same", "others"])
def test_a_kill_between_any_two_moves_leaves_no_mixture(tmp_path, next_writes):
    write(tmp_path / "count", OLD)
    for step in range(calls_of(tmp_path / "count")):
        folder = tmp_path / str(step)
        write(folder, OLD)
        child = os.fork()
        if child == 0:
            real, seen = os.replace, [0]

            def killed(*args, real=real, seen=seen, step=step):
                if seen[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1
                real(*args)

            os.replace = killed
            write(folder, NEW)
            os._exit(0)
        os.waitpid(child, 0)
        assert readable(folder) in (None, OLD, {name: "new" for name in OLD})
        if next_writes == "the same":
            write(folder, {"note": "x", LAST: "third"})
        else:
            with staged(folder, last="rows") as staging:
                (staging / "rows").write_text("x")
            assert readable(folder) in (OLD, {name: "new" for name in OLD})
        assert not list(folder.glob(".saving-*"))
        assert held(folder)["weights"] in ("old", "new")
        assert held(folder)["weights"] == held(folder)["tokenizer"]


def test_a_move_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    write(tmp_path / "count", OLD)
    real = os.replace
    for step in range(calls_of(tmp_path / "count")):
        folder = tmp_path / str(step)
        write(folder, OLD)
        seen = [0]

        def failing(*args, seen=seen, step=step):
            seen[0] += 1
            if seen[0] == step + 1:
                raise OSError("no space left")
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises(OSError, match="no space"):
                write(folder, NEW)
        assert held(folder) == OLD and not list(folder.glob(".saving-*"))


def test_somebodys_readme_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path, {**NEW, "README.md": "a card"})
    assert held(tmp_path)["README.md"] == "mine"
    write(tmp_path / "fresh", {**NEW, "README.md": "a card"})
    assert held(tmp_path / "fresh")["README.md"] == "a card"
    (tmp_path / "fresh" / "README.md").write_text(f"---\n---\n{OURS}\nan older card")
    write(tmp_path / "fresh", {**NEW, "README.md": "a card"})
    assert held(tmp_path / "fresh")["README.md"] == "a card"


def test_a_writer_that_is_at_work_is_left_alone(tmp_path):
    (tmp_path / ".saving-1-x").mkdir()  # of a process that is there
    (tmp_path / ".saving-999999999-x").mkdir()
    write(tmp_path, NEW)
    assert [path.name for path in tmp_path.glob(".saving-*")] == [".saving-1-x"]


def test_what_cannot_be_written_to_is_told_and_nothing_is_left(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        check_writable(tmp_path / "file" / "b")
