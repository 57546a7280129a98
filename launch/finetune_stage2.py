"""SICOG stage 2, visual instruction tuning: every part is trained, from the weights of stage 1.5.

torchrun --nproc-per-node 2 launch/finetune_stage2.py --config examples/stage2_tiny.yaml
"""

import os
import sys

from sicog_mcore.launcher import start_training
from sicog_mcore.stages import FINETUNE

if __name__ == "__main__":
    sys.exit(start_training(sys.argv, os.environ, FINETUNE))
