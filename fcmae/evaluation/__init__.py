"""How good a model is: pictures of what it reconstructs, and losses to compare its own with."""
