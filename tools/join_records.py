"""`sicog join-records` as a script: makes one round of several generation runs; see sicog_mcore/commands/join_records.py."""

import sys

from sicog_mcore.commands.join_records import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
