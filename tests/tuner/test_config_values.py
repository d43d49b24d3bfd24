"""What a configuration is given: plain values that a file can hold, or one sentence when it is made."""

import numpy as np
import pytest

from fastreft import ReftConfig

KEPT = [
    ({"layers_to_transform": range(2)}, [0, 1]),
    ({"layers_to_transform": (3, 1)}, [3, 1]),
    ({"layers_to_transform": np.arange(2)}, [0, 1]),
    ({"layers_to_transform": np.int64(2)}, 2),
    ({"layers_to_transform": {2}}, [2]),
    ({"r": np.int32(3)}, 3),
    ({"dropout": np.float32(0.5)}, 0.5),
    ({"dropout": 0}, 0.0),
    ({"target_modules": ("a", "b")}, ["a", "b"]),
    ({"target_modules": {"b", "a"}}, ["a", "b"]),
    ({"modules_to_save": ("score",)}, ["score"]),
]


@pytest.mark.parametrize(("given", "kept"), KEPT)
def test_what_is_kept_travels_through_a_file(given, kept, tmp_path):
    made = ReftConfig(**given)
    made.save_pretrained(tmp_path)
    (name,) = given
    for config in (made, ReftConfig.from_pretrained(tmp_path)):
        assert getattr(config, name) == kept and type(getattr(config, name)) is type(kept)


REFUSED = [
    *({"r": value} for value in (True, 0, -1, 1.5, "4", None, 10**10000)),
    *({"dropout": value} for value in (float("nan"), True, "0.1", None, 1, -0.1, float("inf"), [0.1])),
    *({"layers_to_transform": value} for value in (True, [True], [-1], [0, 0], [], "x", 1.5, [1.5], [[0]], {}, 10**99)),
    *({"act_fn": value} for value in (3, [], "nope", True)),
    *({"component": value} for value in ([], "mlp", None, 1)),
    *({"intervention_type": value} for value in ([], "lora", None)),
    *({"tied": value} for value in (None, 1, "no", [], 2.0)),
    *({"positions": value} for value in (None, 5, "f0", "f5+f5", ["f5"], "")),
    *({"target_modules": value} for value in ("(", [1], [], 3, [""], [["a"]])),
    *({"exclude_modules": value} for value in ("[", {"a": 1}.values(), True)),
    *({"modules_to_save": value} for value in ("score", [None], 1)),
    *({name: value} for name in ("add_bias", "pyreft_compat") for value in (None, 1, "yes")),
    {"tied": "position", "positions": "f4000+l4000"},
]


@pytest.mark.parametrize("given", REFUSED, ids=lambda given: next(iter(given)))
def test_what_is_refused_is_named(given):
    with pytest.raises(ValueError, match=next(iter(given))) as said:
        ReftConfig(**given)
    assert len(str(said.value)) < 500 and "\n" not in str(said.value)
