"""Other runtimes, measured beside this one: each a process of its own, in a virtual environment of its own.

`catalog.py` lists them. A peer's driver (`llama.py`, `genai.py`, ...) runs under the Python of its environment, whose packages
`llama.txt` and the like pin, and imports nothing of engineshed but `driver.py`, which needs the standard library only. `own.py`
drives this runtime in the same way. `model.py` and `llama_prepare.py` make the models that they read.
"""
