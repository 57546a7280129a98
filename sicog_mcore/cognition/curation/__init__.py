"""Curation decides which items are kept, and as which training rows. Start: curated_round.py."""
