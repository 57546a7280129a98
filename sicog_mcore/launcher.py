"""Every launch script starts and ends here; whatever goes wrong becomes one message and an exit code.

It finds its place among the ranks, reads and checks the configuration, owns the output folder, and trains.
In: argv and the environment that torchrun set   Out: exit code   Next: ranks.py, cli.py, lock.py, train/run.py
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sicog_mcore.cli import load_experiment
from sicog_mcore.data.preflight import check_inputs
from sicog_mcore.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_OK, ConfigError, SicogError, printable
from sicog_mcore.lock import owned
from sicog_mcore.parallel.watch import watch_parent
from sicog_mcore.ranks import Place, is_first_task, machine_has_gpus, prepare_environment, read_place, silence_megatron
from sicog_mcore.stages import StageDefaults

if TYPE_CHECKING:
    from sicog_mcore.config import Experiment
    from sicog_mcore.train.held_out_check import AnswerGrader

SPEAKER_FIRST_S = 5.0
HELD_OUT = "held_out"  # folder of a run for the rows and images of its benchmark


def start_training(
    argv: Sequence[str],
    environment: MutableMapping[str, str],
    stage: StageDefaults,
    script_words: int = 1,
    program: str = "",
) -> int:
    """Trains what the command line describes.

    Args:
        argv: of the script, its own name first.
        environment: of the process; RANK, WORLD_SIZE and their like are read, without them this is a single process.
            What Megatron relies on is set in it.
        stage: what the training stage fixes, see stages.py.
        script_words: words at the front of ``argv`` that are not the configuration's.
        program: what the usage line calls the program; empty for the script's name.

    Returns:
        exit code: 0 done, 2 wrong configuration or checkpoint, 17 do not retry, 75 the machine failed, 130 interrupted; all
        others are crashes.
    """
    place = find_place(environment)
    if place is None:
        return EXIT_CONFIG
    try:
        experiment = load_experiment(list(argv[script_words:]), place.world_size, check_inputs, stage, program)
        command = start_command(argv, environment)
        with owned(Path(experiment.output), command, say, place.is_main):
            prepare(environment, experiment.parallel.tensor, place)
            from sicog_mcore.train.run import run  # takes seconds to import; mistakes are reported before that

            run(experiment, command, _grader(experiment) if place.is_main else None)
    except SicogError as error:
        return stop(f"error: {error}", error.exit_code, error.is_said_by(place.is_main))
    except KeyboardInterrupt as interrupt:
        message = " ".join(["interrupted", *interrupt.args])
        return stop(f"{message}; the same command resumes from the newest checkpoint", EXIT_INTERRUPTED, place.is_main)
    return EXIT_OK


def _grader(experiment: Experiment) -> AnswerGrader | None:
    """Judges the answers of a model in training, where questions are to be asked.

    Raises:
        RecordError: the benchmark cannot be used.
    """
    if not (experiment.held_out.every_steps and experiment.held_out.benchmark):
        return None
    from sicog_mcore.cognition.evaluation.benchmark_grader import BenchmarkGrader

    return BenchmarkGrader(experiment.held_out, Path(experiment.output) / HELD_OUT)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Where this process stands among its ranks; from now on it does not outlive the torchrun that started it.

    Returns:
        None, after a message, where the environment is one in which no run can start.
    """
    try:
        place = read_place(environment, machine_has_gpus(environment))
    except ConfigError as error:
        stop(f"error: {error}", error.exit_code, is_first_task(environment))
        return None
    if place.by_torchrun:
        watch_parent(speaks=place.is_main)
    return place


def prepare(environment: MutableMapping[str, str], tensor: int, place: Place) -> None:
    """Prepares the process before Megatron is imported and before CUDA starts.

    Args:
        tensor: ranks that share a layer.
    """
    for note in prepare_environment(environment, tensor):
        if place.is_main:
            say(note)
    silence_megatron()


def say(text: object) -> None:
    """One message to standard error, without anything that would steer the terminal."""
    sys.stderr.write(f"{printable(text)}\n")


def stop(message: str, exit_code: int, speaks: bool) -> int:
    """Says why this rank ends, or gives the rank that does the time to."""
    if speaks:
        say(message)
    else:
        time.sleep(SPEAKER_FIRST_S)  # torchrun ends all ranks as soon as one has ended, maybe before another has spoken
    return exit_code


def start_command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """Gives the command that starts this run again from the current folder, ready to be pasted into any shell."""
    per_node = environment.get("LOCAL_WORLD_SIZE")
    program = Path(sys.executable).with_name("torchrun") if per_node else Path(sys.executable)
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    words, note = [str(shown)], ""
    nodes, restarts = environment.get("GROUP_WORLD_SIZE", "1"), environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if per_node:
        words += ["--nnodes", nodes] if nodes != "1" else []
        words += ["--nproc-per-node", per_node, *(["--max-restarts", restarts] if restarts != "0" else [])]
        note = (
            "  # on every node, with the --rdzv-* or --node-rank, --master-* options of this start"
            if nodes != "1"
            else ""
        )
    elif environment.get("WORLD_SIZE", "1") != "1":
        note = "  # on every rank, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as in this start"
    return " ".join(map(quote, [*words, *argv])) + note


def quote(word: str) -> str:
    """A word as a shell reads it, on one line and without control characters."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{printable(escaped).replace(chr(10), chr(92) + 'n').replace(chr(9), chr(92) + 't')}'"
