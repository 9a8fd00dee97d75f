"""Segmentation: the class of every pixel, its data and its metric.

`truth` says what targets and predictions hold, `voc` reads a data set, with the files of
`masks`; `mean_iou` scores.
"""
