"""`sicog evaluate` as a script: benchmark rows, judged answers, comparisons; see sicog_mcore/commands/evaluate.py."""

import sys

from sicog_mcore.commands.evaluate import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
