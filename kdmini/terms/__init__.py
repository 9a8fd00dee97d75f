"""Distillation terms beside attention transfer: one paper a file."""
