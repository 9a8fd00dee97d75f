"""Distillation: taps, alignment, attention transfer and its schedule."""
