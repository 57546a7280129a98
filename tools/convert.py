"""`sicog convert` as a script: turns weights into ours and back; see sicog_mcore/commands/convert.py."""

import sys

from sicog_mcore.commands.convert import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
