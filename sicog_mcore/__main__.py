"""`python -m sicog_mcore VERB ...`, the same as `sicog VERB ...`; torchrun starts it as `torchrun ... -m sicog_mcore VERB`.

In: command line   Out: exit code   Next: commands/front.py
"""

import sys

from sicog_mcore.commands.front import main

if __name__ == "__main__":  # required: saving a checkpoint starts processes that import this file
    sys.exit(main())
