"""SICOG stage 0, warm-up: a base model learns step-by-step perception, or reasoning, from a few annotations.

torchrun --nproc-per-node 2 launch/warmup_stage0.py perception --config examples/stage0_tiny.yaml
torchrun --nproc-per-node 2 launch/warmup_stage0.py reasoning --config examples/stage0_tiny.yaml
"""

import os
import sys
from collections.abc import Mapping

from sicog_mcore.errors import printable
from sicog_mcore.launcher import start_training
from sicog_mcore.stages import PERCEPTION, REASONING, StageDefaults

KINDS: Mapping[str, StageDefaults] = {"perception": PERCEPTION, "reasoning": REASONING}

if __name__ == "__main__":
    words = sys.argv[1:]
    if not words or words[0] not in KINDS:
        found = printable(words[0]) if words else "nothing"
        print(f"error: found {found}, expected perception or reasoning as the first word", file=sys.stderr)
        sys.exit(2)
    # The word is none of the configuration's, but belongs to the command that the summary prints.
    sys.exit(start_training(sys.argv, os.environ, KINDS[words[0]], script_words=2))
