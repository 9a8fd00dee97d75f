"""Segmentation: a class for every pixel.

`maps` holds loss and decoding; `mamba` is a network, over the scan of `scan`.
"""
