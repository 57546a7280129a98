"""What is kept, and as which training rows. Start: curated_round.py."""
