"""The training stages as verbs: each puts its values between preset and YAML, the command line of the configuration follows.

In: words of the configuration, see cli.py   Out: exit code, a run's folder   Next: launcher.py
What a stage is asked to do is an Experiment, the options dataclass of training; ``sicog VERB --help`` lists its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from sicog_mcore.commands.verb import make_call, usage_error
from sicog_mcore.launcher import start_training
from sicog_mcore.stages import ALIGN, DPO, FINETUNE, PERCEPTION, PRETRAIN, REASONING, StageDefaults


@dataclass(frozen=True)
class TrainingVerb:
    """A stage of training.

    Attributes:
        stages: values that the stage fixes, by the word that has to stand first; the word is empty where none does.
    """

    stages: Mapping[str, StageDefaults]

    def start(
        self,
        arguments: Sequence[str] | None = None,
        environment: MutableMapping[str, str] | None = None,
        program: tuple[str, ...] = (),
    ) -> int:
        """Trains what the words describe and returns the exit code; see verb.Startable."""
        call = make_call(arguments, environment, program)
        first = "" if "" in self.stages else (*call.arguments, "")[0]
        if first not in self.stages:
            expected = " or ".join(self.stages)
            if not {"-h", "--help"} & set(call.arguments):
                return usage_error(f"found {first or 'nothing'}, expected {expected} as the first word")
            print(f"The first word is {expected}; then follows what every training takes.\n")
            first = next(iter(self.stages))
        # The word is none of the configuration's, but belongs to the command that the summary prints.
        words = len(call.program) + (first in call.arguments[:1])
        return start_training(call.argv, call.environment, self.stages[first], words, call.usage_name)


WARMUP_VERB = TrainingVerb({"perception": PERCEPTION, "reasoning": REASONING})
ALIGN_VERB = TrainingVerb({"": ALIGN})
PRETRAIN_VERB = TrainingVerb({"": PRETRAIN})
FINETUNE_VERB = TrainingVerb({"": FINETUNE})
DPO_VERB = TrainingVerb({"": DPO})
