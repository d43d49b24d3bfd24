"""Directions that stand for a concept: found by several methods, looked for in texts, and added to a model's states.

    diff_mean, linear_probe    from the hidden states of texts with and without it
    reft_r1                    from what a model writes, trained (AxBench's ReFT-r1)
    reps                       from pairs of answers, trained by preference (RePS)
    Direction                  latents and scores of texts; an adapter that adds it; a file
    auroc                      how well scores tell texts with from texts without
    save_gguf, load_gguf       control vectors of llama.cpp and repeng

A text is its token ids, a list or a tensor (n,); a first token of its own (BOS) is left out everywhere, as AxBench does.
"""

from .control_vectors import load_gguf, save_gguf, vectors_of
from .direction import Direction, auroc
from .reft_r1 import reft_r1
from .reps import reps
from .states import states
from .without_training import diff_mean, linear_probe

__all__ = [
    "Direction",
    "auroc",
    "diff_mean",
    "linear_probe",
    "load_gguf",
    "reft_r1",
    "reps",
    "save_gguf",
    "states",
    "vectors_of",
]
