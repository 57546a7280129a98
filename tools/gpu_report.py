"""`sicog gpu-report` as a script: measures how fast this machine trains; see sicog_mcore/commands/gpu_report.py."""

import sys

from sicog_mcore.commands.gpu_report import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
