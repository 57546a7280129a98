"""`sicog score` as a script: scores the candidates of each item by how far they agree; see sicog_mcore/commands/score.py."""

import sys

from sicog_mcore.commands.score import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
