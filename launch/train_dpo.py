"""Preference training (DPO) on pairs of answers about the same image, from the weights of stage 2.

torchrun --nproc-per-node 2 launch/train_dpo.py --config examples/dpo_tiny.yaml
"""

import sys

from sicog_mcore.commands.train_stage import DPO_VERB

main = DPO_VERB.start

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
