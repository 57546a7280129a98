"""`sicog annotate` as a script: makes warm-up data in steps; see sicog_mcore/commands/annotate.py."""

import sys

from sicog_mcore.commands.annotate import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
