"""`sicog loop` as a script: the self-improvement loop, one command; see sicog_mcore/commands/loop.py.

python launch/self_improve.py --config examples/loop_demo.yaml --plan       what would run
python launch/self_improve.py --config examples/loop_demo.yaml --nproc 8    runs it, or goes on where it was stopped
"""

import sys

from sicog_mcore.commands.loop import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
