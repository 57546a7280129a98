"""The steps of all rounds as a graph of processes. Start: workflow.py."""
