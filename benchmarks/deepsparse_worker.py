"""Runs a model in DeepSparse, in an interpreter of its own; `deepsparse_rival.py` talks to it.

It imports nothing of zeroskip: DeepSparse wants an old onnx and an old NumPy. One line in is one
run, one line out is its wall seconds and CPU seconds.
"""

import sys
import time

import numpy as np
from deepsparse import Engine


def main() -> None:
    """Arguments: the model, the inputs (.npy), the number of cores."""
    model, inputs, cores = sys.argv[1:]
    x = np.load(inputs)
    engine = Engine(model=model, batch_size=x.shape[0], num_cores=int(cores))
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        engine.run([x])
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
