"""The command line: ``fastreft COMMAND ...``, also ``python -m fastreft``.

A command is two modules: that of :mod:`fastreft.tasks.flags` reads what it is told, and that of :mod:`fastreft.tasks`
does it. Each is imported when its turn comes, as the second imports torch and more: help and what is wrong with flags come
before that. Exit codes: 0 done, 1 a check failed, 2 bad input (one sentence on stderr and nothing written), 130 interrupted.
What is foreseen is checked where it belongs; of all else there is one sentence, too, and ``--traceback`` shows where it was.
Of several processes the first on a machine says it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .tasks import processes
from .tasks.errors import UserError, in_words

COMMANDS = {
    "demo": "memorise a passage, learn a behaviour beside LoRA, save, reload (under two minutes on a CPU)",
    "train": "train an adapter on a task or on records of your own",
    "eval": "score adapters, and the untouched model, on a task",
    "tune": "search for a training's best settings",
    "generate": "write text with a trained adapter",
    "chat": "talk to a model with a trained adapter",
    "serve": "serve a model and its adapters over HTTP, with vLLM",
    "convert": "turn a pyreft checkpoint into an adapter, or back",
    "das": "search a model for a variable, over layers and positions",
    "report": "a page of how an adapter was trained and what it does to its model",
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
        epilog=f"commands:\n{listing}\n\n'fastreft COMMAND --help' lists a command's options; --traceback, with any of them, "
        "shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own options")
    chosen = parser.parse_args(argv)
    given = [argument for argument in chosen.arguments if argument != "--traceback"]
    try:
        processes.check_command(chosen.command)
        flags = importlib.import_module(f".tasks.flags.{chosen.command}", __package__).parse(given)
        return importlib.import_module(f".tasks.{chosen.command}", __package__).run(flags)
    except UserError as error:
        processes.complain(f"fastreft {chosen.command}: {error}")
        return 2
    except KeyboardInterrupt:
        print(f"fastreft {chosen.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read what is printed has heard enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if given != chosen.arguments:
            raise
        processes.complain(f"fastreft {chosen.command}: {in_words(error)} (--traceback shows where)")
        return 2
