"""Program to ONNX: cache graphs, translation, files that clients open, parity."""
