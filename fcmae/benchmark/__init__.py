"""How fast and how large a pre-training step is, always compared with a named baseline.

`dense` is the baseline, `measure` the stop-watch and the scales, `step` what is measured, `report` how it is shown.
"""
