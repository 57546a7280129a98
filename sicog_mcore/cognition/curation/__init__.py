"""What is kept, and as which training rows. Start: curate.py."""
