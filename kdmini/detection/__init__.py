"""Boxes and classes of objects: the task of YOLO11 and ATSS, with its data and its metrics."""
