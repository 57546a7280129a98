"""What every launch script does: read and check the configuration, train, turn errors into one message and an exit code.

In: argv and the environment that torchrun set   Out: exit code   Next: cli.py, train/run.py
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence

from sicog_mcore.cli import load_experiment
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import EXIT_OK, SicogError


def start_training(argv: Sequence[str], environment: Mapping[str, str]) -> int:
    """Trains what the command line describes.

    Args:
        argv: of the script, its own name first.
        environment: RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are read; without them this is a single process.

    Returns:
        exit code: 0 done, 2 wrong configuration or checkpoint, 17 do not retry; all others are crashes.
    """
    is_main = int(environment.get("RANK", 0)) == 0
    try:
        experiment = load_experiment(list(argv[1:]), int(environment.get("WORLD_SIZE", 1)), check_inputs)
        _silence_third_parties()
        from sicog_mcore.train.run import run  # takes seconds to import; mistakes are reported before that

        run(experiment, _command(argv, environment))
    except SicogError as error:
        if is_main or not error.same_on_all_ranks:
            sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return EXIT_OK


def _silence_third_parties() -> None:
    """Our console says what matters; Megatron's and torch's notices would bury it. Their errors still come through."""
    warnings.filterwarnings("ignore")
    for name in ("megatron", "torch", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    per_node = environment.get("LOCAL_WORLD_SIZE")
    return " ".join([f"torchrun --nproc-per-node {per_node}" if per_node else "python", *argv])
