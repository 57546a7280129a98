"""Scoring measures how far the candidates of an item agree. Start: agreement.py."""
