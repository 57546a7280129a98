"""Preference training (DPO) on pairs of answers about the same image, from the weights of stage 2.

torchrun --nproc-per-node 2 launch/train_dpo.py --config examples/dpo_tiny.yaml
"""

import os
import sys

from sicog_mcore.launcher import start_training
from sicog_mcore.stages import DPO

if __name__ == "__main__":
    sys.exit(start_training(sys.argv, os.environ, DPO))
