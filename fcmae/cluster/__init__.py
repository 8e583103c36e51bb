"""A job of a cluster around a run: standard library only, so that it works outside of the container of the run."""
