"""`sicog loop-demo-data` as a script: builds data for a loop; see sicog_mcore/commands/loop_demo_data.py."""

import sys

from sicog_mcore.commands.loop_demo_data import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
