"""YOLO11 with the public layer numbers and state_dict keys.

`layers` and `model` are the network, `assign` and `loss` train it; `weights` fills it
from a file, which `pickled` opens and `tensors` takes the tensors from.
"""
