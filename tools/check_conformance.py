"""`sicog check-conformance` as a script: compares with recorded files; see sicog_mcore/commands/check_conformance.py."""

import sys

from sicog_mcore.commands.check_conformance import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
