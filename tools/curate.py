"""`sicog curate` as a script: keeps what the model agrees with itself about; see sicog_mcore/commands/curate.py."""

import sys

from sicog_mcore.commands.curate import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
