"""What every launch script does: read and check the configuration, train, turn errors into one message and an exit code.

In: argv and the environment that torchrun set   Out: exit code   Next: cli.py, train/run.py
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from sicog_mcore.cli import load_experiment
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import EXIT_OK, SicogError
from sicog_mcore.stages import Stage

EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports it
SPEAKER_FIRST_S = 5.0


def start_training(argv: Sequence[str], environment: Mapping[str, str], stage: Stage) -> int:
    """Trains what the command line describes.

    Args:
        argv: of the script, its own name first.
        stage: what the training stage fixes, see stages.py.
        environment: RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are read; without them this is a single process.

    Returns:
        exit code: 0 done, 2 wrong configuration or checkpoint, 17 do not retry, 130 interrupted; all others are crashes.
    """
    is_main = int(environment.get("RANK", 0)) == 0
    try:
        experiment = load_experiment(list(argv[1:]), int(environment.get("WORLD_SIZE", 1)), check_inputs, stage)
        # Megatron warns of every package that is missing (tools/doctor.py explains them) and of its own plans.
        warnings.simplefilter("ignore")
        logging.getLogger("megatron").setLevel(logging.ERROR)
        from sicog_mcore.train.run import run  # takes seconds to import; mistakes are reported before that

        run(experiment, _command(argv, environment))
    except SicogError as error:
        return _stop(f"error: {error}", error.exit_code, is_main or not error.same_on_all_ranks)
    except KeyboardInterrupt as interrupt:
        message = " ".join(["interrupted", *interrupt.args])
        return _stop(f"{message}; the same command resumes from the newest checkpoint", EXIT_INTERRUPTED, is_main)
    return EXIT_OK


def _stop(message: str, exit_code: int, speaks: bool) -> int:
    if speaks:
        sys.stderr.write(f"{message}\n")
    else:
        time.sleep(SPEAKER_FIRST_S)  # torchrun ends all ranks as soon as one has ended, maybe before another has spoken
    return exit_code


def _command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """What starts this run again from the current folder, also where no environment is activated."""
    per_node = environment.get("LOCAL_WORLD_SIZE")
    program = Path(sys.executable).with_name("torchrun") if per_node else Path(sys.executable)
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return " ".join([str(shown), *(["--nproc-per-node", per_node] if per_node else []), *argv])
