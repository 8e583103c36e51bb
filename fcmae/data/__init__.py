"""Images in: sources, transforms, and the Lightning data modules that join them."""
