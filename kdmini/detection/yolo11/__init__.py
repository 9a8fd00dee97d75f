"""YOLO11 with the public layer numbers and state_dict keys; a folder that could be copied out."""
