"""`sicog report` as a script: writes the report of a round; see sicog_mcore/commands/report.py."""

import sys

from sicog_mcore.commands.report import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
