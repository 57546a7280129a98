"""`sicog demo-data` as a script: builds a small real data set; see sicog_mcore/commands/demo_data.py."""

import sys

from sicog_mcore.commands.demo_data import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
