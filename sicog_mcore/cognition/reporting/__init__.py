"""One HTML file about a round, and drift between rounds. Start: page.py."""
