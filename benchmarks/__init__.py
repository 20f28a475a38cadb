"""Our trainer beside its peers, and beside what the hardware allows: `python -m benchmarks.run --help`.

cases ─► workload ─► task ─► process ─► trainers/ ─► summary ─► results/*.json ─► report, plots
                                    └─► limit
"""
