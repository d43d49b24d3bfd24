"""ReFT on a vision encoder: which quadrant of a picture is red? A head alone beside LoReFT with the same head.

    python examples/vision.py

The encoder is a tiny ViT with random weights, so that this runs anywhere in seconds; a real one, and its images, go the same
way: ViTForImageClassification.from_pretrained(...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, set_seed

import fastreft

STEPS, BATCH = 150, 32


def pictures(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n, 3, 32, 32) of four quadrants, one of them red and the others green or blue, and which it is."""
    labels = torch.randint(4, (n,), generator=generator)
    colours = torch.randint(1, 3, (n, 4), generator=generator)
    colours[torch.arange(n), labels] = 0
    quadrants = torch.nn.functional.one_hot(colours, 3).float().view(n, 2, 2, 3).permute(0, 3, 1, 2)
    pixels = quadrants.repeat_interleave(16, 2).repeat_interleave(16, 3) - 1 / 3
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator), labels


def encoder() -> Any:
    set_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128)
    config = ViTConfig(image_size=32, patch_size=8, num_labels=4, initializer_range=0.1, **shape)
    return ViTForImageClassification(config)


def accuracy(model: Any, optimizer: torch.optim.Optimizer) -> float:
    """On new pictures, after training at a rate that falls to 0."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(STEPS):
        pixels, labels = pictures(BATCH, generator)
        optimizer.zero_grad()
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
    pixels, labels = pictures(512, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float((model.eval()(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())


def main() -> dict[str, float]:
    torch.set_num_threads(1)  # the model is small
    head = encoder().requires_grad_(False)
    head.classifier.requires_grad_(True)
    found = {"head alone": accuracy(head, torch.optim.AdamW(head.classifier.parameters(), lr=3e-2))}
    # Every patch of every block; the head is trained with it, and saved.
    config = fastreft.ReftConfig(r=4, positions="all", modules_to_save=["classifier"])
    model = fastreft.get_reft_model(encoder(), config)
    found["LoReFT"] = accuracy(model, fastreft.ReftAdamW(fastreft.param_groups(model, lr=1e-2)))
    for name, value in found.items():
        print(f"{name}: {value:.0%} of new pictures right")
    return found


if __name__ == "__main__":
    main()
