"""What is told of shards (FSDP, DeepSpeed), looked at before anything heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

# What accelerate launch tells its processes of its own configuration.
_USES, _STAGE, _FILE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def check(training: Any, method: str) -> None:
    """:class:`UserError` for ZeRO-3, for FSDP1 with ReFT, and for a configuration that cannot be read."""
    deepspeed = _configuration("deepspeed", training.deepspeed)
    stages = [_stage(deepspeed)]
    if os.environ.get(_USES, "").lower() == "true":
        file = os.environ.get(_FILE, "none")
        stages.append(os.environ.get(_STAGE) if file == "none" else _stage(_configuration(_FILE, file)))
    if any(str(stage) == "3" for stage in stages):
        raise UserError(
            "deepspeed has zero_optimization.stage 3, which shards the parameters, so that an edit would find its own empty; "
            "give stage 1 or 2, or --fsdp, which shards the frozen model as well"
        )
    fsdp = _configuration("fsdp_config", training.fsdp_config)
    version = fsdp.get("version", fsdp.get("fsdp_version", 2))
    if training.fsdp and method == "reft" and str(version) == "1":
        raise UserError(
            "fsdp_config has version 1, which flattens R, so that its rows cannot be kept orthonormal; give 2"
        )


def _stage(deepspeed: dict[str, Any]) -> Any:
    zero = deepspeed.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, dict) else None


def _configuration(name: str, given: Any) -> dict[str, Any]:
    """A JSON object, of a file or as text; {} where none is given."""
    if not given or isinstance(given, dict):
        return given or {}
    try:
        text = given if str(given).lstrip().startswith("{") else Path(given).expanduser().read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise UserError(f"{name} is '{given}', which cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is '{given}', which is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} is '{given}'; it must hold a JSON object")
    return found
