"""The self-improvement loop: generate, agree, curate. Every step is a function from files to files."""
