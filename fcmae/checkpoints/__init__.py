"""What is written to disk and read back: our checkpoints and exports. Nothing is ever unpickled."""
