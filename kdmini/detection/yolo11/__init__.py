"""YOLO11 with the public layer numbers and state_dict keys.

`sizes`, `layers` and `model` are the network, `assign` and `loss` train it. `weights` fills
it from a file, which kdmini/weights opens: `modules` and `contents` find the detector in it,
`class_rows` cuts its head.
"""
