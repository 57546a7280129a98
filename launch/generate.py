"""`sicog generate` as a script: candidates for unlabelled items; see sicog_mcore/commands/candidates.py.

torchrun --nproc-per-node 8 launch/generate.py --tensor 2 ...     four replicas of the model, two ranks each
"""

import sys

from sicog_mcore.commands.candidates import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
