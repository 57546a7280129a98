"""One command, `sicog VERB`: every step as options, a function that returns a result, and a thin main. Start: front.py."""
