"""Kernels in Triton and Gluon for NVIDIA and AMD GPUs; nothing here is imported before it is needed."""
