"""SICOG stage 1, alignment: the resampler alone learns, on overviews, between a frozen tower and a frozen decoder.

torchrun --nproc-per-node 2 launch/align_stage1.py --config examples/stage1_tiny.yaml
"""

import sys

from sicog_mcore.commands.train_stage import ALIGN_VERB

main = ALIGN_VERB.start

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
