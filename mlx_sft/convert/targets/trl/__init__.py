"""The export format `trl`: a run as a folder that TRL and PEFT carry out, on CUDA or wherever PyTorch runs, and the way back.

run ─► export ─► folder ─► train.py, elsewhere ─► folder/adapter/ ─► `mlx-sft train --resume-from-peft folder`
"""
