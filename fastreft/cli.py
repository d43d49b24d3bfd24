"""The command line: ``fastreft COMMAND ...``, also ``python -m fastreft``.

A command is two modules: that of :mod:`fastreft.tasks.flags` reads what it is told, and that of :mod:`fastreft.tasks`
does it. Each is imported when its turn comes, as the second imports torch and more: help and what is wrong with flags come
before that. Exit codes: 0 done, 1 a check failed, 2 bad input (one sentence on stderr and nothing written).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .tasks.errors import UserError

COMMANDS = {
    "demo": "memorise a passage, learn a behaviour beside LoRA, save, reload (under two minutes on a CPU)",
    "train": "train an adapter on a file of prompts and completions",
    "generate": "write text with a trained adapter",
    "convert": "turn a pyreft checkpoint into an adapter, or back",
    "inspect": "what a pyreft checkpoint or an adapter holds",
    "info": "versions, the native core in use, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``argv`` defaults to the process's arguments."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="fastreft",
        description="Representation fine-tuning (ReFT) of language models.",
        epilog=f"commands:\n{listing}\n\n'fastreft COMMAND --help' lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own options")
    chosen = parser.parse_args(argv)
    try:
        flags = importlib.import_module(f".tasks.flags.{chosen.command}", __package__).parse(chosen.arguments)
        return importlib.import_module(f".tasks.{chosen.command}", __package__).run(flags)
    except UserError as error:
        print(f"fastreft {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastreft {chosen.command}: interrupted", file=sys.stderr)
        return 130
