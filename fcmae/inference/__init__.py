"""A trained network at work: what it makes of images, batch by batch."""
