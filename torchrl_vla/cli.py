"""The `torchrl-vla` command. The options of each command are the fields of its configuration class."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

import torchrl_vla
from torchrl_vla.errors import user_sentence

__all__ = ["main"]

_COMMANDS = {
    "train": "fine-tune a policy with PPO/GRPO on LIBERO",
    "evaluate": "judge a policy by the standard protocol",
    "compare": "compare two finished evaluations, episode by episode",
    "demos": "record demonstrations of a scripted expert",
    "finetune": "fine-tune a policy on demonstrations",
    "doctor": "what is in a checkpoint, and whether this machine can run it",
    "export": "write a policy for other tools, in upstream's format or as an adapter",
    "bench": "measure speed and memory on this machine",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, `torchrl_vla.commands.NAME`.

    Args:
        arguments: command and options; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # PyTorch's threads would spin while they wait, and keep the simulating processes off the cores that they share.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A terminal without these letters shows their numbers: no result is lost over an apostrophe.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()  # a reader that is gone shows here, and not when the interpreter ends
    except BrokenPipeError:
        # `--help | head`: its reader has seen enough. Any other command has lost a pipe that it needs.
        if arguments and not {"-h", "--help"} & set(arguments):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        # What the user can mend deserves a sentence, not a traceback; what comes from a library shows where it does.
        sentence = user_sentence(error)
        if sentence is None:
            raise
        sys.exit(f"torchrl-vla {arguments[0]}: {sentence}")


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: torchrl-vla COMMAND [OPTIONS]        (torchrl-vla COMMAND --help shows the options)\n")
        for name, purpose in _COMMANDS.items():
            print(f"  {name:<10} {purpose}")
        print("\n  --version  the version of this package")
    elif arguments[0] == "--version":
        print(f"torchrl-vla {torchrl_vla.__version__}")
    elif arguments[0] in _COMMANDS:
        importlib.import_module(f"torchrl_vla.commands.{arguments[0]}").main(arguments[1:])
    else:
        sys.exit(f"torchrl-vla: no command {arguments[0]!r}: choose {', '.join(_COMMANDS)}.")
