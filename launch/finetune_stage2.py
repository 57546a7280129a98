"""SICOG stage 2, visual instruction tuning: every part is trained, from the weights of stage 1.5.

torchrun --nproc-per-node 2 launch/finetune_stage2.py --config examples/stage2_tiny.yaml
"""

import sys

from sicog_mcore.commands.train_stage import FINETUNE_VERB

main = FINETUNE_VERB.start

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
