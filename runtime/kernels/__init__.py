"""Kernels: what makes the zeros pay."""
