"""SICOG stage 1.5, multimodal pre-training: plain decoder, CLIP and the resampler of stage 1, all of them trained.

torchrun --nproc-per-node 2 launch/pretrain_stage15.py --config examples/demo.yaml --parallel.tensor 2

The same command resumes an interrupted run. --help lists every value, --print_config shows what would be used.
"""

import os
import sys

from sicog_mcore.launcher import start_training
from sicog_mcore.stages import PRETRAIN

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(start_training(sys.argv, os.environ, PRETRAIN))
