"""How fast and how large a pre-training step is, always compared with a named baseline; and does the loader keep up?

`dense` and `same_kernels` are the baselines, `variants` what is compared, `doctor` whether engines can be trusted,
`measure` the stop-watch and the scales, `arithmetic` how much work there is, `step` and `loader` what is measured,
`run` puts these together, `report` holds the numbers, `tables`, `plot` and `summary` show them.
"""
