"""SICOG stage 1.5, multimodal pre-training: plain decoder, CLIP and the resampler of stage 1, all of them trained.

torchrun --nproc-per-node 2 launch/pretrain_stage15.py --config examples/demo.yaml --parallel.tensor 2

The same command resumes an interrupted run. --help lists every value, --print_config shows what would be used.
"""

import sys

from sicog_mcore.commands.train_stage import PRETRAIN_VERB

main = PRETRAIN_VERB.start

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
