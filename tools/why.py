"""`sicog why` as a script: walks back from a training row; see sicog_mcore/commands/why.py."""

import sys

from sicog_mcore.commands.why import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
