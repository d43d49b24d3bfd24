"""What the attack shares: how many cases and which, bytes spoilt at random, and all of a model that must not change."""

from __future__ import annotations

import os

import torch
from tiny import hooks_on

CASES = int(os.environ.get("FASTREFT_ATTACK", "40"))
SEED = int(os.environ.get("FASTREFT_SEED", "0"))

ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "(",
        "f1",
        "f2+l3",
        "f0",
        "all",
        "0:2",
    ),
    *(
        [],
        [0],
        [0, 0],
        [-1],
        ["a"],
        [[1]],
        {},
        {"a": 1},
        (),
        (0, 1),
        range(2),
        {1},
        b"x",
        object(),
        "\ud800",
        "9" * 5000,
    ),
    *("gelu", "nobody", "loreft", "direft", "position", "block_output", "mlp_output", ["model.layers.0"], r".*\.1"),
]


def flipped(data, dice):
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 8, 64))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def grown(data, dice):
    at = dice.randrange(len(data))
    return data[:at] + dice.randbytes(dice.choice((1, 8, 4096))) + data[at:]


def spoil(tensors, dice):
    """Make one of these tensors something else, in place."""
    key = dice.choice([key for key, value in tensors.items() if value.is_floating_point()])
    value = tensors[key]
    tensors[key] = dice.choice(
        (
            lambda: value * float("nan"),
            lambda: value.index_fill(0, torch.tensor([0]), float("inf")),
            lambda: value.zero_(),
            lambda: value * 1.5,
            lambda: torch.randn_like(value),
            lambda: value.int(),
            lambda: value.to(torch.complex64),
            lambda: value.to(torch.float8_e5m2),
            lambda: value.bfloat16(),
            lambda: value.flatten(),
            lambda: value[..., :1].contiguous(),
            lambda: -value,
        )
    )()


def state_of(base):
    return (
        {name: value.clone() for name, value in base.state_dict().items()},
        [name for name, _ in base.named_modules()],
        [p.requires_grad for p in base.parameters()],
        hooks_on(base),
        "peft_config" in base.__dict__,
    )
