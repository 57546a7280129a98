"""`sicog perplexity` as a script: measures how well answers are predicted; see sicog_mcore/commands/perplexity.py."""

import sys

from sicog_mcore.commands.perplexity import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
