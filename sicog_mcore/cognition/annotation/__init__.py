"""Descriptions and chains of thought for a few images, by an endpoint or from LLaVA-CoT. Start: annotator.py."""
