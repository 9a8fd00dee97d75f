"""Segmentation: a class for every pixel.

`maps` is what the networks share: `segformer`, which `segformer_files` fills from weight
files, and `fast_scnn`.
"""
