"""`sicog import-gguf` as a script: reads a GGUF file; see sicog_mcore/commands/import_gguf.py."""

import sys

from sicog_mcore.commands.import_gguf import VERB

main = VERB.start

if __name__ == "__main__":
    sys.exit(main())
