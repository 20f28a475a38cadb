"""A run's twin: the same run as a folder that TRL and PEFT carry out, on CUDA or wherever PyTorch is, and the way back.

run ─► export ─► twin/ ─► train.py, elsewhere ─► twin/adapter/ ─► folder ─► `mlx-sft train --resume-from-peft twin`
"""
