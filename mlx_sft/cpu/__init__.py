"""Differentiable operations with a backward pass of their own, made to keep and to cost little. Arrays in, arrays out.

Knows nothing of modules, models or training.
"""
