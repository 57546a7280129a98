"""SICOG stage 1, alignment: the resampler alone learns, on overviews, between a frozen tower and a frozen decoder.

torchrun --nproc-per-node 2 launch/align_stage1.py --config examples/stage1_tiny.yaml
"""

import os
import sys

from sicog_mcore.launcher import start_training
from sicog_mcore.stages import ALIGN

if __name__ == "__main__":
    sys.exit(start_training(sys.argv, os.environ, ALIGN))
