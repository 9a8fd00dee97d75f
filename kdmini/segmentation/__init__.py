"""Segmentation: the class of every pixel, its data, its networks and its metric.

`truth` says what targets and predictions hold, `voc` reads a data set, with the files of
`masks`; `mean_iou` scores. `maps` is what the networks share: `segformer`, which
`segformer_files` fills from weight files, `fast_scnn`, and `mamba` on the `scan`.
"""
