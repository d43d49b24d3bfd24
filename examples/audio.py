"""ReFT on a speech encoder: in which quarter of a sound is the tone the higher one? A head alone beside LoReFT with the same
head.

    python examples/audio.py

The encoder is a tiny Whisper with random weights, so that this runs anywhere in seconds; a real one, and its sounds, go the
same way: WhisperForAudioClassification.from_pretrained(...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification, set_seed

import fastreft

STEPS, BATCH, RATE = 150, 32, 16000
HEAD = ["projector", "classifier"]


def sounds(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Log-mel spectrograms (n, 16, 100) of a second of tones, 400 Hz but for a quarter of it at 800 Hz, and which it is."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    pitch = torch.full((n, 4), 400.0)
    pitch[torch.arange(n), labels] = 800.0
    phase = torch.rand(n, 1, generator=generator) + pitch.repeat_interleave(RATE // 4, 1).cumsum(1) / RATE
    waves = torch.sin(2 * torch.pi * phase) + 0.1 * torch.randn(n, RATE, generator=generator)
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)
    return extractor(list(waves.numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"], labels


def encoder() -> Any:
    set_seed(0)
    shape = dict(d_model=64, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=128, decoder_layers=1)
    config = WhisperConfig(num_mel_bins=16, max_source_positions=50, num_labels=4, init_std=0.1, **shape)
    return WhisperForAudioClassification(config)


def accuracy(model: Any, optimizer: torch.optim.Optimizer, train: Any, test: Any) -> float:
    """On the test's sounds, after training at a rate that falls to 0."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(STEPS):
        chosen = torch.randint(len(train[0]), (BATCH,), generator=generator)
        optimizer.zero_grad()
        model(input_features=train[0][chosen], labels=train[1][chosen]).loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float((model.eval()(input_features=test[0]).logits.argmax(-1) == test[1]).float().mean())


def main() -> dict[str, float]:
    torch.set_num_threads(1)  # the model is small
    train, test = sounds(256, 0), sounds(256, 1)
    head = encoder().requires_grad_(False)
    own = [p.requires_grad_(True) for name in HEAD for p in head.get_submodule(name).parameters()]
    found = {"head alone": accuracy(head, torch.optim.AdamW(own, lr=1e-2), train, test)}
    # Every frame of every block; the head is trained with it, and saved.
    model = fastreft.get_reft_model(encoder(), fastreft.ReftConfig(r=4, positions="all", modules_to_save=HEAD))
    optimizer = fastreft.ReftAdamW(fastreft.param_groups(model, lr=1e-2))
    found["LoReFT"] = accuracy(model, optimizer, train, test)
    for name, value in found.items():
        print(f"{name}: {value:.0%} of new sounds right")
    return found


if __name__ == "__main__":
    main()
