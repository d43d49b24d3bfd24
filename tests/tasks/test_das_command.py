"""``fastreft das``: the template's task, pairs of one's own, a sweep that goes on, and what is refused."""

from __future__ import annotations

import json

import pytest

from fastreft.cli import main

SMALL = ["--steps", "2", "--batch_size", "8", "--train_pairs", "16", "--test_pairs", "16", "--dtype", "float32"]


def test_the_task_and_again(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["das", "--task", "agreement", "--verbs", "was", "were", "--output_dir", str(out), *SMALL]
    config = tmp_path / "das.yaml"
    config.write_text("layers: [0, 4]\npositions: [subject, l1]\nkind: boundless\ndims: 4\n")
    assert main([*flags, "--config", str(config)]) == 0
    said = capsys.readouterr().out
    held = json.loads((out / "das.json").read_text())
    assert [(c["place"], c["position"]) for c in held["cells"]] == [(p, w) for p in "04" for w in ("subject", "l1")]
    assert f"IIA {held['best']['iia']:.3f}" in said and "nothing exchanged" in said
    assert (out / "das.png").exists() and (out / "subspaces" / "4.l1.safetensors").exists()
    assert main([*flags, "--config", str(config)]) == 0
    assert json.loads((out / "das.json").read_text()) == held
    assert main([*flags, "--config", str(config), "--dims", "5"]) == 2
    assert "holds a sweep with dims 4, and this one has 5: give another folder" in capsys.readouterr().err


def test_pairs_of_ones_own_and_controls(tmp_path, capsys):
    rows = [("The king", "The kings", " were"), ("The kings", "A king", " was"), ("A girl", "Girls", " were")]
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps(dict(zip(("base", "source", "label"), row, strict=True))) + "\n" for row in rows)
    )
    own = ["das", "--train_file", str(file), "--test_file", str(file), "--layers", "1", *SMALL]
    for kind in ("random", "pca"):
        assert main([*own, "--kind", kind, "--output_dir", str(tmp_path / kind), "--component", "mlp_output"]) == 0
        (cell,) = json.loads((tmp_path / kind / "das.json").read_text())["cells"]
        assert cell["loss"] is None and cell["place"] == "(1, 'mlp_output')"
    assert main([*own, "--random_weights", "--output_dir", str(tmp_path / "untrained")]) == 0
    file.write_text(file.read_text().replace("The kings", "The queens"))
    assert main([*own, "--kind", "pca", "--output_dir", str(tmp_path / "pca"), "--component", "mlp_output"]) == 2
    assert "holds a sweep with train_file_sha256 " in capsys.readouterr().err
    file.write_text(file.read_text().replace('"The king"', '"The"').replace("Girls", "Two girls"))
    out = tmp_path / "absent"
    assert main([*own, "--positions", "2", "--output_dir", str(out)]) == 2
    assert "positions is 2, and sample 0 of the base has no such token" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --task, or pairs of your own"),
        (["--task", "sums"], "task is 'sums'"),
        (["--train_file", "x.jsonl"], "give both --train_file and --test_file"),
        (["--train_file", "x.jsonl", "--test_file", "x.jsonl"], "there is no train_file 'x.jsonl'"),
        (["--task", "agreement", "--kind", "soft"], "kind is 'soft'"),
        (["--task", "agreement", "--variable", "tense"], "variable is 'tense'"),
        (["--task", "agreement", "--layers", "7"], "layer is 7; it must be an integer below 5"),
        (["--task", "agreement", "--positions", "x"], "positions is 'x'"),
        (["--task", "agreement", "--verbs", "hippopotamuses", "are"], "has not each as one token"),
        (["--task", "agreement", "--steps", "0"], "steps is 0"),
    ],
)
def test_what_is_refused(flags, said, tmp_path, capsys):
    assert main(["das", "--output_dir", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "out").exists()
