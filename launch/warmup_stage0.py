"""SICOG stage 0, warm-up: a base model learns step-by-step perception, or reasoning, from a few annotations.

torchrun --nproc-per-node 2 launch/warmup_stage0.py perception --config examples/stage0_tiny.yaml
torchrun --nproc-per-node 2 launch/warmup_stage0.py reasoning --config examples/stage0_tiny.yaml
"""

import sys

from sicog_mcore.commands.train_stage import WARMUP_VERB

main = WARMUP_VERB.start

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
