"""Lightning modules, optimisation, callbacks, and the folder that a run lives in."""
