"""`sicog doctor` as a script: says what this machine can run; see sicog_mcore/commands/doctor.py."""

import sys

from sicog_mcore.commands.doctor import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
