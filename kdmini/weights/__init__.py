"""Weight files opened without running what is in them.

`archive` opens a file, `pickled` or `safetensors` reads it, `tensors` makes its tensors;
`state` does all of it for a network whose file holds no more than tensors.
"""
