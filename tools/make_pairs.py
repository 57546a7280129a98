"""`sicog make-pairs` as a script: makes preference pairs; see sicog_mcore/commands/make_pairs.py."""

import sys

from sicog_mcore.commands.make_pairs import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
