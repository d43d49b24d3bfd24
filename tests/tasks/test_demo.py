"""The demo, with few steps: what it learns, what it reports, and that a seed fixes all of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fastreft.tasks.behaviour import examples
from fastreft.tasks.demo import SAVED, demo, report
from fastreft.tasks.flags.demo import DemoArguments
from fastreft.tasks.places import EMBEDDED

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K" / "hf"


def test_held_out_speakers_are_never_trained_on():
    train, held_out = examples(seed=0, held_out=64)
    trained, unseen = (
        {example.completion.rpartition(" said the ")[2] for example in group} for group in (train, held_out)
    )
    assert len(held_out) == 64
    assert not trained & unseen
    assert examples(seed=0, held_out=64) == (train, held_out) != examples(seed=1, held_out=64)


@pytest.mark.parametrize(
    "model",
    [
        EMBEDDED,
        pytest.param(
            str(STORIES), marks=pytest.mark.skipif(not STORIES.is_dir(), reason="no ../shared/models/stories260K")
        ),
    ],
)
def test_demo_learns_and_reports(model, tmp_path, monkeypatch):
    monkeypatch.setattr("fastreft.tasks.demo.HELD_OUT", 16)  # sentences that each method completes
    arguments = DemoArguments(model=model, steps=30, memory_steps=20, output_dir=str(tmp_path / "adapter"))
    results = demo(arguments, Console(quiet=True))
    assert results.same_after_reload
    untouched, lora, *loreft = results.methods.values()
    assert all(row.metrics.loss < untouched.metrics.loss for row in (lora, *loreft))
    assert all(0 < row.parameters < lora.parameters for row in loreft)
    assert results.methods[SAVED].metrics.token_accuracy > untouched.metrics.token_accuracy
    assert [recital.layers for recital in results.recitals] == [1, 5]
    assert all(recital.exact <= recital.asked for recital in results.recitals)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    console = Console(record=True, width=120, file=io.StringIO())
    report(results, arguments, console)
    text = console.export_text()
    assert all(word in text for word in ("LoReFT", "LoRA", "untouched", results.held_out[0].prompt, "the same text"))
