"""Detection: boxes and classes of objects, their data, two detectors, their metric.

`truth` says what targets and predictions hold, `voc` reads a data set; `yolo11` and
`atss` are the detectors, `boxes` what they share; `average_precision` scores them, with
the pairs of `matching`.
"""
