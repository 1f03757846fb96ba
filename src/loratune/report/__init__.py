"""Figures and one self-contained page. Renders summaries, computes nothing."""
