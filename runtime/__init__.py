"""How a program runs: kernels, dispatch, ONNX."""
