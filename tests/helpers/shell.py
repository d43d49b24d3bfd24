"""The command line, in-process."""

from __future__ import annotations


def fails(code, capsys, *parts):
    """Exit code 2, and one sentence on stderr with all the parts; nothing else is written."""
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    sentence = [line for line in error.splitlines() if line.startswith("fastreft ")]
    assert len(sentence) == 1
    for part in parts:
        assert part in sentence[0]
