"""`sicog evaluate` as a script: benchmarks as rows, answers judged, two checkpoints compared

See sicog_mcore/commands/evaluate.py."""

import sys

from sicog_mcore.commands.evaluate import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
